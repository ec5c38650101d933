"""Control in a run: what people ask of it, what befalls it, and whether all is as asked in the end.

``Steering`` stands beside a run's world and drives nothing but orders and faults; what runs is
decided by the production control in ``controls``. Must not judge requests.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tests.fuzz.controls import LEASE_S, SETTINGS, ControlProcess, Registry
from tests.fuzz.fleet import BROKEN_FROM, PROBE_TIMEOUT_S, Fleet
from tests.fuzz.life import Life
from tests.fuzz.schedule import EVERYBODY, Fault, Order, Plane
from tests.fuzz.story import MODEL, NAMES

from cloudlm.control.blackout import FEWEST_SILENT
from cloudlm.control.leading import LEASE
from cloudlm.core.deployment import (
    Deployment,
    DeploymentPhase,
    DeploymentSpec,
    Endpoint,
    GroupSpec,
    Residence,
)
from cloudlm.core.errors import CloudlmError, Unavailable
from cloudlm.core.rollout import Kind, Step, Strategy
from cloudlm.core.scaling import Scaling
from cloudlm.drivers.groups import replica_ids

if TYPE_CHECKING:
    from tests.fuzz.world import World

SPARE = "spare"
SETTLED_WITHIN_S = 150.0
QUIET_S = 2.0
BEGUN_WITHIN_S = 30.0
_LOOK_S = 0.5
_ASKED_AGAIN_S = 12.0
"""Who wants to ask again when control forgets waits no longer than this for it."""
_PASS_S = 5.0
"""So long a pass of control may go by what it read at its beginning."""
_MOMENTS = ("on the way", "on the way", "after a write", "")
"""At which control may be paused; of four, each as likely as it stands here often."""
_WELL = (DeploymentPhase.READY, DeploymentPhase.IDLE)
_QUICK = Scaling(idle_s=1.0, down_window_s=1.0)


class Steering:
    """Orders, faults and the end of a run in which control takes part."""

    def __init__(self, world: World, plane: Plane) -> None:
        self._world, self._model = world, MODEL
        self.loop, self._state, self._note = world.loop, world.state, world.story.note
        self.fleet = Fleet(
            world.loop,
            world.clock,
            world.replicas,
            world.upstream,
            plane.start_s,
            SETTINGS.drain_timeout_s,
            self._note,
            world.tell,
        )
        self.fleet.has_endpoint = self._has_endpoint
        self.fleet.stops_in_s = plane.stops_in_s
        self._fits = self.fleet.fits = plane.fits
        self.fleet.leads = lambda: self._state._lease(LEASE).token
        kinds = {fault.kind for fault in world.schedule.faults}
        self._unseen = any(kind.startswith(("state", "lost")) for kind in kinds)
        self._sees = not kinds & {"driver_blank", "looks_late"}
        self.fleet.calm = not self._unseen and "gateway_kill" not in kinds
        self._registry = Registry()
        self._versions = 1
        self._took_at = 0.0
        self._led: Life | None = None
        self._deleted_at = -_PASS_S
        self._at_once = False
        self._lost_writes = 0
        self._spec = DeploymentSpec(MODEL, "models:/bank/1")
        self._endpoints: dict[str, list[Endpoint]] = {}
        self._processes = [
            ControlProcess(
                f"control{number}",
                world.loop,
                world.clock,
                world.state,
                world.weather,
                self.fleet,
                world.upstream,
                self._registry,
                plane.latency_s,
                self._note,
                self._wrote,
                self._comes,
                world.schedule.seed,
            )
            for number in range(plane.controls)
        ]

    async def begin(self, spec: DeploymentSpec) -> None:
        """The first deployment is asked for, and answers."""
        plane = self._world.schedule.plane
        if plane is not None and plane.leftovers:
            await self._leave_something()
        if plane is not None and plane.alias:
            spec = replace(spec, model="models:/bank@champion")
        await self._put(spec)
        for name in NAMES[1:] if self._fits else ():
            pinned = plane is not None and plane.pinned and name == NAMES[1]
            small = DeploymentSpec(
                name, "models:/bank/1", min_replicas=int(pinned), max_replicas=1, pinned=pinned
            )
            await self._put(small)
        for one in self._processes:
            one.begin()
        least = 1 if self._fits else spec.min_replicas
        for _ in range(int(BEGUN_WITHIN_S / 0.1)):
            if len(self._serving(self._model)) >= least:
                return
            await asyncio.sleep(0.1)
        self._note("convergence", f"nothing serves after {BEGUN_WITHIN_S} s")

    async def _leave_something(self) -> None:
        """As after a state that was brought back from an older copy."""
        ghost = GroupSpec("ghost-r1", "ghost", 1, "models:/bank/1", 2)
        self.fleet.apply(ghost, 0)
        there = [Endpoint("ghost", one, f"http://{one}", 1) for one in replica_ids(ghost)]
        gone = [Endpoint("gone", "gone-r1-0", "http://gone-r1-0", 1)]
        await self._state.put_endpoints("ghost", there)
        await self._state.put_endpoints("gone", gone)

    async def end(self) -> None:
        """The run is over."""
        for one in self._processes:
            one.check_alive()
            await one.end()

    # What is asked --------------------------------------------------------------------------------

    async def carry_out(self, order: Order) -> None:
        """Ask what an order says, when its time has come."""
        await asyncio.sleep(order.at_s)
        self._world.tell("order", order.kind, order.how)
        state, now = self._state, self._world.clock.now()
        current = await state.get_deployment(self._model)
        spec = self._spec if current is None else current.spec
        match order.kind:
            case "update":
                await self._put(replace(spec, model=self._next(), rollout=_way(order.how)))
            case "broken":
                number = BROKEN_FROM + self._versions
                await self._put(replace(spec, model=f"models:/bank/{number}", rollout=_way(0.0)))
            case "scale":
                most = 1 + int(order.how * 4)
                least = most if order.how * 8 % 1 < 0.5 else 1
                await self._put(
                    replace(spec, min_replicas=least, max_replicas=most, scaling=_QUICK)
                )
            case "zero":
                await self._put(replace(spec, min_replicas=0, max_replicas=2, scaling=_QUICK))
            case "undo":
                await self._undo(current)
            case "delete" | "recreate":
                await state.mark_deleting(self._model, now=now)
                at_once = self._at_once = order.kind == "recreate"
                await asyncio.sleep(_ASKED_AGAIN_S if at_once else order.how * 4.0)
                if self._at_once or not at_once:
                    self._at_once, self._deleted_at = False, self.loop.time()
                    await self._put(spec)
            case "alias":
                self._registry.champion = 2 + int(order.how * 7)
                await asyncio.sleep(1.0)
                count = 1 + spec.max_replicas % 4
                await self._put(replace(spec, min_replicas=count, max_replicas=count))
            case _:
                await self._spare(order.how)

    async def _comes(self, write: str, name: Any) -> None:
        """Control writes next. What is forgotten is asked for again at the worst moment, and
        endpoints may be lost on the way."""
        if write == "put_endpoints" and self._lost_writes:
            self._lost_writes -= 1
            raise Unavailable("the state broke off", retry_after_s=1.0)
        if write == "remove_deployment" and name == self._model and self._at_once:
            self._at_once, self._deleted_at = False, self.loop.time()
            await self._put(self._spec)

    async def _put(self, spec: DeploymentSpec) -> None:
        self._spec = spec if spec.name == self._model else self._spec
        before = self._state._deployments.get(spec.name)
        if before is not None and before.deleting:
            self._deleted_at = self.loop.time()
        await self._state.put_deployment(spec, now=self._world.clock.now())

    def _next(self) -> str:
        self._versions += 1
        return f"models:/bank/{self._versions}"

    async def _undo(self, current: Deployment | None) -> None:
        if current is None or current.deleting or current.revision < 2:
            return
        earlier = current.revision - 1
        try:
            await self._state.return_to(
                self._model, earlier, reason="undone", now=self._world.clock.now()
            )
        except CloudlmError:
            return  # its history does not have it any more

    async def _spare(self, how: float) -> None:
        """A second deployment, which nobody asks anything, comes, changes and goes."""
        there = await self._state.get_deployment(SPARE)
        if there is not None and how < 0.5:
            await self._state.mark_deleting(SPARE, now=self._world.clock.now())
            return
        self._deleted_at = self.loop.time()
        count = 1 + int(how * 3)
        spec = DeploymentSpec(
            SPARE, "models:/bank@champion", min_replicas=count, max_replicas=count
        )
        await self._put(replace(spec, options={"seed": int(how * 300) % 2}))

    # What befalls it ------------------------------------------------------------------------------

    async def suffer(self, fault: Fault) -> bool:
        """A fault of control or of what it stands on; whether it is one."""
        until = self.loop.time() + fault.for_s
        fleet = self.fleet
        match fault.kind:
            case "control_kill":
                for one in self._whom(fault):
                    one.dies_soon(
                        int(fault.how * 40), fault.for_s / 2, after=fault.how * 80 % 1 < 0.5
                    )
            case "control_pause":
                for one in self._processes:  # whoever leads
                    one.pauses(_MOMENTS[int(fault.how * 4)], fault.for_s)
            case "driver_down":
                fleet.down_until = max(fleet.down_until, until)
            case "driver_forgets":
                fleet.forgets_until = max(fleet.forgets_until, until)
            case "driver_late":
                fleet.late_until = max(fleet.late_until, until)
            case "write_lost":
                self._lost_writes = 1
            case "looks_late":
                fleet.stale_until = max(fleet.stale_until, self.loop.time() + fault.for_s / 4)
            case "driver_blank":
                fleet.blank_until = max(fleet.blank_until, until)
            case "looks_cut":
                fleet.cut_until = max(fleet.cut_until, until)
            case "looks_lost":
                fleet.loses_until = max(fleet.loses_until, until)
            case "wedge":
                for running in self._ill(fault):
                    running.was_ill = running.wedged = True
            case "crash":
                for running in self._ill(fault):
                    fleet.crash(running)
            case _:
                return False
        return True

    def _whom(self, fault: Fault) -> list[ControlProcess]:
        return [self._processes[fault.who % len(self._processes)]]

    def _ill(self, fault: Fault) -> list[Any]:
        there = [one for one in self.fleet.running().values() if one.there.alive]
        if fault.who == EVERYBODY:
            return there
        return there[fault.who % max(len(there), 1) :][:1]

    def mark_ill(self, replica: str) -> None:
        """A replica has another trouble: what becomes of its requests is not control's fault."""
        found = self.fleet.running().get(replica)
        if found is not None:
            found.was_ill = True

    # What it did ----------------------------------------------------------------------------------

    def _wrote(self, life: Life, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        """Control wrote this: it may not take away the last replica that answers, nor the lease of
        somebody who lives."""
        if name == "put_endpoints":
            self._withdrawn(arguments[0], list(arguments[1]))
        elif name == "put_status" and self._sees and "ran a moment ago" in arguments[0].message:
            self._note("doubt", f"all is listed that runs, and yet: {arguments[0].message}")
        elif name == "take_lease":
            self._taken(life)

    def _withdrawn(self, model: str, after: list[Endpoint]) -> None:
        now, running = self.loop.time(), self.fleet.running()
        before, self._endpoints[model] = self._endpoints.get(model, []), after
        there = {one.replica for one in after}
        story = self._world.story
        if model == self._model:
            story.most_endpoints = max(story.most_endpoints, len(there))
        for replica in {one.replica: one for one in (*before, *after)}:
            if replica in running:
                running[replica].withdrawn_at = None if replica in there else now
        lost = [one for one in _taking(before) if one not in _taking(after)]
        deployment = self._state._deployments.get(model)
        if _taking(after) or not lost or deployment is None or deployment.deleting:
            return
        late = now < self.fleet.stale_until or now - self._deleted_at < _PASS_S
        # Who was asked during a cut is judged when the question's time is over.
        cut = now < self.fleet.cut_until + 2 * PROBE_TIMEOUT_S
        alone = cut and len(_taking(before)) < FEWEST_SILENT
        if not deployment.spec.min_replicas or late or alone or self._fits:
            return
        well = [one for one in lost if one in running and self._was_well(one)]
        if well:
            self._note("available", f"{model} has no endpoint though {well[0]} answers")

    def _was_well(self, replica: str) -> bool:
        one = self.fleet.running()[replica]
        return self.fleet.is_well(one) and not one.was_ill

    def _taken(self, life: Life) -> None:
        now, token = self.loop.time(), self._state._lease(LEASE).token
        self._world.tell("lease", token)
        self._took_at, before, self._led = now, self._led, life
        if before is None or before is life or before.dead or self._unseen:
            return
        if before.paused_until + LEASE_S <= now:
            self._note("lease", f"token {token} was taken though its holder lives")

    # The end --------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Faults have ended; a version that works is asked for, and has to run soon as asked."""
        self.fleet.heal()
        for one in self._processes:
            if one.life is not None:
                one.life.heals()
        current = await self._state.get_deployment(self._model)
        spec = self._spec if current is None else current.spec
        good = spec.model if _number(spec.model) < BROKEN_FROM else self._next()
        await self._put(replace(spec, model=good, rollout=Strategy()))
        began, lacks = self.loop.time(), ""
        while self.loop.time() - began < SETTLED_WITHIN_S:
            await asyncio.sleep(_LOOK_S)
            lacks = self._lacks()
            if not lacks:
                return
        self._note("convergence", f"after {SETTLED_WITHIN_S} s without a fault: {lacks}")

    def _lacks(self) -> str:
        """What is not yet as asked; empty if all is, and nothing moves."""
        now, running = self.loop.time(), self.fleet.running()
        deployments = self._state._deployments
        if now - max(self.fleet.ordered_at, self._took_at) < QUIET_S:
            return "orders are still given, or the lease changes hands"
        for group in self.fleet.groups.values():
            if group.spec.deployment not in deployments:
                return f"{group.spec.name} belongs to nobody"
        for model, endpoints in self._state._endpoints.items():
            if endpoints and model not in deployments:
                return f"{model} has endpoints, and does not exist"
            for one in endpoints:
                if one.replica not in running:
                    return f"{one.replica} has an endpoint, and does not run"
        return next(filter(None, (self._lacks_of(one) for one in deployments.values())), "")

    def _lacks_of(self, deployment: Deployment) -> str:
        name, spec = deployment.spec.name, deployment.spec
        status = self._state._statuses.get(name)
        if deployment.deleting:
            return f"{name} is still being deleted"
        if status is None or status.observed_generation != deployment.generation:
            return f"{name} has no status of generation {deployment.generation}"
        groups = [one for one in self.fleet.groups.values() if one.spec.deployment == name]
        if self._fits and status.residence is Residence.UNLOADED:
            return "" if not any(one.running for one in groups) else f"{name} is not yet unloaded"
        if [one.spec.revision for one in groups] != [deployment.revision]:
            found = [one.spec.name for one in groups]
            return f"{name} runs {found}, not revision {deployment.revision}"
        wanted = status.wanted_replicas
        least = 0 if self._fits else spec.min_replicas
        if not least <= wanted <= spec.max_replicas or wanted != status.ready_replicas:
            return f"{name}: {status.ready_replicas} of {wanted} ready"
        if status.phase not in _WELL:
            return f"{name} is {status.phase.value}: {status.message}"
        number = _number(spec.model)
        if number and groups[0].spec.model != spec.model:
            return f"{name} runs {groups[0].spec.model}, not {spec.model}"
        answering = {one for one, found in groups[0].running.items() if self.fleet.is_well(found)}
        if len(groups[0].running) != wanted or answering != self._serving(name):
            return f"{name}: {sorted(answering)} answer, {sorted(self._serving(name))} are asked"
        return ""

    def _has_endpoint(self, replica: str) -> bool:
        every = self._state._endpoints.values()
        return any(one.replica == replica for endpoints in every for one in endpoints)

    def _serving(self, model: str) -> set[str]:
        return _taking(self._state._endpoints.get(model, []))


def _taking(endpoints: list[Endpoint]) -> set[str]:
    """The replicas that get requests."""
    return {one.replica for one in endpoints if one.weight > 0 and one.share != 0.0}


def _number(model: str) -> int:
    """The version that an address names, 0 for an alias."""
    number = model.rpartition("/")[2]
    return int(number) if number.isdigit() else 0


def _way(how: float) -> Strategy:
    """How a new revision takes over."""
    if how < 0.5:
        return Strategy()
    if how < 0.75:
        steps = (Step(20.0, 0.5), Step(50.0, 0.5))
        return Strategy(Kind.CANARY, steps=steps, min_requests=1, max_error_rate=0.5)
    return Strategy(Kind.BLUE_GREEN, bake_s=1.0)
