"""Accounting: one row per attempt, first into the journal, then in batches into the state.

``add`` never waits and never fails a request. Rows reach the state within a fraction of a second;
while the state is away they wait in the journal, and in memory (bounded) if the disk is full too.
Attempts that still run are noted in the journal once a second, so that even one whose gateway is
killed leaves its row, at most a second of tokens short. Must not decide what a row says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from cloudlm.core.clock import Clock
from cloudlm.core.errors import CloudlmError
from cloudlm.core.tenant import LedgerRow
from cloudlm.gateway.journal import Journal
from cloudlm.state.base import State
from cloudlm.telemetry.logs import get_logger

FLUSH_INTERVAL_S = 0.2
RETRY_INTERVAL_S = 1.0
WRITE_TIMEOUT_S = 5.0
MAX_ROWS_IN_MEMORY = 10_000
NOTE_INTERVAL_S = 1.0
# Every step of a write waits for its turn beside requests: the fewer the better. What takes too
# long is halved until all of it is written.
_MOST_ROWS, _LEAST_ROWS = 4096, 128
_LARGE_SEGMENT_BYTES = 1024 * 1024

_log = get_logger(__name__)


class OpenAttempt(Protocol):
    """An attempt that has not ended."""

    @property
    def id(self) -> str:
        """The id of its row."""
        ...

    def row_so_far(self) -> LedgerRow:
        """The row it would leave if the gateway died now."""
        ...


class Ledger:
    """The rows of this gateway on their way to the state."""

    def __init__(self, journal: Journal, state: State, clock: Clock) -> None:
        self._journal = journal
        self._state = state
        self._clock = clock
        self._fresh: list[LedgerRow] = []  # not in the state; in the journal as well
        self._memory_only: list[LedgerRow] = []  # the disk did not take them
        self._open: dict[str, OpenAttempt] = {}
        self._noted_at = clock.monotonic()
        self._batch_rows = _MOST_ROWS
        self._behind = False  # rows in the journal that are not in _fresh
        self.rows_dropped = 0
        self.on_row: list[Callable[[LedgerRow], None]] = []

    @property
    def rows_in_memory(self) -> int:
        """Rows that are not in the state yet, those that wait on disk alone excluded."""
        return len(self._fresh) + len(self._memory_only)

    def open(self) -> None:
        """Open the journal and find what an earlier process left. Raises StorageFailed."""
        self._journal.open()
        self._behind = bool(self._journal.waiting)

    def begin(self, attempt: OpenAttempt) -> None:
        """Note that an attempt begins; ``add`` with its id ends it."""
        self._open[attempt.id] = attempt
        self._journal.append(attempt.row_so_far(), is_open=True)

    def add(self, row: LedgerRow) -> None:
        """Account for one attempt that has ended."""
        self._open.pop(row.id, None)
        for told in self.on_row:
            told(row)
        if self._journal.append(row):
            if not self._behind:
                self._fresh.append(row)
        elif len(self._memory_only) < MAX_ROWS_IN_MEMORY:
            self._memory_only.append(row)
        else:
            self.rows_dropped += 1
            if self.rows_dropped == 1:
                _log.error("ledger_row_dropped", extra={"fields": {"row": row.id}})

    async def run(self) -> None:
        """Flush until cancelled."""
        while True:
            try:
                done = await self.flush()
            except Exception:
                _log.exception("ledger_flush_failed")
                done = False
            await self._clock.sleep(FLUSH_INTERVAL_S if done else RETRY_INTERVAL_S)

    async def flush(self) -> bool:
        """Bring all rows into the state; False if it is away (they are kept)."""
        if self._open and self._clock.monotonic() - self._noted_at >= NOTE_INTERVAL_S:
            self._note_open()
        if self._behind:
            await asyncio.to_thread(self._journal.sync)
            return await self._replay()
        fresh, self._fresh = self._fresh, []
        memory_only, self._memory_only = self._memory_only, []
        if not fresh and not memory_only and self._journal.active_bytes < _LARGE_SEGMENT_BYTES:
            return True
        self._seal()
        segments = self._journal.waiting
        try:
            await self._write(fresh)
            await self._write(memory_only)
        except BaseException as error:
            self._memory_only = memory_only + self._memory_only
            self._fresh.clear()  # all of them are in the journal and will be read from there
            self._behind = True
            if not isinstance(error, CloudlmError | OSError):
                raise
            _log.warning("ledger_waits_for_state", extra={"fields": {"reason": repr(error)}})
            return False
        self._journal.forget(segments)
        return True

    async def _replay(self) -> bool:
        """Read the journal back into the state, oldest segment first."""
        memory_only, self._memory_only = self._memory_only, []
        try:
            await self._write(memory_only)
            memory_only = []
            while self._sealed():
                segment = self._journal.waiting[0]
                await self._write(await asyncio.to_thread(self._journal.read, segment))
                self._journal.forget([segment])
        except (CloudlmError, OSError):
            return False
        finally:
            self._memory_only = memory_only + self._memory_only
        self._behind = False
        _log.info("ledger_caught_up")
        return True

    def _sealed(self) -> bool:
        """Whether a sealed segment waits; seals the current one only when no other does, so that
        a long absence of the state makes no flood of little files."""
        if not self._journal.waiting and self._journal.active_rows:
            self._seal()
        return bool(self._journal.waiting)

    def _seal(self) -> None:
        """Begin a new segment; open attempts stand in it, for the old one will be removed."""
        self._journal.seal()
        self._note_open()

    def _note_open(self) -> None:
        self._noted_at = self._clock.monotonic()
        for attempt in self._open.values():
            self._journal.append(attempt.row_so_far(), is_open=True)

    async def _write(self, rows: list[LedgerRow]) -> None:
        begin = 0
        while begin < len(rows):
            batch = rows[begin : begin + self._batch_rows]
            try:
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await self._state.append_ledger(batch)
            except TimeoutError:
                self._batch_rows = max(self._batch_rows // 2, _LEAST_ROWS)
                raise
            begin += len(batch)
        if len(rows) >= self._batch_rows:
            self._batch_rows = min(self._batch_rows * 2, _MOST_ROWS)

    async def close(self) -> None:
        """Flush a last time and leave what could not be written to the next start."""
        try:
            while await self.flush() and self.rows_in_memory:
                pass
        finally:
            self._journal.close()


def open_journal(home: Path) -> Journal:
    """The journal of an installation, in ``ledger`` under its home."""
    return Journal(home / "ledger")
