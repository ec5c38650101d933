"""What a control does while it leads, and what while it does not.

A term has a reconciler of its own, as if control had just started: what the loop remembers is of no
use after another has led. Its writes are fenced by the state, its orders looked at before they go
to a driver. A control that does not lead clears its own machine (``standby``).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from cloudlm.control.drivers import Drivers
from cloudlm.control.jobs import Jobs
from cloudlm.control.leading import Leadership, Term
from cloudlm.control.reconcile import Reconciler
from cloudlm.control.standby import Standby
from cloudlm.core.deployment import GroupObservation, GroupSpec
from cloudlm.core.errors import CloudlmError
from cloudlm.drivers.base import Driver
from cloudlm.state.base import State
from cloudlm.telemetry.logs import get_logger

MakeReconciler = Callable[[State, Drivers], Reconciler]
_log = get_logger(__name__)


class Terms:
    """The loop of a control among several, as the API knows it."""

    def __init__(
        self,
        leadership: Leadership,
        drivers: Drivers,
        jobs: Jobs,
        standby: Standby,
        interval_s: float,
        make: MakeReconciler,
    ) -> None:
        self._leadership = leadership
        self._drivers = drivers
        self._jobs = jobs
        self._standby = standby
        self._interval_s = interval_s
        self._make = make
        self._reconciler: Reconciler | None = None

    @property
    def has_looked(self) -> bool:
        """Whether what an earlier control wrote is corrected, or another sees to that."""
        if self._reconciler is not None:
            return self._reconciler.has_looked
        return self._leadership.another_leads

    def nudge(self) -> None:
        """Something was asked. A leader elsewhere sees it in its next pass."""
        if self._reconciler is not None:
            self._reconciler.nudge()

    def models_in_use(self) -> frozenset[str]:
        """The versions that groups run, as of this control's last pass; none if it leads not."""
        return frozenset() if self._reconciler is None else self._reconciler.models_in_use()

    async def run(self) -> None:
        """Lead and follow until cancelled."""
        while True:
            term = self._leadership.term
            if term is None or term.over.is_set():
                await self._follow()
            else:
                await self._lead(term)

    def begin(self, term: Term) -> Reconciler:
        """The reconciler of a term."""
        self._drivers.fence(term.lease.token)
        return self._make(term.state, CheckedDrivers(self._drivers, term.check))

    async def _lead(self, term: Term) -> None:
        self._reconciler = self.begin(term)
        work = [
            asyncio.create_task(self._reconciler.run()),
            asyncio.create_task(self._jobs.lead(term.state)),
            asyncio.create_task(term.over.wait()),
        ]
        try:
            await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        finally:
            term.over.set()
            for task in work:
                task.cancel()
            reconciler, self._reconciler = self._reconciler, None
            # Not one by one with their cancelling suppressed: that would swallow our own.
            await asyncio.gather(*work, return_exceptions=True)
            await reconciler.close()

    async def _follow(self) -> None:
        leader = self._leadership.leader
        if leader is not None and self._leadership.another_leads:
            try:
                await self._standby.step(leader)
            except CloudlmError as error:
                _log.warning("standby_failed", extra={"fields": {"reason": error.message}})
            except Exception:
                _log.exception("standby_failed")
        else:
            self._standby.forget()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._interval_s):
                await self._leadership.changed()


class CheckedDrivers(Drivers):
    """The drivers of a term: ``check`` is asked before each order, and nothing before a look."""

    def __init__(self, drivers: Drivers, check: Callable[[], Awaitable[None]]) -> None:
        self._drivers = drivers
        self._check = check

    def get(self, name: str) -> Driver:
        return CheckedDriver(self._drivers.get(name), self._check)

    def in_use(self) -> dict[str, Driver]:
        found = self._drivers.in_use()
        return {name: CheckedDriver(driver, self._check) for name, driver in found.items()}


class CheckedDriver:
    """A driver whose orders are looked at first."""

    def __init__(self, driver: Driver, check: Callable[[], Awaitable[None]]) -> None:
        self._driver = driver
        self._check = check
        self.name = driver.name
        self.abilities = driver.abilities

    async def groups(self) -> list[str]:
        return await self._driver.groups()

    async def observe(self, name: str) -> GroupObservation:
        return await self._driver.observe(name)

    async def apply(self, spec: GroupSpec) -> None:
        await self._check()
        await self._driver.apply(spec)

    async def stop_replica(self, name: str, replica: str) -> None:
        await self._check()
        await self._driver.stop_replica(name, replica)

    async def delete(self, name: str) -> None:
        await self._check()
        await self._driver.delete(name)

    def logs(
        self, name: str, *, replica: str | None = None, tail: int = 100, follow: bool = False
    ) -> AsyncIterator[str]:
        return self._driver.logs(name, replica=replica, tail=tail, follow=follow)

    def fence(self, token: int) -> None:
        self._driver.fence(token)

    async def close(self) -> None:
        await self._driver.close()
