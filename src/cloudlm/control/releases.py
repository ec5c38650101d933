"""Carries out what ``rollout`` decides: reads its facts, keeps what it must not forget, and says
which groups shall run.

Everything that counts lies in the state, so that nothing is lost with the process; what is kept
here only saves reading. Must not start, stop or address replicas: ``reconcile`` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from cloudlm.control.external import check_secrets
from cloudlm.control.jumps import Jumps
from cloudlm.control.plan import Plan, desired_group, group_name, plan, plan_hold, plan_target
from cloudlm.control.rollout import Decision, Facts, aligned, decide, is_staged
from cloudlm.control.room import Moving, beside
from cloudlm.control.signals import (
    LATEST,
    NOTHING_KNOWN,
    STABLE_LOOKS_BACK_S,
    Signals,
    signals_of,
)
from cloudlm.control.status import readable
from cloudlm.core.clock import Clock
from cloudlm.core.deployment import (
    Deployment,
    Endpoint,
    GroupObservation,
    Replica,
    running,
)
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.health import is_hopeless
from cloudlm.core.rollout import Order, Revision, Rollout
from cloudlm.security.credentials import Credentials
from cloudlm.state.base import State
from cloudlm.telemetry.logs import get_logger

JUDGE_EVERY_S = 2.0
Versions = tuple[str, dict[str, str]]
"""The fixed version of a model, and those of its adapters by name."""
_log = get_logger(__name__)


class Releases:
    """The roll-outs of all deployments."""

    def __init__(self, state: State, clock: Clock, credentials: Credentials | None = None) -> None:
        self._state = state
        self._clock = clock
        self._credentials = credentials
        self._kept: dict[str, Rollout] = {}
        self._history: dict[str, list[Revision]] = {}
        self._judged: dict[str, tuple[float, Rollout, Signals, Signals]] = {}
        self._jumps = Jumps(clock)
        self._has_looked = False

    async def look(self, deployments: Iterable[Deployment]) -> dict[str, set[str]]:
        """Read where all roll-outs stand. Returns by deployment the drivers that its revisions ran
        on, as far as they were read."""
        self._jumps.look([name for name, one in self._kept.items() if one.under_way])
        self._kept = {one.name: one for one in await self._state.list_rollouts()}
        self._history = {}
        for one in deployments:
            kept = self._kept.get(one.spec.name)
            settled = kept is not None and kept.target == kept.stable == one.revision
            # At first even of what is settled: the control before may have left anything behind.
            if not (settled and self._has_looked):
                name = one.spec.name
                self._history[name] = await self._state.list_revisions(name)
        self._judged = {k: v for k, v in self._judged.items() if k in self._kept}
        self._has_looked = True
        return {name: {one.spec.driver for one in of} for name, of in self._history.items()}

    def sized(self, deployment: Deployment) -> Deployment:
        """Whose bounds say how many replicas are wanted: the deployment's, or those of its stable
        revision while that stands whole beside endpoints of others, which are as many as they
        are."""
        name = deployment.spec.name
        if not deployment.spec.endpoints or deployment.deleting:
            return deployment
        moving = self._aligned(deployment)
        stable = self._revision(name, moving.stable)
        staged = moving.under_way and is_staged(deployment.spec.rollout, moving)
        if not staged or stable is None or stable.spec.endpoints:
            return deployment
        return replace(deployment, spec=stable.spec, revision=stable.number)

    def moving(self, deployment: Deployment, wanted: int) -> Moving:
        """What a deployment's roll-out wants to run where so many replicas are ``wanted``."""
        rollout = self._aligned(deployment)
        stable = self._revision(deployment.spec.name, rollout.stable)
        return Moving(rollout.stable, stable, beside(deployment, rollout, wanted))

    def _aligned(self, deployment: Deployment) -> Rollout:
        name = deployment.spec.name
        outcomes = {one.number: one.outcome for one in self._history.get(name, ())}
        return aligned(deployment, self._kept.get(name), outcomes, self._clock.now())

    async def decide(
        self,
        deployment: Deployment,
        groups: Sequence[GroupObservation],
        answering: Collection[str],
        wanted: int,
        no_room: bool = False,
        never: str = "",
    ) -> Decision:
        """What a deployment's roll-out does next; kept before it is told. ``no_room``: the memory
        has none for all replicas; ``never``: why it never will. Raises Conflict if somebody else
        moved it at this moment."""
        name, now = deployment.spec.name, self._clock.now()
        before = self._kept.get(name)
        stood = self._jumps.moved(before)
        facts = _facts(deployment, groups, answering, wanted, self._history.get(name, ()))
        facts = replace(facts, no_room=no_room, never=never)
        if stood is not None:
            new, old = await self._signals(deployment, stood)
            facts = replace(facts, new=new, old=old)
        decision = decide(deployment, stood, facts, now)
        for number, outcome, reason in decision.ended:
            await self._state.end_revision(name, number, outcome, reason=reason, now=now)
            fields = {"deployment": name, "revision": number, "outcome": outcome.value}
            _log.info("revision_ended", extra={"fields": {**fields, "reason": reason}})
        if decision.rollout != before:
            await self._state.put_rollout(decision.rollout, replaces=before)
            self._kept[name] = decision.rollout
        self._jumps.settle(name)
        if decision.back:
            return await self._go_back(deployment, decision)
        return decision

    def plan(
        self,
        deployment: Deployment,
        decision: Decision,
        wanted: int,
        groups: Sequence[GroupObservation],
        answering: Collection[str],
        versions: Versions,
    ) -> Plan:
        """The next step of a deployment's groups. ``versions`` are those of its revision."""
        stable = self._revision(deployment.spec.name, decision.rollout.stable)
        if decision.hold or (decision.size == 0 and stable is None):
            serving = group_name(deployment.spec.name, decision.rollout.stable)
            return plan_hold(groups, wanted, serving)
        if decision.size is None or stable is None:
            answering = _not_given_up(decision, groups, answering)
            return plan(deployment, wanted, groups, answering, *versions)
        target = desired_group(deployment, versions[0], decision.size, versions[1])
        spec = replace(stable.spec, max_surge=deployment.spec.max_surge)
        others = [group for group in groups if group.name != target.name]
        older = Deployment(spec, deployment.generation, stable.number)
        step = plan(older, wanted, others, answering, *_versions(stable, groups))
        return Plan((*step.actions, *plan_target(target, groups, answering).actions))

    async def versions(self, name: str, number: int) -> Versions | None:
        """The fixed versions that a revision ran before, None if it never ran."""
        if name not in self._history:
            self._history[name] = await self._state.list_revisions(name)
        found = self._revision(name, number)
        return (found.model, dict(found.adapters)) if found is not None and found.model else None

    async def fix(self, name: str, number: int, versions: Versions) -> None:
        """A revision runs these versions from now on, whatever its addresses come to mean."""
        await self._state.fix_revision(name, number, model=versions[0], adapters=versions[1])

    async def abort(self, deployment: Deployment) -> None:
        """Go back if that was ordered, though nobody can see now what runs: where a driver is away
        for good, there is no other way out. Raises what ``decide`` does."""
        rollout = self._aligned(deployment)
        ordered = rollout.order is Order.ABORT and rollout.under_way and rollout.stable
        if ordered and not deployment.deleting:
            await self.decide(deployment, (), (), 0)

    def homes(self, deployment: Deployment) -> dict[str, str]:
        """The drivers of the groups between which a roll-out moves, towards what is asked for
        now: a driver that nothing is asked of any more hinders nothing."""
        name, rollout = deployment.spec.name, self._aligned(deployment)
        if not rollout.under_way:
            return {}
        moved = (rollout.stable, rollout.target)
        return {
            group_name(name, one.number): one.spec.driver
            for one in self._history.get(name, ())
            if one.number in moved
        }

    def _revision(self, name: str, number: int) -> Revision | None:
        return next((one for one in self._history.get(name, ()) if one.number == number), None)

    async def _go_back(self, deployment: Deployment, decision: Decision) -> Decision:
        """Ask again for the stable revision. If its endpoints may not use their keys any more,
        that is said instead, and the target gets no further request all the same."""
        stable = self._revision(deployment.spec.name, decision.rollout.stable)
        try:
            if stable is not None and stable.spec.endpoints:
                spec = running(stable.spec, over=deployment.spec)
                await asyncio.to_thread(check_secrets, spec, self._credentials)
            await self._return(deployment, decision)
        except InvalidRequest as error:
            number = decision.rollout.stable
            note = f"{decision.back}; cannot go back to revision {number}: {error.message}"
            return replace(decision, note=note)
        return decision

    async def _return(self, deployment: Deployment, decision: Decision) -> None:
        name = deployment.spec.name
        await self._state.return_to(
            name,
            decision.rollout.stable,
            reason=decision.back,
            now=self._clock.now(),
            expected_generation=deployment.generation,
        )
        fields = {"deployment": name, "revision": deployment.revision, "reason": decision.back}
        _log.warning("revision_rolled_back", extra={"fields": fields})

    async def _signals(self, deployment: Deployment, kept: Rollout) -> tuple[Signals, Signals]:
        """Those of the target since its stage began, and of the stable revision."""
        staged = kept.under_way and is_staged(deployment.spec.rollout, kept)
        if not staged or not kept.since or kept.target != deployment.revision:
            return NOTHING_KNOWN, NOTHING_KNOWN
        name, now = kept.name, self._clock.monotonic()
        known = self._judged.get(name)
        if known is not None and known[1] == kept and now - known[0] < JUDGE_EVERY_S:
            return known[2], known[3]
        new, old = await read_signals(self._state, kept, self._history.get(name, ()))
        self._judged[name] = (now, kept, new, old)
        return new, old


async def read_signals(
    state: State, rollout: Rollout, history: Sequence[Revision]
) -> tuple[Signals, Signals]:
    """What is known of the target since its stage's traffic began, and of the stable revision."""
    found = []
    for number, since in (
        (rollout.target, rollout.since),
        (rollout.stable, max(rollout.since - STABLE_LOOKS_BACK_S, 0.0)),
    ):
        group = group_name(rollout.name, number)
        rows = await state.latest_attempts(group, since=since, limit=LATEST)
        noted = next((one for one in history if one.number == number), None)
        scores = (0, 0.0) if noted is None else (noted.scores, noted.score_total)
        found.append(signals_of(rows, *scores))
    return found[0], found[1]


def split_of(
    decision: Decision | None, endpoints: Collection[Endpoint], revisions: Iterable[int]
) -> tuple[Mapping[int, float | None], Mapping[int, float]]:
    """The shares and the mirrors of ``revisions``. Without a decision those that ``endpoints`` have
    stay, and a revision that has none there gets no requests beside them."""
    if decision is not None:
        return decision.shares, decision.mirrors
    shares = {one.revision: one.share for one in endpoints}
    rest = 0.0 if any(share is not None for share in shares.values()) else None
    mirrors = {one.revision: one.mirror for one in endpoints}
    return {revision: shares.get(revision, rest) for revision in revisions}, mirrors


def _not_given_up(
    decision: Decision, groups: Sequence[GroupObservation], answering: Collection[str]
) -> Collection[str]:
    """Of the replicas that answer, those that may get requests: what was given up takes the place
    of nobody who serves, and goes first."""
    given_up = {
        replica.id
        for group in groups
        if group.spec is not None and decision.shares.get(group.spec.revision) == 0.0
        for replica in group.replicas
    }
    return [one for one in answering if one not in given_up] if given_up else answering


def _facts(
    deployment: Deployment,
    groups: Sequence[GroupObservation],
    answering: Collection[str],
    wanted: int,
    history: Iterable[Revision],
) -> Facts:
    present: dict[int, int] = {}
    ready: dict[int, int] = {}
    failing: list[Replica] = []
    sick: set[str | None] = set()
    for group in groups:
        if group.spec is None:
            continue
        number = group.spec.revision
        present[number] = len(group.replicas)
        ready[number] = sum(one.id in answering for one in group.replicas)
        silent = [one for one in group.replicas if one.id not in answering]
        hopeless = [one for one in silent if is_hopeless(one)]
        if number == deployment.revision:
            failing = hopeless
        elif group.spec.endpoints:
            sick |= {one.url for one in hopeless}
    endpoints = len(deployment.spec.endpoints)
    # An endpoint that fails in what runs already is not the new revision's fault.
    blamed = [one for one in failing if not endpoints or one.url not in sick]
    return Facts(
        wanted,
        present,
        ready,
        {one.number: one.outcome for one in history},
        failing=_reason(blamed[0]) if blamed else "",
        endpoints=endpoints,
        dead=len(failing),
    )


def _reason(replica: Replica) -> str:
    return f"{replica.id}: {readable(replica.message) or 'it ends again and again'}"


def _versions(stable: Revision, groups: Sequence[GroupObservation]) -> Versions:
    """What the stable revision runs: its group knows best."""
    for group in groups:
        if group.spec is not None and group.spec.revision == stable.number:
            return group.spec.model, dict(group.spec.adapters)
    return stable.model, dict(stable.adapters)
