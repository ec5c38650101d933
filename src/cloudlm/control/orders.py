"""What control has drivers do: the actions of a plan, once nobody can be sending to what they stop,
and the end of replicas that stand still.

Remembers which replicas leave and which lives were ended. Must not decide what is to be done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from cloudlm.control.drain import Drains
from cloudlm.control.drivers import Drivers
from cloudlm.control.metrics import ControlMetrics
from cloudlm.control.observe import DRIVER_TIMEOUT_S, Observer, Seen, SeenGroup
from cloudlm.control.plan import Action, Apply, Plan
from cloudlm.core.clock import Clock
from cloudlm.core.errors import CloudlmError, Superseded
from cloudlm.drivers.base import Ability
from cloudlm.drivers.groups import replica_ids
from cloudlm.telemetry.logs import get_logger

NO_HOMES: Mapping[str, str] = {}
_log = get_logger(__name__)


class Orders:
    """The way to all drivers. ``observer`` is told what it need not miss."""

    def __init__(
        self,
        drivers: Drivers,
        observer: Observer,
        clock: Clock,
        metrics: ControlMetrics,
        drain_timeout_s: float,
    ) -> None:
        self._drivers = drivers
        self._observer = observer
        self._clock = clock
        self._metrics = metrics
        self.drains = Drains(drain_timeout_s)
        self._stopped_stalled: dict[str, object] = {}

    async def act(
        self,
        step: Plan,
        driver: str,
        groups: Sequence[SeenGroup],
        seen: Seen,
        homes: Mapping[str, str] = NO_HOMES,
        patient: bool = False,
    ) -> str:
        """Carry out what may be done now; returns why the driver refused, if it did. Groups that
        are not there yet begin at ``driver``, unless ``homes`` says where. Raises Superseded."""
        drivers = {**homes, **{group.observation.name: group.driver for group in groups}}
        problem = ""
        for action in step.actions:
            name = action.spec.name if isinstance(action, Apply) else action.name
            now = self._clock.monotonic()
            if not self.drains.done(action.leaving, seen.busy, now, patient=patient):
                continue
            try:
                await self._carry_out(action, drivers.get(name, driver))
            except Superseded:
                raise
            except CloudlmError as error:
                problem = error.message
            except TimeoutError:
                problem = f"driver {drivers.get(name, driver)!r} did not answer"
        return problem

    async def _carry_out(self, action: Action, driver: str) -> None:
        group = action.spec.name if isinstance(action, Apply) else action.name
        left = replica_ids(action.spec) if isinstance(action, Apply) else ()
        self._observer.expect(driver, group, left)
        async with asyncio.timeout(DRIVER_TIMEOUT_S):
            if isinstance(action, Apply):
                await self._drivers.get(driver).apply(action.spec)
            else:
                await self._drivers.get(driver).delete(action.name)

    async def stop_stalled(self, seen: Seen) -> None:
        """Have replicas that stand still started anew, once per life. Raises Superseded."""
        lives: Mapping[str, object] = {
            replica.id: (replica.pid, replica.restarts)
            for group in seen.groups
            for replica in group.observation.replicas
        }
        for group in seen.groups:
            driver = self._drivers.get(group.driver)
            for replica in group.observation.replicas:
                known = self._stopped_stalled.get(replica.id) == lives[replica.id]
                if replica.id not in seen.stalled or known:
                    continue
                if Ability.STOPS_ONE_REPLICA not in driver.abilities:
                    continue
                fields = {"replica": replica.id, "deployment": group.deployment}
                _log.warning("replica_stalled", extra={"fields": fields})
                self._metrics.stalled()
                try:
                    await driver.stop_replica(group.observation.name, replica.id)
                    self._stopped_stalled[replica.id] = lives[replica.id]
                except Superseded:
                    raise
                except CloudlmError as error:
                    fields["reason"] = error.message
                    _log.warning("replica_not_stopped", extra={"fields": fields})
        for one in [one for one in self._stopped_stalled if one not in seen.existing]:
            del self._stopped_stalled[one]
