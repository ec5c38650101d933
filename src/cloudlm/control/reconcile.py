"""The loop that makes what runs equal what was asked.

Level-triggered: each pass looks at everything anew and takes one step, so that it does not matter
what was missed, or when control was killed. One deployment's trouble never stops the others.
Replicas lose their endpoint before they are stopped and get it only when they answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from cloudlm.control.budget import MemoryBudget
from cloudlm.control.drain import Drains
from cloudlm.control.drivers import DEFAULT, Drivers
from cloudlm.control.external import as_external
from cloudlm.control.handover import serving_of
from cloudlm.control.lookout import Asker, Lookout
from cloudlm.control.metrics import ControlMetrics
from cloudlm.control.naps import Naps, Turner
from cloudlm.control.observe import DRIVER_TIMEOUT_S, Observer, Seen, SeenGroup
from cloudlm.control.plan import Action, Apply, Plan, group_name, plan_deletion
from cloudlm.control.probe import Prober
from cloudlm.control.registry import ModelRegistry
from cloudlm.control.releases import Releases, split_of
from cloudlm.control.residents import Residents
from cloudlm.control.rollout import Decision
from cloudlm.control.room import Room, Wish
from cloudlm.control.scaler import DEMAND_FRESH_S, Scaler
from cloudlm.control.status import last_seen, summarise
from cloudlm.core.clock import Clock
from cloudlm.core.deployment import (
    Demand,
    Deployment,
    DeploymentStatus,
    Endpoint,
    GroupObservation,
    ReplicaState,
)
from cloudlm.core.errors import CloudlmError, InvalidRequest, Superseded
from cloudlm.core.model import parse_ref
from cloudlm.core.settings import ControlSettings
from cloudlm.drivers.base import Ability
from cloudlm.drivers.groups import replica_ids
from cloudlm.security.credentials import Credentials
from cloudlm.state.base import State
from cloudlm.state.news import News
from cloudlm.telemetry.logs import get_logger

NO_HOMES: Mapping[str, str] = {}
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
        self._drivers = drivers
        self._registry = registry
        self._clock = clock
        self._interval_s = settings.reconcile_interval_s
        self._metrics = metrics
        self._observer = Observer(drivers, prober, clock, settings.stall_timeout_s)
        self._drains = Drains(settings.drain_timeout_s)
        self._naps = Naps(turner)
        self._releases = Releases(state, clock, credentials)
        self._scaler = Scaler(state, clock, news)
        self._residents = Residents(memory or MemoryBudget(registry), drivers, clock, metrics)
        self._versions: dict[str, tuple[str, dict[str, str]]] = {}
        self._endpoints: dict[str, tuple[Endpoint, ...]] | None = None
        self._unsure: set[str] = set()
        self._statuses: dict[str, DeploymentStatus] | None = None
        self._stopped_stalled: dict[str, object] = {}
        self._seen = Seen()
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
        demand = await self._state.list_demand(since=self._clock.now() - DEMAND_FRESH_S)
        await self._recall(deployments)
        drivers = await self._releases.look(deployments)
        seen = await self._observer.look({DEFAULT, *drivers, *(d.spec.driver for d in deployments)})
        self._seen = seen
        existing = seen.existing
        self._drains.keep_only(existing)
        self._naps.keep_only(existing)
        self._scaler.keep_only(existing)
        await self._stop_stalled(seen)
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
        if self._endpoints is None:
            found: dict[str, tuple[Endpoint, ...]] = {}
            for endpoint in await self._state.list_endpoints():
                found[endpoint.model] = (*found.get(endpoint.model, ()), endpoint)
            self._endpoints = found
        if self._statuses is None:
            self._statuses = {one.name: one for one in await self._state.list_statuses()}
            endpoints = [one for written in self._endpoints.values() for one in written]
            ran = serving_of(deployments, self._endpoints)
            self._observer.recall(self._statuses.values(), endpoints, ran)
        await self._scaler.recall()

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
                version, _ = self._versions.get(group_name(name, one.revision), ("", {}))
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
        homes = self._releases.homes(name)
        room = self._residents.room(deployment, wished, seen, homes)
        problem, step, decision = "", Plan(), None
        used = (deployment.spec.driver, *homes.values())
        fault = next((seen.faults[one] for one in used if one in seen.faults), None)
        ready, sleeping = seen.ready, seen.sleeping
        leaving: Collection[str] = ()
        if fault is not None:
            problem = fault.message  # its groups are unknown: leave everything as it is
            if not observations and not isinstance(fault, InvalidRequest):
                before = (self._statuses or {}).get(name) or await self._state.get_status(name)
                observations, ready, leaving, sleeping = last_seen(deployment, before)
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
            acted = await self._act(step, deployment.spec.driver, groups, seen, homes, room.patient)
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
        await self._write_status(self._residents.shown(status))
        # A driver that is not installed runs nothing that we could stop.
        known = fault is None or isinstance(fault, InvalidRequest)
        if deployment.deleting and not groups and known:
            await self._forget(deployment)

    async def _next(
        self,
        deployment: Deployment,
        decision: Decision,
        room: Room,
        groups: Sequence[SeenGroup],
        answering: Collection[str],
    ) -> Plan:
        """The deployment's next step, as far as there is room for it."""
        versions = await self._version(deployment, groups)
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
        if deployment.spec.asleep:
            demand = ()  # requests are refused, and say nothing
        name = deployment.spec.name
        recalled = self._recalled_wanted(name)
        written = (self._endpoints or {}).get(name, ())
        aside = {one.replica for one in written if one.share == 0.0}
        return self._scaler.wanted(deployment, demand, groups, seen, recalled, aside)

    def _recalled_wanted(self, name: str) -> int:
        status = (self._statuses or {}).get(name)
        return 0 if status is None else status.wanted_replicas

    async def _version(
        self, deployment: Deployment, groups: Sequence[SeenGroup]
    ) -> tuple[str, dict[str, str]]:
        """The fixed versions of the revision and its adapters: what its group runs; for a new
        revision what the addresses mean now. Moving an alias later changes nothing."""
        group = group_name(deployment.spec.name, deployment.revision)
        running: tuple[str, dict[str, str]] | None = None
        for one in groups:
            spec = one.observation.spec
            if spec is not None and spec.name == group:
                running = spec.model, dict(spec.adapters)
        if deployment.spec.endpoints:
            return deployment.spec.model, {}  # the name of others, who say what it means
        known = self._versions.get(group)
        if known is None or (running is not None and running != known):
            name, number = deployment.spec.name, deployment.revision
            known = running or await self._releases.versions(name, number)
            if known is None:
                model = await self._fixed(deployment.spec.model)
                wanted = deployment.spec.adapters.items()
                adapters = {name: await self._fixed(address) for name, address in wanted}
                known = model, adapters
            await self._releases.fix(name, number, known)
            self._versions[group] = known
        return known

    async def _fixed(self, address: str) -> str:
        return (await asyncio.to_thread(self._registry.resolve, parse_ref(address))).ref

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
        """Write the endpoints: replicas that are to stay and answer, and with weight 0 those that
        sleep, or fall asleep now (``asleep``). An adapter has those that carry it. ``decision``
        says how requests are split between revisions."""
        assert self._endpoints is not None
        revisions = [g.observation.spec.revision for g in groups if g.observation.spec]
        shares, mirrors = split_of(decision, self._endpoints.get(name, ()), revisions)
        replicas = {r.id for g in groups for r in g.observation.replicas}
        serving = {endpoint.replica for endpoint in self._endpoints.get(name, ())}
        serving |= seen.ready  # the control before us may have taken its endpoint a moment ago
        endpoints = tuple(
            as_external(
                Endpoint(
                    name,
                    replica.id,
                    replica.url,
                    group.observation.spec.revision,
                    0.0 if asleep or replica.id in seen.sleeping else 1.0,
                    shares.get(group.observation.spec.revision),
                    mirrors.get(group.observation.spec.revision, 0.0),
                ),
                group.observation,
            )
            for group in groups
            if group.observation.spec is not None
            for replica in group.observation.replicas
            if replica.id in seen.ready | seen.sleeping
            and replica.id not in step.leaving
            and replica.url
        )
        await self._put_endpoints(name, endpoints)
        for adapter in adapters:
            carrying = {
                replica.id
                for group in groups
                if group.observation.spec and adapter in group.observation.spec.adapters
                for replica in group.observation.replicas
            }
            found = [replace(one, model=adapter) for one in endpoints if one.replica in carrying]
            await self._put_endpoints(adapter, tuple(found))
        self._drains.note(replicas, step.leaving, serving, self._clock.monotonic())

    async def _put_endpoints(self, model: str, endpoints: tuple[Endpoint, ...]) -> None:
        assert self._endpoints is not None
        if model in self._unsure or self._endpoints.get(model, ()) != endpoints:
            self._unsure.add(model)  # a write may be done though its answer was lost
            await self._state.put_endpoints(model, endpoints)
            self._unsure.discard(model)
            self._endpoints[model] = endpoints

    async def _act(
        self,
        step: Plan,
        driver: str,
        groups: Sequence[SeenGroup],
        seen: Seen,
        homes: Mapping[str, str] = NO_HOMES,
        patient: bool = False,
    ) -> str:
        """Carry out what may be done now; returns why the driver refused, if it did. Groups that
        are not there yet begin at ``driver``, unless ``homes`` says where."""
        drivers = {**homes, **{group.observation.name: group.driver for group in groups}}
        problem = ""
        for action in step.actions:
            name = action.spec.name if isinstance(action, Apply) else action.name
            now = self._clock.monotonic()
            if not self._drains.done(action.leaving, seen.busy, now, patient=patient):
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

    async def _write_status(self, status: DeploymentStatus) -> None:
        assert self._statuses is not None
        self._metrics.deployment(
            status.name, status.wanted_replicas, status.ready_replicas, status.memory_bytes
        )
        before = self._statuses.get(status.name)
        if before is not None and replace(before, updated_at=status.updated_at) == status:
            return
        self._statuses.pop(status.name, None)  # nobody knows, if its answer is lost
        await self._state.put_status(status)
        self._statuses[status.name] = status
        if before is None or before.phase is not status.phase:
            fields = {"deployment": status.name, "phase": status.phase.value}
            _log.info("phase", extra={"fields": {**fields, "reason": status.message}})

    async def _forget(self, deployment: Deployment) -> None:
        assert self._statuses is not None and self._endpoints is not None
        name = deployment.spec.name
        if not await self._state.remove_deployment(name, generation=deployment.generation):
            return  # it was asked for again meanwhile
        self._statuses.pop(name, None)
        self._endpoints.pop(name, None)
        self._scaler.forget(name)
        self._metrics.forget(name)
        for group in [one for one in self._versions if one.rpartition("-r")[0] == name]:
            del self._versions[group]

    # What belongs to nobody, and what stands still ------------------------------------------------

    async def _remove_orphans(self, names: set[str], served: set[str], seen: Seen) -> None:
        """``names`` are the deployments, ``served`` those and their adapters."""
        orphans: dict[str, list[SeenGroup]] = {}
        for group in seen.groups:
            if group.deployment not in names:
                orphans.setdefault(group.deployment, []).append(group)
        for model in [one for one in self._endpoints or {} if one not in served]:
            orphans.setdefault(model, [])
        for name, groups in orphans.items():
            try:
                step = plan_deletion([group.observation for group in groups])
                await self._write_endpoints(name, groups, step, seen)
                problem = await self._act(step, DEFAULT, groups, seen)
                if not groups and self._endpoints is not None:
                    self._endpoints.pop(name, None)
            except Superseded:
                raise
            except Exception as error:
                problem = str(error)
            if problem:
                _log.warning("orphan_stays", extra={"fields": {"group": name, "reason": problem}})

    async def _stop_stalled(self, seen: Seen) -> None:
        """Have replicas that stand still started anew, once per life."""
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
