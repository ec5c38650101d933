"""The loop that makes what runs equal what was asked.

Level-triggered: each pass looks at everything anew and takes one step, so that it does not matter
what was missed, or when control was killed. One deployment's trouble never stops the others.
Replicas lose their endpoint before they are stopped and get it only when they answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Sequence

from cloudlm.control.budget import MemoryBudget
from cloudlm.control.drivers import DEFAULT, Drivers
from cloudlm.control.handover import serving_of
from cloudlm.control.leftovers import Leftovers
from cloudlm.control.lookout import Asker, Lookout
from cloudlm.control.metrics import ControlMetrics
from cloudlm.control.naps import Naps, Turner
from cloudlm.control.observe import Observer, Seen, SeenGroup
from cloudlm.control.orders import Orders
from cloudlm.control.plan import Plan, plan_deletion
from cloudlm.control.probe import Prober
from cloudlm.control.published import Published, carriers_of, endpoints_for
from cloudlm.control.registry import ModelRegistry
from cloudlm.control.releases import Releases
from cloudlm.control.residents import Residents
from cloudlm.control.rollout import Decision
from cloudlm.control.room import Room, Wish
from cloudlm.control.scaler import Scaler
from cloudlm.control.status import last_seen, summarise
from cloudlm.control.versions import FixedVersions
from cloudlm.core.clock import Clock
from cloudlm.core.deployment import Demand, Deployment, GroupObservation, ReplicaState
from cloudlm.core.errors import CloudlmError, Superseded
from cloudlm.core.plugins import NotInstalled
from cloudlm.core.settings import ControlSettings
from cloudlm.security.credentials import Credentials
from cloudlm.state.base import State
from cloudlm.state.news import News
from cloudlm.telemetry.logs import get_logger

_log = get_logger(__name__)


class Reconciler:
    """Everything that a pass remembers; all of it may be lost with the process."""

    def __init__(
        self,
        state: State,
        drivers: Drivers,
        registry: ModelRegistry,
        prober: Prober,
        clock: Clock,
        settings: ControlSettings,
        metrics: ControlMetrics,
        turner: Turner,
        credentials: Credentials | None = None,
        memory: MemoryBudget | None = None,
        news: News | None = None,
        asker: Asker | None = None,
    ) -> None:
        self._state = state
        self._clock = clock
        self._interval_s = settings.reconcile_interval_s
        self._metrics = metrics
        self._observer = Observer(drivers, prober, clock, settings.stall_timeout_s)
        self._orders = Orders(drivers, self._observer, clock, metrics, settings.drain_timeout_s)
        self._naps = Naps(turner)
        self._releases = Releases(state, clock, credentials)
        self._versions = FixedVersions(registry, self._releases)
        self._published = Published(state, metrics)
        self._scaler = Scaler(state, clock, news)
        self._residents = Residents(memory or MemoryBudget(registry), drivers, clock, metrics)
        self._leftovers = Leftovers()
        self._seen = Seen()
        self._born: dict[str, float] = {}
        """When the deployments known were created: what is remembered is remembered of these."""
        self._wake = asyncio.Event()
        self._lookout = None if asker is None else Lookout(asker, clock, self.nudge)
        self.has_looked = False
        """Whether one pass is complete: what an earlier control wrote is corrected."""

    # The loop -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Pass after pass until cancelled. Raises Superseded once another control leads."""
        while True:
            started = self._clock.monotonic()
            try:
                await self.step()
                self.has_looked = True
                self._metrics.passed(self._clock.monotonic() - started)
            except Superseded:
                raise
            except CloudlmError as error:
                self._metrics.failed()
                _log.warning("pass_failed", extra={"fields": {"reason": error.message}})
            except Exception:
                self._metrics.failed()
                _log.exception("pass_failed")
            await self._pause()

    async def close(self) -> None:
        """Let go of what is under way; call it after ``run`` was cancelled."""
        await self._naps.close()
        if self._lookout is not None:
            await self._lookout.close()

    def nudge(self) -> None:
        """Something was asked: the next pass begins at once."""
        self._wake.set()

    def models_in_use(self) -> frozenset[str]:
        """The versions (``models:/name/3``) that groups run, as of the last pass."""
        specs = (group.observation.spec for group in self._seen.groups)
        return frozenset(
            ref for one in specs if one is not None for ref in (one.model, *one.adapters.values())
        )

    async def step(self) -> None:
        """One pass over everything."""
        deployments = await self._state.list_deployments()
        demand = await self._scaler.ear.fresh()
        self._keep_only(deployments)
        await self._recall(deployments)
        ran = await self._releases.look(deployments)
        asked = {d.spec.name: self._asked_drivers(d) for d in deployments}
        named = {DEFAULT, *self._leftovers.expect(asked, ran)}
        seen = await self._observer.look(sorted(named))  # in one order: a pass can be played again
        self._leftovers.note(seen)
        self._seen = seen
        existing = seen.existing
        self._orders.drains.keep_only(existing)
        self._naps.keep_only(existing)
        self._scaler.keep_only(existing)
        await self._orders.stop_stalled(seen)
        wanted = await self._wishes(deployments, demand, seen)
        for deployment in deployments:
            name = deployment.spec.name
            if name not in wanted:
                continue
            try:
                await self._converge(deployment, seen, wanted[name])
            except Superseded:
                raise
            except CloudlmError as error:
                _log.warning(
                    "deployment_failed",
                    extra={"fields": {"deployment": name, "reason": error.message}},
                )
            except Exception:
                _log.exception("deployment_failed", extra={"fields": {"deployment": name}})
        served = {name for d in deployments for name in (d.spec.name, *d.spec.adapters)}
        await self._remove_orphans({d.spec.name for d in deployments}, served, seen)
        await self._scaler.save()

    async def _pause(self) -> None:
        pause = self._scaler.pause(self._interval_s, hurry=not self._looks_out())
        sleeping = asyncio.ensure_future(pause)
        waking = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({sleeping, waking}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sleeping, waking):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            self._wake.clear()

    def _looks_out(self) -> bool:
        """Look out for the first replicas that requests wait for; whether all will be told of."""
        if self._lookout is None:
            return False
        starting = {
            name: [
                replica.url
                for group in self._seen.of(name)
                for replica in group.observation.replicas
                if replica.state in (ReplicaState.STARTING, ReplicaState.READY)
            ]
            for name in self._scaler.hurried
        }
        self._lookout.mind({url for urls in starting.values() for url in urls if url})
        return all(urls and all(map(self._minds, urls)) for urls in starting.values())

    def _minds(self, url: str | None) -> bool:
        """Whether news of the replica at this address will come by itself."""
        return self._lookout is not None and url is not None and self._lookout.minds(url)

    async def _recall(self, deployments: Sequence[Deployment]) -> None:
        """At the first pass: what the control before us has written."""
        if await self._published.recall():
            written = self._published.endpoints or {}
            endpoints = [one for model in written.values() for one in model]
            ran = serving_of(deployments, written)
            self._observer.recall((self._published.statuses or {}).values(), endpoints, ran)
        await self._scaler.recall()

    def _keep_only(self, deployments: Sequence[Deployment]) -> None:
        """Forget deployments that are gone, and those in whose place new ones of that name are."""
        found = {one.spec.name: one.created_at for one in deployments}
        for name in [one for one, born in self._born.items() if found.get(one) != born]:
            self._published.forget(name)
            self._scaler.forget(name)
            self._metrics.forget(name)
            self._versions.forget(name)
        self._born = found

    async def _wishes(
        self, deployments: Sequence[Deployment], demand: Sequence[Demand], seen: Seen
    ) -> dict[str, int]:
        """The replicas that each deployment would have, and who of them may be in memory."""
        wishes = []
        for one in deployments:
            name = one.spec.name
            served = {name, *one.spec.adapters}
            asked = [d for d in demand if d.model in served]
            try:
                observations = [group.observation for group in seen.of(name)]
                sized = self._releases.sized(one)
                wanted = self._wanted(sized, asked, observations, seen)
                moving = self._releases.moving(one, wanted)
                version = self._versions.known(one)
                wishes.append(Wish(one, sized, wanted, asked, version, moving))
            except Exception:  # one deployment's trouble is no other's
                _log.exception("deployment_failed", extra={"fields": {"deployment": name}})
        await self._residents.look(wishes, seen)
        return {one.name: one.wanted for one in wishes}

    # One deployment -----------------------------------------------------------------------------

    async def _converge(self, deployment: Deployment, seen: Seen, wished: int) -> None:
        name = deployment.spec.name
        groups = seen.of(name)
        observations = [group.observation for group in groups]
        homes = self._releases.homes(deployment)
        room = self._residents.room(deployment, wished, seen, homes)
        problem, step, decision = "", Plan(), None
        fault = self._fault_of(deployment, seen)
        ready, sleeping = seen.ready, seen.sleeping
        leaving: Collection[str] = ()
        if fault is not None:
            problem = fault.message  # its groups are unknown: leave everything as it is
            if not observations and not isinstance(fault, NotInstalled):
                before = await self._published.status_of(name)
                observations, ready, leaving, sleeping = last_seen(deployment, before)
            await self._releases.abort(deployment)
        else:
            if not room.granted:
                self._scaler.unloaded(deployment)
            try:
                if deployment.deleting:
                    step = plan_deletion(observations)
                else:
                    answering = seen.ready | seen.sleeping  # what sleeps can answer again
                    decision = await self._releases.decide(
                        deployment, observations, answering, room.wanted, room.no_room, room.never
                    )
                    step = await self._next(deployment, decision, room, groups, answering)
            except Superseded:
                raise
            except CloudlmError as error:
                problem, step = (
                    error.message,
                    room.fit(step),
                )  # others get their memory all the same
            await self._write_endpoints(
                name,
                groups,
                step,
                seen,
                asleep=bool(deployment.spec.asleep),
                adapters=deployment.spec.adapters,
                decision=decision,
            )
            acted = await self._orders.act(
                step, deployment.spec.driver, groups, seen, homes, room.patient
            )
            problem = acted or problem or self._turn(deployment, groups, step, seen)
        note = room.told("" if decision is None else decision.note, self._scaler.why(name))
        status = summarise(
            deployment,
            room.shown,
            observations,
            ready,
            leaving or step.leaving,
            problem or room.problem,
            self._clock.now(),
            sleeping,
            note=note,
        )
        await self._published.put_status(self._residents.shown(status))
        if deployment.deleting and not groups and fault is None:
            # If it was asked for again meanwhile, it stays. What is known of it goes with the next
            # look, so that it goes even if the answer to this is lost.
            await self._state.remove_deployment(name, generation=deployment.generation)

    def _fault_of(self, deployment: Deployment, seen: Seen) -> CloudlmError | None:
        """What is wrong with a driver that its groups may be on: they are unknown."""
        used = self._asked_drivers(deployment)
        if deployment.deleting:
            used += sorted(self._leftovers.of(deployment.spec.name).difference(used))
        faults = [seen.faults[one] for one in used if one in seen.faults]
        if deployment.deleting:
            # A driver that is not installed runs nothing that we could stop.
            faults = [one for one in faults if not isinstance(one, NotInstalled)]
        return next(iter(faults), None)

    def _asked_drivers(self, deployment: Deployment) -> list[str]:
        """The drivers that something is asked of for it."""
        return [deployment.spec.driver, *self._releases.homes(deployment).values()]

    async def _next(
        self,
        deployment: Deployment,
        decision: Decision,
        room: Room,
        groups: Sequence[SeenGroup],
        answering: Collection[str],
    ) -> Plan:
        """The deployment's next step, as far as there is room for it."""
        versions = await self._versions.of(deployment, groups)
        step = self._releases.plan(
            room.fitted(deployment),
            decision,
            room.wanted,
            [group.observation for group in groups],
            answering,
            versions,
        )
        return room.fit(step)

    def _turn(
        self, deployment: Deployment, groups: Sequence[SeenGroup], step: Plan, seen: Seen
    ) -> str:
        """Have the replicas that stay sleep or wake as asked; returns what hinders it."""
        replicas = [one for group in groups for one in group.observation.replicas]
        staying = [one for one in replicas if one.id not in step.leaving and one.url]
        asleep = None if deployment.deleting else deployment.spec.asleep
        now = self._clock.monotonic()
        return self._naps.mind(asleep, staying, seen.ready, seen.sleeping, now)

    def _wanted(
        self,
        deployment: Deployment,
        demand: Sequence[Demand],
        groups: Sequence[GroupObservation],
        seen: Seen,
    ) -> int:
        name = deployment.spec.name
        if deployment.spec.asleep or self._fault_of(deployment, seen) is not None:
            # Requests are refused, or nobody sees who serves them: either way they say nothing.
            demand = ()
        recalled = self._published.wanted_of(name)
        aside = {one.replica for one in self._published.endpoints_of(name) if one.share == 0.0}
        return self._scaler.wanted(deployment, demand, groups, seen, recalled, aside)

    async def _write_endpoints(
        self,
        name: str,
        groups: Sequence[SeenGroup],
        step: Plan,
        seen: Seen,
        *,
        asleep: bool = False,
        adapters: Collection[str] = (),
        decision: Decision | None = None,
    ) -> None:
        """Write the endpoints of a deployment and its adapters, and note who leaves."""
        before = self._published.endpoints_of(name)
        endpoints = endpoints_for(name, groups, step, seen, before, decision, asleep=asleep)
        replicas = {r.id for g in groups for r in g.observation.replicas}
        serving = {endpoint.replica for endpoint in before}
        serving |= seen.ready  # the control before us may have taken its endpoint a moment ago
        await self._published.put_endpoints(name, endpoints, carriers_of(adapters, groups))
        self._orders.drains.note(replicas, step.leaving, serving, self._clock.monotonic())

    # What belongs to nobody ---------------------------------------------------------------------

    async def _remove_orphans(self, names: set[str], served: set[str], seen: Seen) -> None:
        """``names`` are the deployments, ``served`` those and their adapters."""
        orphans: dict[str, list[SeenGroup]] = {}
        for group in seen.groups:
            if group.deployment not in names:
                orphans.setdefault(group.deployment, []).append(group)
        for model in [one for one in self._published.endpoints or {} if one not in served]:
            orphans.setdefault(model, [])
        for name, groups in orphans.items():
            try:
                step = plan_deletion([group.observation for group in groups])
                await self._write_endpoints(name, groups, step, seen)
                problem = await self._orders.act(step, DEFAULT, groups, seen)
                if not groups:
                    self._published.forget_endpoints(name)
            except Superseded:
                raise
            except Exception as error:
                problem = str(error)
            if problem:
                _log.warning("orphan_stays", extra={"fields": {"group": name, "reason": problem}})
