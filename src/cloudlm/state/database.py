"""A connection pool with our rules: one transaction per write, waiting for other writers, errors
translated. It knows no table but the version row, and no fact."""

from __future__ import annotations

import asyncio
import copy
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from cloudlm.core.errors import BadSetting, MissingExtra, StorageFailed
from cloudlm.state.faults import Fault, cause_to_show, fault_of, translated
from cloudlm.state.migrate import migrate, stored_revision
from cloudlm.state.migrations import HEAD
from cloudlm.state.tables import state_version

T = TypeVar("T")
Work = Callable[[AsyncConnection], Awaitable[T]]

_WRITES = "cloudlm_writes"
_RETRY_PAUSE_S = 0.02
_CONNECT_TIMEOUT_S = 5
_POOL_SIZE = 4
_MIGRATION_PATIENCE_S = 300.0


class Database:
    """SQLite or PostgreSQL, open and with the right tables. Belongs to one event loop."""

    def __init__(self, engine: AsyncEngine, place: str, busy_timeout_s: float) -> None:
        self._engine = engine
        self._place = place
        self._busy_timeout_s = busy_timeout_s
        self._sqlite = engine.dialect.name == "sqlite"
        # Only single statements are read, so PostgreSQL need not open a transaction for them.
        self._reader = (
            engine if self._sqlite else engine.execution_options(isolation_level="AUTOCOMMIT")
        )
        # SQLite lets one connection write; our own tasks queue here, fairly and without polling.
        self._writer = asyncio.Lock() if self._sqlite else None
        self._look: Work[None] | None = None

    @classmethod
    async def open(cls, address: str, *, busy_timeout_s: float) -> Database:
        """See ``open.open_state``."""
        url = _parse(address)
        if url.drivername.startswith("sqlite"):
            path = _prepare_file(url)
            engine, place = _sqlite_engine(path, busy_timeout_s), str(path)
        else:
            engine, place = _postgresql_engine(url, busy_timeout_s), _place_of(url)
        database = cls(engine, place, busy_timeout_s)
        try:
            await database._bring_up_to_date()
        except BaseException:
            await database.close()
            raise
        return database

    def looking_first(self, look: Work[None]) -> Database:
        """The same connections, where every write does ``look`` first, in its transaction."""
        made = copy.copy(self)
        made._look = look
        return made

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return self._engine.dialect.name

    async def read(
        self, statement: sa.Select[Any] | sa.CompoundSelect[Any]
    ) -> Sequence[sa.Row[Any]]:
        """All rows of one statement."""

        async def attempt() -> Sequence[sa.Row[Any]]:
            async with self._reader.connect() as connection:
                rows: Sequence[sa.Row[Any]] = (await connection.execute(statement)).all()
                return rows

        return await self._until_free(attempt)

    async def write(
        self, work: Work[T], *, alone: bool = True, patience_s: float | None = None
    ) -> T:
        """Run ``work`` in one transaction that sees every write before it.

        ``alone`` keeps other such writers out from the first statement on. ``work`` may run more
        than once: it must do nothing but read and write through its connection. ``patience_s``
        replaces the busy timeout.
        """

        async def attempt() -> T:
            async with self._engine.connect() as connection:
                await connection.execution_options(**{_WRITES: True})
                async with connection.begin():
                    if alone and not self._sqlite:
                        await connection.execute(sa.select(state_version).with_for_update())
                    if self._look is not None:
                        await self._look(connection)
                    return await work(connection)

        if self._writer is None:
            return await self._until_free(attempt, patience_s)
        async with self._writer:
            return await self._until_free(attempt, patience_s)

    async def close(self) -> None:
        await self._engine.dispose()

    async def _until_free(
        self, attempt: Callable[[], Awaitable[T]], patience_s: float | None = None
    ) -> T:
        """Run ``attempt``, again while others hold a lock, for the busy timeout at most."""
        if patience_s is None:
            patience_s = self._busy_timeout_s
        deadline = time.monotonic() + patience_s
        while True:
            try:
                # Longer than the database's own time limits: this one is for a server that is
                # silent or a disk that hangs.
                async with asyncio.timeout(2 * patience_s + _CONNECT_TIMEOUT_S):
                    return await attempt()
            except (SQLAlchemyError, OSError) as error:
                if fault_of(error) is not Fault.BUSY or time.monotonic() >= deadline:
                    raise translated(error, self._place) from cause_to_show(error)
            await asyncio.sleep(_RETRY_PAUSE_S)

    async def _bring_up_to_date(self) -> None:
        if self._sqlite:
            await self._until_free(self._use_wal)
        if await self._until_free(self._revision) != HEAD:
            await self.write(
                lambda connection: connection.run_sync(migrate),
                alone=False,
                patience_s=_MIGRATION_PATIENCE_S,
            )

    async def _revision(self) -> str | None:
        async with self._reader.connect() as connection:
            return await connection.run_sync(stored_revision)

    async def _use_wal(self) -> None:
        """Readers then never wait for the writer. The mode stays in the file."""
        async with self._engine.connect() as connection:
            mode = (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar_one()
            if mode != "wal":
                await connection.exec_driver_sql("PRAGMA journal_mode = WAL")


def _parse(address: str) -> sa.URL:
    try:
        url = sa.make_url(address)
    except (ArgumentError, ValueError):
        raise BadSetting(
            "state.url cannot be read as an address (its text is not shown: it may hold a "
            "password); expected sqlite:////folder/state.db or postgresql+psycopg://user@host/db",
            param="state.url",
        ) from None
    drivers = {
        "sqlite": "sqlite+aiosqlite",
        "sqlite+aiosqlite": "sqlite+aiosqlite",
        "postgresql": "postgresql+psycopg",
        "postgres": "postgresql+psycopg",
        "postgresql+psycopg": "postgresql+psycopg",
    }
    if url.drivername not in drivers:
        raise BadSetting(
            f"state.url has the scheme {url.drivername[:40]!r}; expected one of "
            + ", ".join(drivers),
            param="state.url",
        )
    return url.set(drivername=drivers[url.drivername])


def log_of(address: str) -> Path:
    """The file that SQLite writes every change into first, while the state is open."""
    return Path(f"{_file_of(_parse(address))}-wal")


def _file_of(url: sa.URL) -> Path:
    return Path(url.database or "").expanduser().absolute()


def _prepare_file(url: sa.URL) -> Path:
    """Make the file, readable by its owner only, if it is not there. Raises StorageFailed."""
    if not url.database or url.database == ":memory:" or url.query or url.host:
        raise BadSetting(
            "state.url must name a file (sqlite:////folder/state.db), without options; use "
            "memory:// for a state that is not kept",
            param="state.url",
        )
    path = _file_of(url)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except OSError as error:
        remedy = (
            f"make the folder {path.parent}"
            if isinstance(error, FileNotFoundError)
            else "check the owner and the permissions, or set state.url to another file"
        )
        raise StorageFailed(
            f"the state database {path} cannot be opened: {error.strerror}; {remedy}"
        ) from error
    except ValueError:  # a NUL in the path
        raise BadSetting(
            "state.url holds a character that no path has", param="state.url"
        ) from None
    return path


def _sqlite_engine(path: Path, busy_timeout_s: float) -> AsyncEngine:
    engine = create_async_engine(
        sa.URL.create("sqlite+aiosqlite", database=str(path)),
        hide_parameters=True,
        pool_size=_POOL_SIZE,
        max_overflow=0,
        # The one that was used last: each connection caches pages of its own, and in turns all of
        # them would fill, for nothing.
        pool_use_lifo=True,
        pool_timeout=busy_timeout_s,
        connect_args={"timeout": busy_timeout_s},
    )

    @event.listens_for(engine.sync_engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # 'begun' alone decides when a transaction starts
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA synchronous = NORMAL")
        # What is read again and again (the upper pages of indexes) fits, the system caches the
        # rest, and a process that lives for long grows by no more.
        cursor.execute("PRAGMA cache_size = -512")  # KiB for each connection; its own: 2,000
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begun(connection: sa.Connection) -> None:
        # A writer takes the lock at once: a transaction that reads first could not wait for it.
        if connection.get_execution_options().get(_WRITES):
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _postgresql_engine(url: sa.URL, busy_timeout_s: float) -> AsyncEngine:
    if find_spec("psycopg") is None:
        raise MissingExtra("postgres", "a PostgreSQL state")
    busy_ms = max(1, int(busy_timeout_s * 1000))
    limits = {
        "lock_timeout": busy_ms,
        "statement_timeout": 2 * busy_ms,
        "idle_in_transaction_session_timeout": 4 * busy_ms,
    }
    ours = {
        "application_name": "cloudlm",
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "tcp_user_timeout": 2 * busy_ms,
        "options": " ".join(f"-c {name}={value}" for name, value in limits.items()),
    }
    return create_async_engine(
        url,
        hide_parameters=True,
        pool_size=_POOL_SIZE,
        max_overflow=_POOL_SIZE,
        pool_timeout=busy_timeout_s,
        pool_pre_ping=True,  # a server that was restarted costs no request
        connect_args={name: value for name, value in ours.items() if name not in url.query},
    )


def _place_of(url: sa.URL) -> str:
    """Host, port and database: what may be shown of an address."""
    host = url.host or url.query.get("host") or "localhost"
    shown = host if isinstance(host, str) else ", ".join(host)
    return f"{url.database or 'postgres'!r} at {shown}:{url.port or url.query.get('port', 5432)}"
