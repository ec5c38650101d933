"""Every call of the journal to the system fails once, in every order of things: no row is doubled,
none that was accepted is lost for good, and the gateway goes on."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from cloudlm.core.clock import ManualClock
from cloudlm.core.errors import StorageFailed, Unavailable
from cloudlm.core.tenant import LedgerRow, Outcome
from cloudlm.gateway import journal as journal_module
from cloudlm.gateway.journal import Journal
from cloudlm.gateway.ledger import Ledger
from cloudlm.state.memory import MemoryState

CALLS = ("open", "write", "close", "fsync", "ftruncate")
PATH_CALLS = ("rename", "unlink", "read_bytes", "mkdir")


class Fault:
    """Counts calls to the system; the one numbered ``at`` fails with ``code``."""

    def __init__(self, at: int, code: int) -> None:
        self.at, self.code, self.count = at, code, 0

    def pass_or_fail(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise OSError(self.code, os.strerror(self.code))


class FaultyOs:
    """``os`` for the journal."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*arguments: Any) -> Any:
            if name == "close":  # closes and then says that it failed, as Linux does
                real(*arguments)
                return self._fault.pass_or_fail()
            self._fault.pass_or_fail()
            return real(*arguments)

        return call


class DistantState(MemoryState):
    """Away when told to be."""

    away = False

    async def append_ledger(self, rows: Any) -> None:
        if self.away:
            raise Unavailable("away")
        await super().append_ledger(rows)


def row(number: int) -> LedgerRow:
    return LedgerRow(
        f"row{number}", "req", 1, "default", "k", "m", "r", Outcome.FINISHED, 200, 1, 2, 0, 1.5, 0.1
    )


async def life(folder: Path, state: DistantState) -> int:
    """A gateway's ledger from start to end, with the state away in the middle; the number of rows
    that were accounted for. A flush that fails is tried again, as in ``Ledger.run``."""
    ledger = Ledger(Journal(folder), state, ManualClock())
    ledger.open()
    count = 0
    for away in (False, True, False):
        state.away = away
        for _ in range(3):
            ledger.add(row(count))
            count += 1
            try:
                await ledger.flush()
            except OSError:
                continue
    for _ in range(3):
        try:
            if await ledger.flush():
                break
        except OSError:
            continue
    await ledger.close()
    assert ledger.rows_dropped == 0
    return count


async def outlived(folder: Path, at: int, code: int, monkeypatch: Any) -> bool:
    """One life with the ``at``-th call failing, and a healthy one after it; False once there are
    fewer calls than that."""
    state, fault = DistantState(), Fault(at, code)
    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "os", FaultyOs(fault))
        for name in PATH_CALLS:
            real = getattr(Path, name)

            def call(self: Path, *given: Any, _real: Any = real, **more: Any) -> Any:
                if self.is_relative_to(folder):
                    fault.pass_or_fail()
                return _real(self, *given, **more)

            patch.setattr(Path, name, call)
        try:
            count = await life(folder, state)
        except (StorageFailed, OSError):
            count = 0  # it did not start, or said at its end what it could not do
    state.away = False
    after = Ledger(Journal(folder), state, ManualClock())
    after.open()
    assert await after.flush()
    await after.close()
    assert after.rows_in_memory == 0
    found = [one.id for one in await state.list_ledger(limit=1000)]
    assert len(found) == len(set(found))
    assert {f"row{n}" for n in range(count)} <= set(found), (at, code)
    assert [path for path in folder.iterdir() if path.suffix == ".jsonl"] == []
    return fault.count >= at


@pytest.mark.promise(41, 3)
@pytest.mark.parametrize("code", [5, 28], ids=["EIO", "ENOSPC"])
def test_a_fault_at_any_call_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    at = 1
    while asyncio.run(outlived(tmp_path / str(at), at, code, monkeypatch)):
        at += 1
    assert at > 30  # all kinds of calls were made
