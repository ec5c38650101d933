"""Rows reach the state exactly once, whatever dies in between."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from cloudlm.core.clock import ManualClock
from cloudlm.core.errors import StorageFailed, Unavailable
from cloudlm.core.tenant import LedgerRow, Outcome
from cloudlm.gateway import journal as journal_module
from cloudlm.gateway import ledger as ledger_module
from cloudlm.gateway.journal import Journal
from cloudlm.gateway.ledger import Ledger
from cloudlm.state.memory import MemoryState


def row(number: int) -> LedgerRow:
    return LedgerRow(
        f"row{number}", "req", 1, "default", "k", "m", "r", Outcome.FINISHED, 200, 1, 2, 0, 1.5, 0.1
    )


class SometimesState(MemoryState):
    """Away when told to be; ``doubt`` writes and then says it failed."""

    away = False
    doubt = False

    async def append_ledger(self, rows: Any) -> None:
        if self.away:
            raise Unavailable("away")
        await super().append_ledger(rows)
        if self.doubt:
            raise TimeoutError


def make(folder: Path, state: MemoryState) -> Ledger:
    ledger = Ledger(Journal(folder), state, ManualClock())
    ledger.open()
    return ledger


async def ids(state: MemoryState) -> list[str]:
    return sorted(r.id for r in await state.list_ledger())


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


async def test_rows_reach_the_state_and_leave_nothing(tmp_path: Path) -> None:
    state = SometimesState()
    ledger = make(tmp_path / "ledger", state)
    ledger.add(row(1))
    assert files(tmp_path / "ledger") == [".jsonl", ".lock"]  # on disk before the state has it
    assert await ledger.flush()
    assert (await state.list_ledger()) == [row(1)]
    assert files(tmp_path / "ledger") == [".lock"]
    await ledger.close()
    assert files(tmp_path / "ledger") == []


@pytest.mark.promise(26)
async def test_state_away_then_back(tmp_path: Path) -> None:
    state = SometimesState()
    ledger = make(tmp_path, state)
    state.away = True
    for number in range(30):
        ledger.add(row(number))
        if number % 3 == 0:
            assert not await ledger.flush()
    assert len(list(tmp_path.glob("*.jsonl"))) <= 2  # a long absence makes no flood of files
    assert ledger.rows_in_memory == 0
    state.away = False
    assert await ledger.flush()
    assert await ids(state) == sorted(f"row{n}" for n in range(30))
    ledger.add(row(99))
    assert await ledger.flush()
    assert "row99" in await ids(state)
    assert list(tmp_path.glob("*.jsonl")) == []
    await ledger.close()


@pytest.mark.promise(3)
async def test_doubtful_write_doubles_nothing(tmp_path: Path) -> None:
    state = SometimesState()
    ledger = make(tmp_path, state)
    state.doubt = True
    ledger.add(row(1))
    assert not await ledger.flush()
    state.doubt = False
    assert await ledger.flush()
    assert await ids(state) == ["row1"]
    await ledger.close()


async def test_flush_cancelled_midway_loses_nothing(tmp_path: Path) -> None:
    state = SometimesState()
    ledger = make(tmp_path, state)
    stuck = asyncio.Event()

    async def hang(rows: Any) -> None:
        await stuck.wait()

    state.append_ledger = hang  # type: ignore[method-assign]
    ledger.add(row(1))
    flushing = asyncio.create_task(ledger.flush())
    await asyncio.sleep(0)
    ledger.add(row(2))
    flushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await flushing
    del state.append_ledger  # type: ignore[attr-defined]
    await ledger.close()
    assert await ids(state) == ["row1", "row2"]


async def test_a_state_too_slow_for_many_rows_at_once_gets_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "WRITE_TIMEOUT_S", 0.02)
    state = SometimesState()
    ledger = make(tmp_path, state)
    write = state.append_ledger

    async def slow(rows: Any) -> None:
        if len(rows) > 200:
            await asyncio.Event().wait()
        await write(rows)

    state.append_ledger = slow  # type: ignore[method-assign]
    for number in range(1000):
        ledger.add(row(number))
    async with asyncio.timeout(60):
        while not await ledger.flush() or ledger.rows_in_memory:
            pass
    assert len(await ids(state)) == 1000
    ledger._journal.close()


@pytest.mark.promise(3)
async def test_killed_process_is_replayed_by_the_next(tmp_path: Path) -> None:
    """A child journals and is killed; its rows, but for a broken last line, are adopted."""
    child = os.fork()
    if child == 0:
        journal = Journal(tmp_path)
        journal.open()
        for number in range(5):
            journal.append(row(number))
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    (segment,) = tmp_path.glob("*.jsonl")
    with segment.open("ab") as file:
        file.write(b'{"id":"half')
    state = SometimesState()
    ledger = make(tmp_path, state)
    ledger.add(row(50))
    assert await ledger.flush()
    assert await ids(state) == ["row0", "row1", "row2", "row3", "row4", "row50"]
    await ledger.close()
    assert files(tmp_path) == []


class Running:
    """An attempt that has relayed so many tokens."""

    def __init__(self, number: int) -> None:
        self.id = f"row{number}"
        self.number = number
        self.tokens = 0

    def row_so_far(self) -> LedgerRow:
        return replace(row(self.number), outcome=Outcome.FAILED, completion_tokens=self.tokens)


@pytest.mark.promise(3)
async def test_attempts_open_when_the_process_is_killed_get_their_row(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        journal = Journal(tmp_path)
        journal.open()
        for number in range(4):
            journal.append(row(number), is_open=True)
        journal.append(row(1))
        journal.seal()
        journal.append(replace(row(2), completion_tokens=77), is_open=True)
        journal.append(row(3))
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    state = SometimesState()
    await state.append_ledger([replace(row(0), completion_tokens=55)])  # it had ended after all
    ledger = make(tmp_path, state)
    assert await ledger.flush()
    tokens = {r.id: r.completion_tokens for r in await state.list_ledger()}
    assert tokens == {"row0": 55, "row1": 2, "row2": 77, "row3": 2}
    await ledger.close()
    assert files(tmp_path) == []


def test_rows_of_an_earlier_version_and_of_a_later_one_are_read(tmp_path: Path) -> None:
    """Lines were objects once, and may have more values one day; a broken one is nobody's."""
    journal = Journal(tmp_path)
    journal.open()
    assert journal.append(row(1))
    (segment,) = tmp_path.glob("*.jsonl")
    whole = segment.read_bytes()
    named = msgspec.json.encode({"row": row(2), "open": False}) + b"\n"
    longer = whole.replace(b'"row1"', b'"row3"').replace(b"]]", b',"of tomorrow"]]')
    others = [whole[:-cut].replace(b"row1", b"row4") + b"\n" for cut in range(2, len(whole) - 1)]
    foreign = [b"[]\n", b"[false,{}]\n", b"[false,[]]\n", b"7\n", b"null\n"]
    segment.write_bytes(whole + b"".join(others) + named + b"".join(foreign) + longer)
    journal.seal()
    assert journal.read(segment) == [row(1), row(2), row(3)]
    journal.close()


async def test_open_attempts_stay_noted_while_others_end(tmp_path: Path) -> None:
    state, clock = SometimesState(), ManualClock()
    ledger = Ledger(Journal(tmp_path), state, clock)
    ledger.open()
    running = Running(1)
    ledger.begin(running)
    for number in range(10, 13):
        running.tokens += 5
        ledger.begin(Running(number))
        ledger.add(row(number))
        await ledger.flush()
        (segment,) = tmp_path.glob("*.jsonl")
        assert f',"failed",200,1,{running.tokens},' in segment.read_text()
    running.tokens = 1234
    await clock.advance(1.0)
    await ledger.flush()  # no row ended, but a second has passed
    assert ',"failed",200,1,1234,' in segment.read_text()
    state.away = True
    ledger.add(row(20))
    assert not await ledger.flush()
    state.away = False
    assert await ledger.flush()
    assert await ids(state) == ["row10", "row11", "row12", "row20"]
    ledger.add(running.row_so_far())
    await ledger.close()
    assert files(tmp_path) == []


async def test_a_living_process_keeps_its_segments(tmp_path: Path) -> None:
    first, second = SometimesState(), SometimesState()
    one = make(tmp_path, first)
    one.add(row(1))
    two = make(tmp_path, second)
    await two.flush()
    await two.close()
    assert await ids(second) == []
    await one.close()
    assert await ids(first) == ["row1"]


@pytest.mark.promise(41)
async def test_full_disk_keeps_rows_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SometimesState()
    ledger = make(tmp_path, state)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal_module.os, "write", full)
    monkeypatch.setattr(ledger_module, "MAX_ROWS_IN_MEMORY", 3)
    state.away = True
    for number in range(5):
        ledger.add(row(number))
        await ledger.flush()
    assert (ledger.rows_in_memory, ledger.rows_dropped) == (3, 2)
    state.away = False
    assert await ledger.flush()
    assert await ids(state) == ["row0", "row1", "row2"]
    monkeypatch.undo()
    await ledger.close()


@pytest.mark.promise(41)
async def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.open()
    assert journal.append(row(1))
    real_write = os.write
    monkeypatch.setattr(journal_module.os, "write", lambda fd, data: real_write(fd, data[:10]))
    assert not journal.append(row(2))
    monkeypatch.undo()
    assert journal.append(row(3))
    journal.seal()
    assert [r.id for r in journal.read(journal.waiting[0])] == ["row1", "row3"]
    journal.close()


@pytest.mark.promise(40)
async def test_journal_is_bounded(tmp_path: Path) -> None:
    journal = Journal(tmp_path, max_waiting_bytes=1000)
    journal.open()
    taken = [journal.append(row(n)) for n in range(20)]
    assert True in taken
    assert False in taken
    assert journal.waiting_bytes <= 1000
    journal.close()


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageFailed, match="file/ledger"):
        Journal(tmp_path / "file" / "ledger").open()
