"""What people are told of a deployment: one phase, and the reason if something is wrong. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace

from cloudlm.control.plan import group_name
from cloudlm.core.deployment import (
    Deployment,
    DeploymentPhase,
    DeploymentStatus,
    GroupObservation,
    Replica,
    ReplicaState,
)
from cloudlm.core.health import is_hopeless

_ANSWERING = (ReplicaState.READY, ReplicaState.SLEEPING)
_FAILING = (ReplicaState.BACKOFF, ReplicaState.FAILED)
_MAX_MESSAGE = 500


def summarise(
    deployment: Deployment,
    wanted: int,
    groups: Sequence[GroupObservation],
    ready: Collection[str],
    leaving: Collection[str],
    problem: str,
    now: float,
    sleeping: Collection[str] = (),
    note: str = "",
) -> DeploymentStatus:
    """The status to write. ``problem`` is what hinders control itself, empty if nothing does;
    ``ready`` and ``sleeping`` are replicas that answer, and that could after waking up; ``note`` is
    said where nothing is wrong: how far a roll-out is, or how so many replicas are wanted."""
    current = group_name(deployment.spec.name, deployment.revision)
    replicas = [
        _shown(replica, ready, leaving, sleeping)
        for group in sorted(groups, key=lambda group: group.name != current)
        for replica in group.replicas
    ]
    serving = [one for one in replicas if one.state is ReplicaState.READY]
    asleep = any(one.state is ReplicaState.SLEEPING for one in replicas)
    failing = [one for one in replicas if _is_failing(one)]
    updating = any(group.name != current for group in groups)
    message = problem or (_reason(failing[0]) if failing else note)
    if not (problem or updating or deployment.deleting or deployment.spec.endpoints):
        message = "; ".join(filter(None, (message, _kept_beside(replicas, wanted))))
    return DeploymentStatus(
        name=deployment.spec.name,
        phase=_phase(deployment, wanted, len(serving), failing, updating, problem, asleep),
        observed_generation=deployment.generation,
        wanted_replicas=wanted,
        ready_replicas=len(serving),
        replicas=tuple(replicas),
        message=message[:_MAX_MESSAGE],
        updated_at=now,
    )


def last_seen(
    deployment: Deployment, before: DeploymentStatus | None
) -> tuple[list[GroupObservation], frozenset[str], frozenset[str], frozenset[str]]:
    """What was last written of a deployment whose driver cannot tell of it now: as groups, and
    which replicas were ready, leaving and sleeping: nobody knows that any of it has changed."""
    replicas = () if before is None else before.replicas
    group = group_name(deployment.spec.name, deployment.revision)
    ready, leaving, sleeping = (
        frozenset(one.id for one in replicas if one.state is state)
        for state in (ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.SLEEPING)
    )
    return [GroupObservation(group, None, replicas)], ready, leaving, sleeping


def _phase(
    deployment: Deployment,
    wanted: int,
    serving: int,
    failing: Sequence[Replica],
    updating: bool,
    problem: str,
    asleep: bool,
) -> DeploymentPhase:
    if deployment.deleting:
        return DeploymentPhase.DELETING
    if problem:
        return DeploymentPhase.DEGRADED if serving or asleep else DeploymentPhase.FAILED
    wish = deployment.spec.asleep
    if (wish is True and serving) or (wish is False and asleep):
        return DeploymentPhase.UPDATING
    if asleep and not serving:
        return DeploymentPhase.SLEEPING
    if wanted == 0 and serving == 0 and not updating:
        return DeploymentPhase.IDLE
    if serving == 0:
        hopeless = any(is_hopeless(one) for one in failing)
        return DeploymentPhase.FAILED if hopeless else DeploymentPhase.STARTING
    if failing:
        return DeploymentPhase.DEGRADED
    if updating:
        return DeploymentPhase.UPDATING
    return DeploymentPhase.READY if serving >= wanted else DeploymentPhase.DEGRADED


def _shown(
    replica: Replica,
    ready: Collection[str],
    leaving: Collection[str],
    sleeping: Collection[str],
) -> Replica:
    if replica.id in leaving:
        return replace(replica, state=ReplicaState.DRAINING)
    if replica.id in ready:
        # What once went wrong is over: the message is about now.
        return replace(replica, state=ReplicaState.READY, message="")
    if replica.id in sleeping:
        return replace(replica, state=ReplicaState.SLEEPING, message="")
    if replica.state is ReplicaState.READY:
        return replace(replica, state=ReplicaState.STARTING)
    return replica


def _kept_beside(replicas: Sequence[Replica], wanted: int) -> str:
    """Why more stay than are wanted, empty if none do (``plan``: groups shrink from their end)."""
    staying = [one for one in replicas if one.state is not ReplicaState.DRAINING]
    silent = [one.id for one in staying[:-1] if one.state not in _ANSWERING]
    last_answers = bool(staying) and staying[-1].state in _ANSWERING
    if not wanted or len(staying) <= wanted or not silent or not last_answers:
        return ""
    named = ", ".join(silent[:3]) + (", …" if len(silent) > 3 else "")
    return (
        f"{len(staying)} replicas stay where {wanted} would do: groups shrink from their end, and "
        f"before those that answer there is {named}, which does not"
    )


def _is_failing(replica: Replica) -> bool:
    crashed_before = replica.state is ReplicaState.STARTING and replica.restarts > 0
    return replica.state in _FAILING or (crashed_before and bool(replica.message))


def _reason(replica: Replica) -> str:
    return f"{replica.id}: {readable(replica.message) or replica.state.value}"


def readable(message: str) -> str:
    """A replica's last words for people: of a JSON log line only what it says."""
    head, brace, _ = message.partition("{")
    if not brace:
        return message
    try:
        line = json.loads(message[len(head) :])
    except ValueError:
        return message
    if not isinstance(line, dict):
        return message
    if line.get("level") in ("debug", "info"):
        return head.removesuffix(": ")  # what it said before it was killed is no reason
    said = line.get("reason") or line.get("error") or line.get("message") or line.get("event")
    if not isinstance(said, str) or not said.strip():
        return message
    return head + said.strip().splitlines()[-1]
