"""Control in virtual time: one pass after the other, with the deciders of ``control.reconcile``.

What a pass does is what the reconciler does: read the demand, ask production's own scaler (which
measures starts and paces, asks the autoscaler, and says when to look again), ask production's
releases (which ask the roll-out's rule and the plan), withdraw endpoints before replicas stop, and
let nothing stop before it is drained. A crash loses everything but what is written down. Must not
decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from cloudlm.control.blackout import Doubt, silent_at_once, staying
from cloudlm.control.drain import Drains
from cloudlm.control.observe import Seen
from cloudlm.control.plan import Action, Apply, Plan
from cloudlm.control.probe import UNREACHABLE, ProbeRecord, Sample, Verdict, judge
from cloudlm.control.releases import Releases, split_of
from cloudlm.control.rollout import Decision
from cloudlm.control.scaler import Scaler
from cloudlm.core.deployment import (
    DeploymentSpec,
    Endpoint,
    GroupObservation,
    ReplicaState,
)
from cloudlm.core.scaling import DEFAULT_SCALING, Algorithm, check_scaling
from cloudlm.core.settings import ControlSettings
from cloudlm.gateway.view import POLL_INTERVAL_S
from cloudlm.sim.fleet import Fleet, Unit
from cloudlm.sim.state import ScalerState, SimState
from cloudlm.sim.timeline import Timeline, WallClock, at_once

if TYPE_CHECKING:
    from cloudlm.state.base import State

FIXED = "fixed"
AUTOSCALERS = (*(one.value for one in Algorithm), FIXED)
"""By the name that a policy gives: the algorithms of production, and as many as the spec allows,
always."""


def scaled(spec: DeploymentSpec, autoscaler: str) -> DeploymentSpec:
    """The spec under an autoscaler of that name; without one it is what the spec itself says.
    Raises InvalidRequest for settings that do not go with it."""
    if not autoscaler:
        return spec
    if autoscaler == FIXED:
        return replace(spec, min_replicas=spec.max_replicas, scaling=DEFAULT_SCALING)
    scaling = replace(spec.scaling, algorithm=Algorithm(autoscaler))
    return replace(spec, scaling=check_scaling(scaling))


class SimControl:
    """One control process. ``ready`` are the replicas that it would send requests to."""

    def __init__(
        self,
        settings: ControlSettings,
        timeline: Timeline,
        state: SimState,
        fleet: Fleet,
    ) -> None:
        self._settings = settings
        self._timeline = timeline
        self._state = state
        self._fleet = fleet
        self.clock = WallClock(timeline)
        self.crashes = 0
        """How many crashes last."""
        self.wanted = 0
        self.ready = 0
        self.passes = 0
        self.forget()

    @property
    def down(self) -> bool:
        """Whether there is no process."""
        return self.crashes > 0

    def forget(self) -> None:
        """The process was lost, and with it all that it remembered."""
        self._scaler = Scaler(cast("State", ScalerState(self._state)), self.clock)
        self._releases = Releases(cast("State", self._state.revisions), self.clock)
        self._drains = Drains(self._settings.drain_timeout_s)
        self._records: dict[str, tuple[int, ProbeRecord]] = {}
        self._silence = Doubt()

    def run(self) -> None:
        """One pass after the other, as production paces them: sooner while requests are held."""
        self._timeline.go(self._passes())

    async def _passes(self) -> None:
        while True:
            if not self.down and not self._state.down:
                self.step()
            await self._scaler.pause(self._settings.reconcile_interval_s)

    def step(self) -> None:
        """One pass over everything."""
        self.passes += 1
        now = self._timeline.now
        deployment = self._state.revisions.deployment
        at_once(self._releases.look([deployment]))
        groups = self._fleet.observe()
        ready, busy, stalled = self._look(groups)
        for unit in stalled:
            self._fleet.crash(unit)  # control has it stopped; its driver starts it again
        demand = at_once(self._scaler.ear.fresh())
        at_once(self._scaler.recall())
        self._scaler.keep_only({one.id for group in groups for one in group.replicas})
        seen = Seen(ready=frozenset(ready), busy=busy)
        aside = {one.replica for one in self._state.endpoints if one.share == 0.0}
        recalled = self._state.wanted
        wanted = self._scaler.wanted(deployment, demand, groups, seen, recalled, aside)
        at_once(self._scaler.save())
        self._state.wanted = self.wanted = wanted
        decision = at_once(self._releases.decide(deployment, groups, ready, wanted))
        # An address is a fixed version here, which its revision runs from now on.
        versions = (deployment.spec.model, dict(deployment.spec.adapters))
        at_once(self._releases.fix(deployment.spec.name, deployment.revision, versions))
        step = self._releases.plan(deployment, decision, wanted, groups, ready, versions)
        self._write_endpoints(groups, ready, step, decision, now)
        for action in step.actions:
            if self._drains.done(action.leaving, busy, now):
                self._carry_out(action)
        self._fleet.look()

    def _look(
        self, groups: Sequence[GroupObservation]
    ) -> tuple[set[str], Mapping[str, int], list[Unit]]:
        """Which replicas answer, what they have to do, and which stand still."""
        ready: set[str] = set()
        busy: dict[str, int] = {}
        stalled: list[Unit] = []
        before: dict[str, Verdict | None] = {}
        now = self._timeline.now
        for group in groups:
            stays = staying(group)
            for replica in group.replicas:
                unit = self._fleet.units[replica.id]
                serving = unit.serving
                if serving is None:
                    continue
                well = not serving.paused and unit.cut_until <= now
                if unit.id in stays:
                    before[unit.id] = self._before(unit)
                # Without faults ``judge`` says of it that it is ready.
                known = not well or unit.id in self._records
                verdict = self._judge(unit, well) if known else Verdict.READY
                if verdict is Verdict.STALLED:
                    stalled.append(unit)
                    continue
                if verdict is Verdict.READY:
                    ready.add(unit.id)
                if unit.cut_until <= now:
                    busy[unit.id] = serving.running + serving.waiting
                if replica.state is ReplicaState.DRAINING:
                    ready.discard(unit.id)
        doubted = self._doubted(before)
        ready |= doubted
        self.ready = len(ready)
        return ready, busy, [unit for unit in stalled if unit.id not in doubted]

    def _before(self, unit: Unit) -> Verdict:
        """What it counted as until now."""
        life, record = self._records.get(unit.id, (unit.life, None))
        return Verdict.READY if record is None or life != unit.life else record.verdict

    def _doubted(self, before: Mapping[str, Verdict | None]) -> set[str]:
        """Those that are silent with most of the others, and serve on for a while (``observe``)."""
        now, records = self._timeline.now, self._records
        after = {one: records[one][1] for one in before if one in records}
        self._silence, doubted = silent_at_once(self._silence, before, after, now)
        for one, verdict in doubted.items():
            life, record = records[one]
            records[one] = life, replace(record, verdict=verdict)
        return set(doubted)

    def _judge(self, unit: Unit, well: bool) -> Verdict:
        """What the production rule makes of a replica that has or had a fault."""
        assert unit.serving is not None
        now = self._timeline.now
        life, record = self._records.get(unit.id, (unit.life, None))
        if record is None or life != unit.life:
            record = ProbeRecord(now, unit.serving.steps, answered=True, verdict=Verdict.READY)
        sample = Sample(
            reachable=True,
            ready=True,
            steps=unit.serving.steps,
            running=unit.serving.running,
            waiting=unit.serving.waiting,
        )
        if unit.cut_until > now:
            sample = UNREACHABLE
        record = judge(record, sample, now, self._settings.stall_timeout_s)
        self._records[unit.id] = unit.life, record
        if well and record.verdict is Verdict.READY:
            del self._records[unit.id]
        return record.verdict

    def _write_endpoints(
        self,
        groups: Sequence[GroupObservation],
        ready: set[str],
        step: Plan,
        decision: Decision,
        now: float,
    ) -> None:
        """Write the endpoints with the share of each revision, and note who is on the way out."""
        known = {one.replica: one for one in self._state.endpoints}
        revisions = [group.spec.revision for group in groups if group.spec is not None]
        shares, mirrors = split_of(decision, self._state.endpoints, revisions)
        endpoints: list[Endpoint] = []
        for group in groups:
            number = 0 if group.spec is None else group.spec.revision
            how = shares.get(number), mirrors.get(number, 0.0)
            for replica in group.replicas:
                if replica.id not in ready or replica.id in step.leaving:
                    continue
                one = known.get(replica.id)
                if one is None or (one.share, one.mirror) != how:
                    name = self._state.revisions.deployment.spec.name
                    one = Endpoint(name, replica.id, replica.url or "", number, 1.0, *how)
                endpoints.append(one)
        among = {replica.id for group in groups for replica in group.replicas}
        self._drains.note(among, step.leaving, {*known, *ready}, now)
        self._drains.keep_only(among)
        written = tuple(endpoints)
        if written != self._state.endpoints:
            self._state.put_endpoints(written, POLL_INTERVAL_S)

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Apply):
            self._fleet.apply(action.spec)
        else:
            self._fleet.delete(action.name)
