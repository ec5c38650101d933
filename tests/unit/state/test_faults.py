"""SQLite in trouble: locked, full, read-only, damaged, killed, cancelled."""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloudlm.core.deployment import Demand, DeploymentSpec, Endpoint
from cloudlm.core.errors import InternalError, StorageFailed, Unavailable
from cloudlm.core.tenant import KeyRecord
from cloudlm.state.database import Database
from cloudlm.state.sql import SqlState

SPEC = DeploymentSpec("bank", "models:/starter/1")
CANARY = "canary-7f3a" * 4000


@pytest.fixture
async def database(sqlite_file: Path) -> AsyncIterator[Database]:
    opened = await Database.open(f"sqlite:///{sqlite_file}", busy_timeout_s=10.0)
    yield opened
    await opened.close()


@pytest.fixture
async def state(database: Database) -> SqlState:
    return SqlState(database)


@pytest.mark.promise(41)
async def test_a_locked_database_is_waited_for_then_given_up(sqlite_file: Path) -> None:
    state = SqlState(await Database.open(f"sqlite:///{sqlite_file}", busy_timeout_s=0.2))
    other = sqlite3.connect(sqlite_file, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        with pytest.raises(Unavailable, match="another process is writing") as caught:
            await state.put_deployment(SPEC, now=1.0)
        assert time.monotonic() - started >= 0.2
        assert caught.value.retry_after_s
        assert await state.list_deployments() == [], "readers are not disturbed"
        other.execute("COMMIT")
        assert (await state.put_deployment(SPEC, now=1.0)).generation == 1
    finally:
        other.close()
        await state.close()


async def test_a_lock_that_is_given_back_in_time_is_not_noticed(
    state: SqlState, sqlite_file: Path
) -> None:
    other = sqlite3.connect(sqlite_file, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        writing = asyncio.create_task(state.put_deployment(SPEC, now=1.0))
        await asyncio.sleep(0.05)
        assert not writing.done()
        other.execute("COMMIT")
        assert (await writing).generation == 1
    finally:
        other.close()


async def _set(database: Database, pragma: str) -> None:
    """Set a pragma on the pool's only connection."""
    async with database._engine.connect() as connection:
        await connection.exec_driver_sql(f"PRAGMA {pragma}")


@pytest.mark.promise(41)
async def test_a_full_disk_changes_nothing_and_says_so(state: SqlState, database: Database) -> None:
    await state.put_endpoints("bank", [Endpoint("bank", "r", "http://a", 1)])
    before = await state.version(), await state.list_endpoints()
    await _set(database, "max_page_count = 30")
    record = KeyRecord("k1", CANARY * 10, "user", CANARY, "wxyz")
    with pytest.raises(StorageFailed, match="the disk is full: free some space") as caught:
        await state.put_key(record)
    shown = "".join(traceback.format_exception(caught.value))
    assert "canary" not in shown
    assert "INSERT" not in shown
    assert (await state.version(), await state.list_endpoints()) == before
    await _set(database, "max_page_count = 1000000")
    await state.put_key(record)
    assert await state.get_key("k1") == record


async def test_a_read_only_database_says_so(state: SqlState, database: Database) -> None:
    await _set(database, "query_only = 1")
    with pytest.raises(StorageFailed, match="cannot be written: check the owner"):
        await state.put_deployment(SPEC, now=1.0)
    assert await state.list_deployments() == []


async def test_a_damaged_database_says_so(sqlite_file: Path) -> None:
    content = bytearray(sqlite_file.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    sqlite_file.write_bytes(content)
    with pytest.raises(StorageFailed, match="damaged"):
        state = SqlState(await Database.open(f"sqlite:///{sqlite_file}", busy_timeout_s=0.2))
        await state.list_deployments()


@pytest.mark.promise(6)
async def test_an_unexpected_error_shows_no_sql(state: SqlState, sqlite_file: Path) -> None:
    with sqlite3.connect(sqlite_file) as connection:
        connection.execute("DROP TABLE api_keys")
    connection.close()
    with pytest.raises(InternalError, match=r"unexpected error \(OperationalError\)") as caught:
        await state.get_key(CANARY)
    shown = "".join(traceback.format_exception(caught.value))
    assert "canary" not in shown
    assert "SELECT" not in shown


@pytest.mark.promise(41)
async def test_cancelled_writes_leave_no_lock(state: SqlState, database: Database) -> None:
    chance = random.Random(7)
    for turn in range(40):
        writes = [
            asyncio.create_task(state.put_demand([Demand(f"m{n}", "g", turn, 0, 0.0, 1.0)]))
            for n in range(3)
        ]
        reads = [asyncio.create_task(state.list_demand(since=0.0)) for _ in range(3)]
        for _ in range(chance.randrange(40)):
            await asyncio.sleep(0)
        for task in writes + reads:
            if chance.random() < 0.7:
                task.cancel()
        done = await asyncio.gather(*writes, *reads, return_exceptions=True)
        assert all(
            isinstance(one, asyncio.CancelledError) or not isinstance(one, BaseException)
            for one in done
        ), done
    await state.put_deployment(SPEC, now=1.0)
    assert database._engine.pool.status().find("Current Checked out connections: 0") > 0


WRITER = """
    import asyncio, sys
    from cloudlm.core.deployment import DeploymentSpec, Endpoint
    from cloudlm.core.tenant import LedgerRow, Outcome
    from cloudlm.state.open import open_state

    def row(batch, number):
        return LedgerRow(f"{batch}-{number}", batch, 1, "t", "k", "m", "r", Outcome.FINISHED,
                         200, 1, 1, 0, 1.0, 0.1)

    async def main(url, start):
        state = await open_state(url)
        print("ready", flush=True)
        for turn in range(int(start), 10**9):
            await state.append_ledger([row(f"b{turn}", number) for number in range(700)])
            await state.put_endpoints(
                "m", [Endpoint("m", f"r{n}", "http://a", turn) for n in range(5)])
            await state.put_deployment(
                DeploymentSpec("m", "models:/m/1", env={"TURN": str(turn)}), now=float(turn))

    asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.promise(41)
async def test_kill_9_in_the_middle_of_writes_leaves_whole_facts(sqlite_file: Path) -> None:
    url = f"sqlite:///{sqlite_file}"
    chance = random.Random(11)
    for turn in range(4):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), url, str(turn * 10**6)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0.05, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        process.stdout.close()
        state = SqlState(await Database.open(url, busy_timeout_s=1.0))
        try:
            await _check_whole(state, sqlite_file)
        finally:
            await state.close()


async def _check_whole(state: SqlState, path: Path) -> None:
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        batches = connection.execute("SELECT count(*) FROM ledger GROUP BY request_id").fetchall()
        assert set(batches) <= {(700,)}
    connection.close()
    endpoints = await state.list_endpoints()
    assert len(endpoints) in (0, 5)
    assert len({endpoint.revision for endpoint in endpoints}) <= 1
    generations = sum(one.generation for one in await state.list_deployments())
    changes_of_endpoints = await state.version() - generations
    assert changes_of_endpoints >= generations, "each change was counted with it"
