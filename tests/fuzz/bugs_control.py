"""Planted bugs in control, as ``bugs`` has them for the gateway: each must be caught in runs in
which control takes part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.fuzz.planting import Bug, both, instead, nothing, nothing_async

from cloudlm.control import leading, observe, plan, probe
from cloudlm.control.autoscale.facts import TotalDemand
from cloudlm.control.blackout import Doubt
from cloudlm.control.drain import Drains
from cloudlm.control.handover import life_of
from cloudlm.control.observe import Observer
from cloudlm.control.orders import Orders
from cloudlm.control.plan import Plan
from cloudlm.control.published import Published
from cloudlm.control.reconcile import Reconciler
from cloudlm.control.room import Room
from cloudlm.control.versions import FixedVersions
from cloudlm.core.deployment import Deployment
from cloudlm.drivers import fence
from cloudlm.state import leases
from cloudlm.state.memory import MemoryState


def _oldest_goes_first(shrink: Any) -> Any:
    def shrunk(old: Any, current: Any, staying: int, ready: Any, floor: int) -> Any:
        return shrink(old, current, staying, {r.id for g in old for r in g.replicas}, -99)

    return shrunk


def _never_done(_: Any) -> Any:
    return lambda self, replicas, busy, now, *, patient=False: not replicas


def _told_late(withdraw: Any) -> Any:
    async def withdrawn(
        self: Reconciler, name: str, groups: Any, step: Plan, seen: Any, **named: Any
    ) -> None:
        await withdraw(self, name, groups, Plan(), seen, **named)
        there = {r.id for g in groups for r in g.observation.replicas}
        self._orders.drains.note(there, step.leaving, (), self._clock.monotonic())

    return withdrawn


def _whoever_deletes(remove: Any) -> Any:
    async def removed(self: MemoryState, name: str, *, generation: int) -> bool:
        current = self._deployments.get(name)
        if current is not None:
            self._deployments[name] = replace(current, deleting=True)
            generation = current.generation
        return bool(await remove(self, name, generation=generation))

    return removed


def _nobody_before_us(recall: Any) -> Any:
    async def recalled(self: Reconciler, deployments: Any) -> None:
        self._published.endpoints = self._published.endpoints or {}
        await recall(self, deployments)

    return recalled


def _what_it_means_now(_: Any) -> Any:
    async def version(self: FixedVersions, deployment: Deployment, groups: Any) -> Any:
        return await self._fixed(deployment.spec.model), {}

    return version


def _taken_for_all(put: Any) -> Any:
    """The endpoints are taken for written though the write failed."""

    async def written(self: Published, model: str, endpoints: Any) -> None:
        assert self.endpoints is not None
        before = self.endpoints.get(model, ())
        self.endpoints[model] = endpoints
        if before != endpoints:
            await self._state.put_endpoints(model, endpoints)

    return written


def _never_renewed(beat: Any) -> Any:
    async def beaten(self: Any) -> None:
        if self.term is None or self.term.over.is_set():
            await beat(self)

    return beaten


def _unfenced(_: Any) -> Any:
    return lambda self, lease: self


def _asked_once(_: Any) -> Any:
    async def probed(self: Observer, replica: Any) -> None:
        record = self._record(replica) or probe.ProbeRecord(progress_at=self._clock.monotonic())
        self._records[replica.id] = (life_of(replica), await self._asked(replica.url, record))

    return probed


def _as_if_there_were_room(_: Any) -> Any:
    return lambda self, step: step


def _one_too_many(grow: Any) -> Any:
    def grown(target: Any, *arguments: Any) -> Any:
        return grow(replace(target, replicas=target.replicas + 1), *arguments)

    return grown


def _all_that_is_listed(_: Any) -> Any:
    return lambda group: frozenset(one.id for one in group.replicas)


CONTROL_BUGS: Mapping[str, Bug] = {
    "drivers take every token": nothing(fence, "check_token"),
    "an overtaken control still writes": nothing(leases, "check_held"),
    "the state of a term is not fenced": instead(MemoryState, "fenced", _unfenced),
    "the lease is taken from who lives": nothing(leading, "may_take", True),
    "the lease is never renewed": instead(leading.Leadership, "beat", _never_renewed),
    "stopped before it is drained": nothing(Drains, "done", True),
    "drained replicas are never stopped": instead(Drains, "done", _never_done),
    "the endpoint stays until the end": instead(Reconciler, "_write_endpoints", _told_late),
    "old replicas go before new ones come": instead(plan, "_shrink", _oldest_goes_first),
    "one replica too many": instead(plan, "_grow", _one_too_many),
    "orphans are left": nothing_async(Reconciler, "_remove_orphans"),
    "what stands still is left": nothing_async(Orders, "stop_stalled"),
    "endpoints of the control before us": instead(Reconciler, "_recall", _nobody_before_us),
    "a lost endpoint counts as written": instead(Published, "_put_endpoints", _taken_for_all),
    "an alias changes what runs": instead(FixedVersions, "of", _what_it_means_now),
    "asked for again and yet deleted": instead(MemoryState, "remove_deployment", _whoever_deletes),
    "nobody is heard who waits": instead(
        TotalDemand, "busy", lambda _: property(lambda self: False)
    ),
    "an empty list is believed": nothing(Doubt, "holds", False),
    "what control ended is missed": instead(observe, "staying", _all_that_is_listed),
    "the memory budget is not kept to": instead(Room, "fit", _as_if_there_were_room),
    "one missed probe takes the endpoint": both(
        instead(probe, "UNREACHABLE_AFTER", lambda _: 1),
        instead(Observer, "_probe_one", _asked_once),
    ),
}
