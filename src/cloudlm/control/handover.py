"""What a control that begins knows of replicas which an earlier one has looked at. Pure.

Without it a replica that served for days and hangs now would be one that never answered, and would
be given the time of a start. Must not look at replicas or judge them: ``probe`` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cloudlm.control.plan import group_name
from cloudlm.control.probe import START_TIMEOUT_S, ProbeRecord, Verdict
from cloudlm.core.deployment import (
    Deployment,
    DeploymentStatus,
    Endpoint,
    Replica,
    ReplicaState,
)

Life = tuple[int | None, int, str | None]
"""What tells one life of a replica from the next."""


def life_of(replica: Replica) -> Life:
    """The life that a replica is in."""
    return replica.pid, replica.restarts, replica.url


def handed_over(
    statuses: Iterable[DeploymentStatus], endpoints: Iterable[Endpoint]
) -> dict[str, tuple[Life, Verdict]]:
    """The replicas that had answered, each with the life in which it did and what it was.

    Statuses say it. An endpoint does too if its replica is in the same life still: it is written
    a moment before the status is, and taken back when a life ends.
    """
    serving = {one.replica for one in endpoints}
    found: dict[str, tuple[Life, Verdict]] = {}
    for status in statuses:
        for one in status.replicas:
            if one.state is ReplicaState.SLEEPING:
                found[one.id] = life_of(one), Verdict.SLEEPING
            elif one.state is ReplicaState.READY or one.id in serving:
                found[one.id] = life_of(one), Verdict.READY
    return found


def serving_of(
    deployments: Iterable[Deployment], endpoints: Mapping[str, Iterable[Endpoint]]
) -> dict[str, dict[str, str]]:
    """By driver the groups of the replicas that served when the control before us stopped, as far
    as the deployments tell: those of their newest revisions."""
    found: dict[str, dict[str, str]] = {}
    for one in deployments:
        group = group_name(one.spec.name, one.revision)
        for endpoint in endpoints.get(one.spec.name, ()):
            if endpoint.revision == one.revision:
                found.setdefault(one.spec.driver, {})[endpoint.replica] = group
    return found


def first_record(
    replica: Replica, handed: Mapping[str, tuple[Life, Verdict]], now: float, wall_now: float
) -> ProbeRecord:
    """What is known of a replica that this control looks at for the first time, or that began a new
    life; ``now`` is monotonic, ``wall_now`` Unix seconds. One that answered before has to answer as
    if nothing had happened in between. Another one has what is left of the time of a start since
    its process began, however often control began anew meanwhile."""
    life, verdict = handed.get(replica.id, (None, Verdict.NOT_READY))
    if life == life_of(replica):
        return ProbeRecord(now, answered=True, verdict=verdict)
    ran_s = wall_now - replica.started_at if replica.started_at else 0.0
    return ProbeRecord(now, start_left_s=min(max(START_TIMEOUT_S - ran_s, 0.0), START_TIMEOUT_S))
