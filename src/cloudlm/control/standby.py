"""What a control does with its own machine while another leads. Replicas that only this machine's
driver knows serve nobody any more, since the leader cannot see them: they end their requests, and
are stopped.

Touches drivers with the ability ONLY_HERE alone: what lives on a cluster is the leader's. One
control lives per home (a lock that a paused process keeps), so that nobody else orders them.
"""

from __future__ import annotations

from cloudlm.control.drain import Drains
from cloudlm.control.drivers import DEFAULT, Drivers
from cloudlm.control.observe import Observer
from cloudlm.core.clock import Clock
from cloudlm.core.lease import Lease
from cloudlm.drivers.base import Ability
from cloudlm.telemetry.logs import get_logger

_log = get_logger(__name__)


class Standby:
    """Clears this machine. ``step`` until nothing is left; ``forget`` when nobody leads."""

    def __init__(
        self, drivers: Drivers, observer: Observer, clock: Clock, drain_timeout_s: float
    ) -> None:
        self._drivers = drivers
        self._observer = observer
        self._clock = clock
        self._drain_timeout_s = drain_timeout_s
        self._drains = Drains(drain_timeout_s)

    def forget(self) -> None:
        """What runs may be this control's again."""
        self._drains = Drains(self._drain_timeout_s)

    async def step(self, leader: Lease) -> None:
        """One look, in the time of ``leader``. Raises the driver's errors."""
        self._drivers.fence(leader.token)
        seen = await self._observer.look((DEFAULT,))
        now = self._clock.monotonic()
        for group in seen.groups:
            driver = self._drivers.get(group.driver)
            if Ability.ONLY_HERE not in driver.abilities:
                continue
            replicas = [one.id for one in group.observation.replicas]
            self._drains.note(replicas, replicas, replicas, now)
            if self._drains.done(replicas, seen.busy, now):
                name = group.observation.name
                fields = {"group": name, "leader": leader.holder, "token": leader.token}
                _log.info("group_given_up", extra={"fields": fields})
                self._observer.expect(group.driver, name, ())
                await driver.delete(name)
