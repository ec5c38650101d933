"""Who leads: of several controls on one state one acts, the others answer the API and wait.

Holds the lease ``control``, renews it, and takes it when its holder is silent. Must not start, stop
or write anything else: what a leader does is ``terms``'s, and the state refuses a stale one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import socket
from pathlib import Path

from cloudlm.control.metrics import ControlMetrics
from cloudlm.core.clock import Clock
from cloudlm.core.errors import CloudlmError, Conflict, Superseded
from cloudlm.core.lease import Lease, Watch, may_take, watched
from cloudlm.state.base import State
from cloudlm.telemetry.logs import get_logger

LEASE = "control"
BEATS_PER_LEASE = 4
"""Three renewals may fail before another takes over."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_log = get_logger(__name__)


class Term:
    """One stretch of leading. ``state`` refuses its writes once it is over."""

    def __init__(self, lease: Lease, state: State) -> None:
        self.lease = lease
        self.state = state.fenced(lease)
        self.over = asyncio.Event()
        self._asked = state

    async def check(self) -> None:
        """Before an order to a driver, which the state does not see. Raises Superseded if another
        leads by now, or the state's error if that cannot be known: then nothing is ordered."""
        found = await self._asked.get_lease(self.lease.name)
        if not found.same_holding(self.lease):
            self.over.set()
            raise Superseded(
                f"this control led with token {self.lease.token}; now "
                f"{found.holder[:200] or 'nobody'} leads with token {found.token}"
            )


class Leadership:
    """This control's part in the lease. ``term`` is None while it does not lead; ``watch`` is what
    it knows of the lease, None before its first look."""

    def __init__(
        self, state: State, clock: Clock, metrics: ControlMetrics, holder: str, lasts_s: float
    ) -> None:
        self._state = state
        self._clock = clock
        self._metrics = metrics
        self._lasts_s = lasts_s
        self._changed = asyncio.Event()
        self.holder = holder
        self.term: Term | None = None
        self.watch: Watch | None = None

    @property
    def leader(self) -> Lease | None:
        """The lease as this control knows it; None before its first look."""
        if self.term is not None:
            return self.term.lease
        return None if self.watch is None else self.watch.lease

    @property
    def another_leads(self) -> bool:
        """Whether another control was seen alive and leading."""
        return self.term is None and self.watch is not None and self.watch.lives

    async def run(self) -> None:
        """Beat after beat until cancelled."""
        while True:
            try:
                await self.beat()
            except CloudlmError as error:
                _log.warning("lease_not_seen", extra={"fields": {"reason": error.message}})
            except Exception:
                _log.exception("lease_not_seen")
            await self._clock.sleep(self._lasts_s / BEATS_PER_LEASE)

    async def beat(self) -> None:
        """Renew the lease, or take it if that is allowed. Raises the state's errors."""
        if self.term is not None and not self.term.over.is_set():
            try:
                await self._state.renew_lease(self.term.lease)
                return
            except Superseded as error:
                _log.warning("leads_no_longer", extra={"fields": {"reason": error.message}})
        self._leave()
        found = await self._state.get_lease(LEASE)
        now = self._clock.monotonic()
        self.watch = watched(self.watch, found, now)
        if may_take(self.watch, self.holder, now):
            await self._take(found)

    async def give_back(self) -> None:
        """Let another lead at once. Call it when nothing acts any more."""
        term = self.term
        self._leave()
        if term is not None:
            with contextlib.suppress(CloudlmError):  # it runs out by itself
                await self._state.give_back_lease(term.lease)

    async def changed(self) -> None:
        """Return when a term begins or ends."""
        await self._changed.wait()
        self._changed.clear()

    async def _take(self, found: Lease) -> None:
        try:
            lease = await self._state.take_lease(
                LEASE, self.holder, lasts_s=self._lasts_s, replaces=found
            )
        except Conflict:
            return  # another was quicker
        self.term, self.watch = Term(lease, self._state), None
        self._metrics.leads(lease.token)
        self._changed.set()
        _log.info("leads", extra={"fields": {"token": lease.token, "before": found.holder}})

    def _leave(self) -> None:
        if self.term is not None:
            self.term.over.set()
            self.term = None
            self._metrics.leads(0)
            self._changed.set()


def holder_of(home: Path) -> str:
    """A name that every control of this home, on this machine, since its last boot has, and no
    other: the lock of the home lets one of them live, so that it may go on at once where the one
    before it was killed. Copied homes and cloned machines differ."""
    found = home.stat()
    boot = _BOOT_ID.read_text() if _BOOT_ID.exists() else secrets.token_hex(8)
    mark = hashlib.sha256(f"{boot} {found.st_dev} {found.st_ino}".encode()).hexdigest()[:12]
    return f"{socket.gethostname()}:{os.fspath(home)}#{mark}"
