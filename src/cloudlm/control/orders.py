"""What control has drivers do: the actions of a plan, once nobody can be sending to what they stop,
and the end of replicas that stand still.

Remembers which replicas leave and which lives were ended. Must not decide what is to be done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator, Mapping, Sequence

from cloudlm.control.drain import Drains
from cloudlm.control.drivers import Drivers
from cloudlm.control.handover import Life, life_of
from cloudlm.control.metrics import ControlMetrics
from cloudlm.control.observe import DRIVER_TIMEOUT_S, Observer, Seen, SeenGroup
from cloudlm.control.plan import Action, Apply, Plan
from cloudlm.core.clock import Clock
from cloudlm.core.deployment import Replica
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
        self._stopped_stalled: dict[str, Life] = {}

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
            home = drivers.get(name, driver)
            problem = await refusal_of(self._carry_out(action, home), home) or problem
        return problem

    async def _carry_out(self, action: Action, driver: str) -> None:
        group = action.spec.name if isinstance(action, Apply) else action.name
        left = replica_ids(action.spec) if isinstance(action, Apply) else ()
        self._observer.expect(driver, group, left)
        if isinstance(action, Apply):
            await self._drivers.get(driver).apply(action.spec)
        else:
            await self._drivers.get(driver).delete(action.name)

    async def stop_stalled(self, seen: Seen) -> None:
        """Have replicas that stand still started anew, once per life. One that cannot be stopped
        hinders nobody; it is tried again. Raises Superseded."""
        found = list(self._stalled(seen))
        orders = [self._stop(group, replica) for group, replica in found]
        for ended in await asyncio.gather(*orders, return_exceptions=True):
            if ended is not None:
                raise ended
        for one in [one for one in self._stopped_stalled if one not in seen.existing]:
            del self._stopped_stalled[one]

    def _stalled(self, seen: Seen) -> Iterator[tuple[SeenGroup, Replica]]:
        """Those that are to be stopped, of drivers that can stop one."""
        for group in seen.groups:
            abilities = self._drivers.get(group.driver).abilities
            for replica in group.observation.replicas:
                known = self._stopped_stalled.get(replica.id) == life_of(replica)
                stalled = replica.id in seen.stalled and not known
                if stalled and Ability.STOPS_ONE_REPLICA in abilities:
                    yield group, replica

    async def _stop(self, group: SeenGroup, replica: Replica) -> None:
        fields = {"replica": replica.id, "deployment": group.deployment}
        _log.warning("replica_stalled", extra={"fields": fields})
        self._metrics.stalled()
        order = self._drivers.get(group.driver).stop_replica(group.observation.name, replica.id)
        reason = await refusal_of(order, group.driver)
        if reason:
            _log.warning("replica_not_stopped", extra={"fields": fields | {"reason": reason}})
        else:
            self._stopped_stalled[replica.id] = life_of(replica)


async def refusal_of(order: Awaitable[None], driver: str) -> str:
    """Wait for what a driver was told to do, but not for ever. Returns why it is not done, empty if
    it is; whatever a stranger's driver raises is such a reason. Raises Superseded."""
    try:
        async with asyncio.timeout(DRIVER_TIMEOUT_S):
            await order
    except Superseded:
        raise
    except CloudlmError as error:
        return error.message
    except TimeoutError:
        return f"driver {driver!r} did not answer"
    except Exception:
        _log.exception("order_failed", extra={"fields": {"driver": driver}})
        return f"driver {driver!r} failed; see control's log"
    return ""
