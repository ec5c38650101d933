"""Where a roll-out stands, as people are told of it: out of the state alone. Writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from cloudlm.control.misfits import NEVER
from cloudlm.control.plan import revision_of
from cloudlm.control.releases import read_signals
from cloudlm.control.rollout import Facts, aligned, decide, is_staged
from cloudlm.control.signals import Signals, quantile
from cloudlm.core.deployment import Deployment, DeploymentStatus, ReplicaState
from cloudlm.core.health import is_hopeless
from cloudlm.core.rollout import Kind, Outcome, stages_of
from cloudlm.core.wire_rollout import RolloutView, SideView
from cloudlm.state.base import State


async def view_of(state: State, deployment: Deployment, now: float) -> RolloutView:
    """Where a deployment's roll-out stands, out of what the state knows. Writes nothing."""
    name, strategy = deployment.spec.name, deployment.spec.rollout
    kept, status = await state.get_rollout(name), await state.get_status(name)
    history = await state.list_revisions(name)
    facts = _told(deployment, status, {one.number: one.outcome for one in history})
    known = aligned(deployment, kept, facts.outcomes, now)
    if known.under_way and known.since:
        new, old = await read_signals(state, known, history)
        facts = replace(facts, new=new, old=old)
    decision = decide(deployment, kept, facts, now)
    rollout = decision.rollout
    staged = rollout.under_way and is_staged(strategy, rollout)
    return RolloutView(
        name=name,
        kind=Kind.ROLLING if rollout.under_way and rollout.plain else strategy.kind,
        stable=rollout.stable,
        target=rollout.target,
        paused=bool(rollout.paused_at),
        step=rollout.stage + 1 if staged else 0,
        steps=len(stages_of(strategy)) if staged else 0,
        percent=100.0 * decision.shares.get(rollout.target, 0.0) if staged else 0.0,
        mirror_percent=100.0 * decision.mirrors.get(rollout.target, 0.0),
        since=rollout.since,
        note=_said(decision.note, status),
        waits=decision.waits,
        sides=(
            (_side(rollout.stable, facts.old), _side(rollout.target, facts.new)) if staged else ()
        ),
    )


def _told(
    deployment: Deployment, status: DeploymentStatus | None, outcomes: Mapping[int, Outcome]
) -> Facts:
    """The facts as the last status tells them."""
    name, dead = deployment.spec.name, 0
    present: Counter[int] = Counter()
    ready: Counter[int] = Counter()
    for one in status.replicas if status is not None else ():
        number = revision_of(name, one.id)
        if number is not None:
            present[number] += 1
            answers = one.state in (ReplicaState.READY, ReplicaState.SLEEPING)
            ready[number] += answers
            dead += number == deployment.revision and not answers and is_hopeless(one)
    wanted = 0 if status is None else status.wanted_replicas
    endpoints = len(deployment.spec.endpoints)
    return Facts(wanted, present, ready, outcomes, endpoints=endpoints, dead=dead)


def _said(note: str, status: DeploymentStatus | None) -> str:
    """The note, with what control alone can add to it: it knows the memory, too."""
    said = "" if status is None else status.message
    return said if note and (said.startswith(f"{note};") or NEVER in said) else note


def _side(number: int, known: Signals) -> SideView:
    return SideView(
        number,
        known.attempts,
        known.failed,
        quantile(known.ttft_s),
        quantile(known.latency_s),
        known.scores,
        known.score,
    )
