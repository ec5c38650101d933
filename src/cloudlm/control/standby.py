"""What a control does with its own machine while another leads. Replicas that only this machine's
driver knows serve nobody any more, since the leader cannot see them: they end their requests, and
are stopped.

Touches drivers with the ability ONLY_HERE alone: what lives on a cluster is the leader's. One
control lives per home (a lock that a paused process keeps), so that nobody else orders them.
"""

from __future__ import annotations

from collections.abc import Mapping

from cloudlm.control.drain import Drains
from cloudlm.control.drivers import DEFAULT, Drivers
from cloudlm.control.observe import Observer, SeenGroup
from cloudlm.control.orders import refusal_of
from cloudlm.core.clock import Clock
from cloudlm.core.errors import CloudlmError
from cloudlm.core.lease import Lease
from cloudlm.drivers.base import Ability
from cloudlm.state.base import State
from cloudlm.telemetry.logs import get_logger

NOT_KNOWN: Mapping[str, int] = {}
"""Of no replica is it known whether requests are at it."""
_log = get_logger(__name__)


class Standby:
    """Clears this machine. ``step`` until nothing is left; ``forget`` when nobody leads."""

    def __init__(
        self,
        state: State,
        drivers: Drivers,
        observer: Observer,
        clock: Clock,
        drain_timeout_s: float,
    ) -> None:
        self._state = state
        self._drivers = drivers
        self._observer = observer
        self._clock = clock
        self._drain_timeout_s = drain_timeout_s
        self.forget()

    def forget(self) -> None:
        """What runs may be this control's again."""
        self._given_up = Drains(self._drain_timeout_s)
        self._withdrawn = Drains(self._drain_timeout_s)

    async def step(self, leader: Lease) -> None:
        """One look, in the time of ``leader``. A group goes once its leader has withdrawn all of
        its endpoints and no request is at it any more, or after the time limit. Raises Superseded.
        """
        self._drivers.fence(leader.token)
        seen = await self._observer.look((DEFAULT,))
        addressed = await self._addressed()
        now = self._clock.monotonic()
        for group in seen.groups:
            driver = self._drivers.get(group.driver)
            if Ability.ONLY_HERE not in driver.abilities:
                continue
            found = group.observation.replicas
            replicas = [one.id for one in found]
            quiet = [one.id for one in found if addressed is not None and one.url not in addressed]
            self._given_up.note(replicas, replicas, replicas, now)
            self._withdrawn.note(replicas, quiet, replicas, now)
            nobody_sends = self._withdrawn.done(replicas, seen.busy, now)
            if nobody_sends or self._given_up.done(replicas, NOT_KNOWN, now):
                await self._delete(group, leader)

    async def _addressed(self) -> frozenset[str] | None:
        """Where gateways may be sending; None while the state cannot say. By address, for the
        leader's replicas have the same names."""
        try:
            return frozenset(one.url for one in await self._state.list_endpoints())
        except CloudlmError as error:
            _log.warning("endpoints_not_seen", extra={"fields": {"reason": error.message}})
            return None

    async def _delete(self, group: SeenGroup, leader: Lease) -> None:
        name = group.observation.name
        fields = {"group": name, "leader": leader.holder, "token": leader.token}
        _log.info("group_given_up", extra={"fields": fields})
        self._observer.expect(group.driver, name, ())
        reason = await refusal_of(self._drivers.get(group.driver).delete(name), group.driver)
        if reason:
            _log.warning("group_stays", extra={"fields": {"group": name, "reason": reason}})
