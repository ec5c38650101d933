"""Opening a state: addresses, files, start time, and what the errors say."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import event

import cloudlm.state.migrations as migrations
from cloudlm.core.errors import BadSetting, CloudlmError, MissingExtra, StorageFailed, Unavailable
from cloudlm.state.database import Database
from cloudlm.state.memory import MemoryState
from cloudlm.state.open import open_state

PASSWORD = "hunter" + "2"  # in two parts: a traceback shows lines of this file


async def test_memory_is_made_anew() -> None:
    assert isinstance(await open_state("memory://"), MemoryState)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://root:hunter2@db/x", "scheme 'mysql'"),
        ("sqlite", "expected sqlite"),
        ("", "expected sqlite"),
        ("sqlite+pysqlcipher:///x.db", "scheme 'sqlite\\+pysqlcipher'"),
        ("postgresql+asyncpg://root:hunter2@db/x", "scheme 'postgresql\\+asyncpg'"),
        ("sqlite://", "must name a file"),
        ("sqlite:///:memory:", "must name a file"),
        ("sqlite:///x.db?mode=ro", "must name a file"),
        ("postgresql://root:hunter2@db:port/x", "cannot be read as an address"),
    ],
)
async def test_other_addresses_are_refused(url: str, says: str) -> None:
    with pytest.raises(BadSetting, match=says) as caught:
        await open_state(url)
    assert caught.value.param == "state.url"
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


async def test_the_file_is_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    state = await open_state(f"sqlite:///{path}")
    try:
        await state.version()
        modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
        assert modes == {0o600}
    finally:
        await state.close()
    assert [file.name for file in tmp_path.iterdir()] == ["state.db"], "nothing is left beside it"


async def test_the_database_is_set_up_for_many_readers(sqlite_file: Path) -> None:
    state = await open_state(f"sqlite:///{sqlite_file}")
    await state.close()
    with sqlite3.connect(sqlite_file) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


async def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match=f"make the folder {tmp_path / 'none'}"):
        await open_state(f"sqlite:///{tmp_path / 'none' / 'state.db'}")


async def test_a_folder_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="cannot be opened: Is a directory"):
        await open_state(f"sqlite:///{tmp_path}")


async def test_another_file_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    text = "these are my notes, not a database\n" * 100
    path.write_text(text)
    with pytest.raises(StorageFailed, match="not a database of cloudlm"):
        await open_state(f"sqlite:///{path}")
    assert path.read_text() == text


async def test_an_unreachable_server_keeps_the_password_to_itself() -> None:
    pytest.importorskip("psycopg")
    url = f"postgresql://admin:{PASSWORD}@127.0.0.1:1/facts"
    with pytest.raises(Unavailable, match=r"'facts' at 127\.0\.0\.1:1") as caught:
        await open_state(url, busy_timeout_s=0.5)
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


async def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudlm.state.database.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'cloudlm\[postgres\]'"):
        await open_state("postgresql+psycopg://db/x")


def test_an_open_of_an_up_to_date_file_imports_no_alembic(sqlite_file: Path) -> None:
    script = """
        import asyncio, sys
        from cloudlm.state.open import open_state
        assert "sqlalchemy" not in sys.modules

        async def main():
            state = await open_state(sys.argv[1])
            await state.version()
            await state.close()

        asyncio.run(main())
        assert "sqlalchemy" in sys.modules
        assert "alembic" not in sys.modules
        assert "psycopg" not in sys.modules
    """
    url = f"sqlite:///{sqlite_file}"
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), url]
    subprocess.run(command, check=True, timeout=60)


def test_the_known_head_is_alembics() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_heads() == [migrations.HEAD]


async def test_every_refusal_is_ours(tmp_path: Path) -> None:
    for url in ("sqlite:////proc/none/x.db", f"sqlite:///{tmp_path}/\0", "sqlite:///" + "x" * 300):
        with pytest.raises(CloudlmError):
            await open_state(url)


async def test_who_comes_alone_always_gets_the_same_connection(tmp_path: Path) -> None:
    """Each connection caches pages of its own: taken in turns, all of them would fill."""
    database = await Database.open(f"sqlite:///{tmp_path / 'state.db'}", busy_timeout_s=60.0)
    used: list[int] = []

    @event.listens_for(database._engine.sync_engine, "checkout")
    def checked_out(connection: object, _record: object, _proxy: object) -> None:
        used.append(id(connection))

    one = sa.select(sa.literal(1))
    try:
        together = [asyncio.create_task(database.read(one)) for _ in range(8)]
        await asyncio.gather(*together)
        assert len(set(used)) > 1
        used.clear()
        for _ in range(12):
            await database.read(one)
        assert len(used) == 12
        assert len(set(used)) == 1
        (cached,) = (await database.read(sa.text("PRAGMA cache_size")))[0]  # type: ignore[arg-type]
        assert cached == -512  # KiB: with four connections no more than two megabytes
    finally:
        await database.close()
