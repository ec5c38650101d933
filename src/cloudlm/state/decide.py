"""The rules of the state contract as pure functions that both twins apply: what a write makes of
what is there. No I/O."""

from __future__ import annotations

from dataclasses import replace

from cloudlm.core.deployment import Deployment, DeploymentSpec
from cloudlm.core.errors import Conflict
from cloudlm.core.job import Job
from cloudlm.core.tenant import KeyRecord


def changed_deployment(
    current: Deployment | None, spec: DeploymentSpec, now: float, expected_generation: int | None
) -> Deployment:
    """The deployment after ``put_deployment``; ``current`` itself if nothing changes.

    Raises Conflict if ``expected_generation`` is not the one that is there (0: none).
    """
    found = 0 if current is None else current.generation
    if expected_generation is not None and expected_generation != found:
        raise Conflict(_generation_message(spec.name, current, expected_generation))
    if current is None:
        return Deployment(spec, created_at=now, updated_at=now)
    return current.changed(spec, now)


def deleting_deployment(current: Deployment, now: float) -> Deployment:
    """The deployment after ``mark_deleting``; ``current`` itself if that was asked before."""
    if current.deleting:
        return current
    return replace(current, generation=current.generation + 1, deleting=True, updated_at=now)


def revoked_key(record: KeyRecord, now: float) -> KeyRecord:
    """The record after ``revoke_key``; the first date stays."""
    return record if record.revoked_at is not None else replace(record, revoked_at=now)


def check_job_change(current: Job | None, job: Job) -> bool:
    """Whether ``put_job`` has anything to write. Raises Conflict if the job has ended."""
    if current == job:
        return False
    if current is not None and current.state.ended:
        raise Conflict(f"job {job.id[:80]!r} has ended ({current.state.value}); it cannot change")
    return True


def key_exists(key_id: str) -> Conflict:
    return Conflict(f"a key with the id {key_id[:80]!r} exists already")


def _generation_message(name: str, current: Deployment | None, expected: int) -> str:
    if current is None:
        return f"deployment {name!r} does not exist; generation {expected} was expected"
    if expected == 0:
        ending = " and is being deleted" if current.deleting else ""
        return f"deployment {name!r} exists already (generation {current.generation}){ending}"
    return (
        f"deployment {name!r} is at generation {current.generation}, not {expected}: "
        "it changed meanwhile; read it again"
    )
