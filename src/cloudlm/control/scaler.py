"""How many replicas each deployment is to have: gathers the facts for ``autoscale`` and remembers.

Measures how long replicas take to start, keeps each version's pace in the state, so that a restart
of control loses none of it, and notices at once when somebody asks for a deployment that has no
replica. Must not decide by itself or touch replicas.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from cloudlm.control.autoscale import Fleet, ScaleMemory, autoscale
from cloudlm.control.heard import Ear
from cloudlm.control.observe import Seen
from cloudlm.control.plan import group_name
from cloudlm.control.starts import Starts, awaited_s
from cloudlm.core.clock import Clock
from cloudlm.core.deployment import Demand, Deployment, GroupObservation, Replica
from cloudlm.core.errors import CloudlmError
from cloudlm.core.health import is_hopeless
from cloudlm.core.pace import Pace
from cloudlm.state.base import State
from cloudlm.state.news import News, PolledNews
from cloudlm.telemetry.logs import get_logger

HURRY_S = 0.1
SAVE_EVERY_S = 60.0
_log = get_logger(__name__)


class Scaler:
    """What is remembered of every deployment; all but the paces is lost with the process. ``news``
    tells when somebody may ask for a deployment without a replica."""

    def __init__(self, state: State, clock: Clock, news: News | None = None) -> None:
        self._state = state
        self._clock = clock
        self._news = news or PolledNews(clock)
        self._wanted: dict[str, int] = {}
        self._memory: dict[str, ScaleMemory] = {}
        self._why: dict[str, str] = {}
        self._paces: dict[tuple[str, str], Pace] = {}
        self._has_recalled = False
        self._saved: dict[tuple[str, str], tuple[float, Pace]] = {}
        self._starts = Starts()
        self._resting: dict[str, frozenset[str]] = {}  # with the models that each serves
        self._hurried: set[str] = set()
        self.ear = Ear(state, clock)

    async def recall(self) -> None:
        """At the first pass: the paces that an earlier control measured, and what it had serve."""
        if not self._has_recalled:
            self._starts.recall(one.replica for one in await self._state.list_endpoints())
            self._paces = {(p.deployment, p.model): p for p in await self._state.list_paces()}
            self._has_recalled = True

    def why(self, name: str) -> str:
        """How the number wanted last changed, for people; empty if it has not yet."""
        return self._why.get(name, "")

    def forget(self, name: str) -> None:
        """The deployment is gone."""
        for known in (self._wanted, self._memory, self._why):
            known.pop(name, None)
        for key in [key for key in (*self._paces, *self._saved) if key[0] == name]:
            self._paces.pop(key, None)
            self._saved.pop(key, None)
        self._resting.pop(name, None)
        self._hurried.discard(name)

    def keep_only(self, existing: Collection[str]) -> None:
        """Forget replicas that exist no longer."""
        self._starts.keep_only(existing)

    def wanted(
        self,
        deployment: Deployment,
        demand: Sequence[Demand],
        groups: Sequence[GroupObservation],
        seen: Seen,
        recalled: int,
        aside: Collection[str] = (),
    ) -> int:
        """The replicas wanted now. ``recalled`` is what an earlier control wanted; ``aside`` are
        replicas that get no requests, beside a revision that gets them all. Endpoints of others are
        not scaled, and count for nothing where replicas of ours are."""
        name = deployment.spec.name
        if deployment.spec.endpoints:
            self._wanted.pop(name, None)
            self._why.pop(name, None)
            self._note(deployment, at_rest=False, hurried=False)
            return len(deployment.spec.endpoints)
        foreign = [one for one in groups if one.spec is not None and one.spec.endpoints]
        groups = [one for one in groups if one not in foreign]
        now, wall_s = self._clock.monotonic(), self._clock.now()
        # Without a replica of ours, what was wanted before were endpoints.
        current = self._wanted.get(name, recalled if groups or not foreign else 0)
        memory = self._memory.get(name, ScaleMemory())
        replicas = [one for group in groups for one in group.replicas]
        ended = self._starts.look(replicas, seen, now, wall_s)
        memory = replace(memory, pace=self._pace(deployment, groups, memory.pace, ended))
        known_s = self._starts.ages_s(now)
        ages_s = _awaited(replicas, known_s, memory.pace.start_s)
        fleet = replace(_fleet(groups, seen, current, ages_s, aside), wall_s=wall_s)
        wanted, memory = autoscale(deployment.spec, demand, current, memory, now, fleet)
        if wanted != current and name in self._wanted:
            self._why[name] = f"{current} → {wanted} replicas; {memory.why}"
        elif wanted == 0 and not deployment.deleting:
            self._why[name] = memory.why
        self._wanted[name], self._memory[name] = wanted, memory
        busy = any(one.ongoing or one.requests_per_s for one in demand)
        answering = fleet.ready or _ready(foreign, seen, aside)
        self._note(deployment, at_rest=wanted == 0, hurried=busy and wanted > 0 and not answering)
        return wanted

    def unloaded(self, deployment: Deployment) -> None:
        """It has and gets no replica now, whatever is wanted: news of somebody who asks for it is
        looked for, and nothing is hurried."""
        self._note(deployment, at_rest=True, hurried=False)

    async def save(self) -> None:
        """Bring what was measured into the state: starts at once, the rest now and then."""
        now = self._clock.monotonic()
        for memory in self._memory.values():
            pace = memory.pace
            key = pace.deployment, pace.model
            at, before = self._saved.get(key, (now - SAVE_EVERY_S, Pace()))
            old = now - at >= SAVE_EVERY_S or before.start_s != pace.start_s
            measured = pace.model and (pace.start_s or pace.weight)
            if not measured or pace == before or not old:
                continue
            try:
                await self._state.put_pace(pace)
                self._saved[key] = now, pace
            except CloudlmError as error:
                fields = {"deployment": pace.deployment, "reason": error.message}
                _log.warning("pace_not_written", extra={"fields": fields})
                return

    @property
    def hurried(self) -> frozenset[str]:
        """The deployments for whose first replica requests wait."""
        return frozenset(self._hurried)

    async def pause(self, interval_s: float, *, hurry: bool = True) -> None:
        """Wait for the next pass: less while requests wait for a first replica, unless its becoming
        ready is told of anyhow (``hurry`` False), and no longer than until somebody asks for a
        deployment that has none."""
        if self._hurried and hurry:
            await self._clock.sleep(min(interval_s, HURRY_S))
            return
        until = self._clock.monotonic() + interval_s
        while (left_s := until - self._clock.monotonic()) > 0:
            if not self._resting:
                await self._clock.sleep(left_s)
                continue
            await self._news.wait(left_s)
            if await self._is_called():
                return

    def _note(self, deployment: Deployment, *, at_rest: bool, hurried: bool) -> None:
        spec = deployment.spec
        self._resting.pop(spec.name, None)
        self._hurried.discard(spec.name)
        if at_rest and not deployment.deleting:
            self._resting[spec.name] = frozenset((spec.name, *spec.adapters))
        if hurried:
            self._hurried.add(spec.name)

    async def _is_called(self) -> bool:
        """Whether there is news of anybody who asks for a deployment at rest."""
        try:
            if await self._state.demand_mark() == self.ear.mark:
                return False
            found = await self.ear.fresh()
        except CloudlmError:
            return False  # the next pass will say what is wrong
        served = frozenset[str]().union(*self._resting.values())
        return any(d.model in served and (d.ongoing or d.requests_per_s) for d in found)

    def _pace(
        self,
        deployment: Deployment,
        groups: Sequence[GroupObservation],
        pace: Pace,
        ended: Mapping[str, float],
    ) -> Pace:
        """The pace of the version that the newest revision runs, with its starts that ``ended``
        just now. One never seen begins with that of the version before, which is likely to be like
        it."""
        name = deployment.spec.name
        group = group_name(name, deployment.revision)
        spec = next((one.spec for one in groups if one.name == group and one.spec), None)
        known = self._paces
        if spec is not None and (pace.deployment, pace.model) != (name, spec.model):
            if pace.model:  # an undo may come back to it
                known[pace.deployment, pace.model] = pace
            found = known.get((name, spec.model))
            pace = found or replace(pace, deployment=name, model=spec.model)
        elif spec is None and not pace.deployment:
            like = [one for one in known.values() if one.deployment == name]
            own = [one for one in like if one.model == deployment.spec.model]
            pace = next(iter((*own, *like)), pace)
        for replica in next((one.replicas for one in groups if one.name == group), ()):
            if replica.id in ended:
                pace = pace.started(max(ended[replica.id], 0.001))
        return pace


def _ready(groups: Sequence[GroupObservation], seen: Seen, aside: Collection[str]) -> int:
    """How many replicas answer and get requests."""
    ids = [one.id for group in groups for one in group.replicas]
    return sum(one in seen.ready and one not in aside for one in ids)


def _awaited(
    replicas: Sequence[Replica], ages_s: Mapping[str, float], start_s: float
) -> dict[str, float]:
    """Of the ages of replicas that are starting those of which an answer is still expected: not of
    one that crashes again and again, nor of one that takes far longer than others did."""
    hopeful = [one.id for one in replicas if not is_hopeless(one)]
    limit_s = awaited_s(start_s)
    return {one: ages_s[one] for one in hopeful if ages_s.get(one, math.inf) <= limit_s}


def _fleet(
    groups: Sequence[GroupObservation],
    seen: Seen,
    current: int,
    ages_s: Mapping[str, float],
    aside: Collection[str],
) -> Fleet:
    """What is known of the replicas, those of older revisions that still answer included, as long
    as they get requests. ``ages_s`` are those of all that are expected to answer soon."""
    replicas = [one.id for group in groups for one in group.replicas if one.id not in aside]
    ready = [one for one in replicas if one in seen.ready]
    silent = [one for one in replicas if one not in seen.ready and one not in seen.sleeping]
    expected = max(current - len(ready), 0)
    ages = sorted((ages_s[one] for one in silent if one in ages_s), reverse=True)[:expected]
    lost = min(sum(one not in ages_s for one in silent), expected - len(ages))
    ages += [0.0] * (expected - len(ages) - lost)  # asked for, and not seen yet
    heard = sum(one in seen.busy for one in ready)
    missing = len(ready) - heard if heard else 0  # drivers that answer for replicas say nothing
    return Fleet(len(ready), tuple(ages), missing, lost=lost)
