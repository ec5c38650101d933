"""Database rows as facts and facts as rows. No database is touched here."""

from __future__ import annotations

import json
from dataclasses import asdict
from operator import attrgetter
from typing import Any, get_type_hints

import sqlalchemy as sa

from cloudlm.core.access import CustomRole, Identity, Principal, Project, Tenant
from cloudlm.core.deployment import (
    Demand,
    Deployment,
    DeploymentPhase,
    DeploymentStatus,
    Endpoint,
    Residence,
)
from cloudlm.core.job import Job, JobState
from cloudlm.core.pace import Pace
from cloudlm.core.rollout import Outcome as RevisionOutcome
from cloudlm.core.rollout import Revision, Rollout
from cloudlm.core.tenant import KeyRecord, LedgerRow, Outcome
from cloudlm.state.documents import (
    dump,
    dump_pace,
    dump_replicas,
    dump_spec,
    load_limits,
    load_object,
    load_replicas,
    load_rollout,
    load_spec,
)
from cloudlm.state.tables import is_storable, storable

Values = dict[str, Any]
DatabaseRow = sa.Row[Any]


def deployment_values(deployment: Deployment) -> Values:
    return {
        "name": deployment.spec.name,
        "spec": dump_spec(deployment.spec),
        "generation": deployment.generation,
        "revision": deployment.revision,
        "deleting": deployment.deleting,
        "created_at": deployment.created_at,
        "updated_at": deployment.updated_at,
        "last_revision": deployment.last_revision,
    }


def deployment_of(row: DatabaseRow) -> Deployment:
    return Deployment(
        spec=load_spec(row.spec),
        generation=row.generation,
        revision=row.revision,
        deleting=row.deleting,
        created_at=row.created_at,
        updated_at=row.updated_at,
        last_revision=row.last_revision,
    )


def revision_values(name: str, revision: Revision) -> Values:
    return {
        "name": name,
        "number": revision.number,
        "spec": dump_spec(revision.spec),
        "created_at": revision.created_at,
        "by": revision.by,
        "outcome": revision.outcome.value,
        "reason": revision.reason,
        "ended_at": revision.ended_at,
        "model": revision.model,
        "adapters": dump(dict(revision.adapters)),
        "scores": revision.scores,
        "score_total": revision.score_total,
    }


def revision_of(row: DatabaseRow) -> Revision:
    values = row._asdict()
    del values["name"]
    values["spec"] = load_spec(row.spec)
    values["outcome"] = RevisionOutcome(row.outcome)
    values["adapters"] = load_object(row.adapters)
    return Revision(**values)


def rollout_values(rollout: Rollout) -> Values:
    return {"name": rollout.name, "document": dump(asdict(rollout))}


def rollout_of(row: DatabaseRow) -> Rollout:
    return load_rollout(row.document)


def status_values(status: DeploymentStatus) -> Values:
    return {
        "name": status.name,
        "phase": status.phase.value,
        "observed_generation": status.observed_generation,
        "wanted_replicas": status.wanted_replicas,
        "ready_replicas": status.ready_replicas,
        "replicas": dump_replicas(status.replicas),
        "message": status.message,
        "updated_at": status.updated_at,
        "residence": status.residence.value,
        "memory_bytes": status.memory_bytes,
    }


def status_of(row: DatabaseRow) -> DeploymentStatus:
    values = row._asdict()
    values["phase"] = DeploymentPhase(row.phase)
    values["replicas"] = load_replicas(row.replicas)
    values["residence"] = Residence(row.residence)
    return DeploymentStatus(**values)


def endpoint_values(endpoint: Endpoint) -> Values:
    return asdict(endpoint)


def endpoint_of(row: DatabaseRow) -> Endpoint:
    return Endpoint(**row._asdict())


def demand_values(demand: Demand) -> Values:
    return asdict(demand)


def demand_of(row: DatabaseRow) -> Demand:
    return Demand(**row._asdict())


def pace_values(pace: Pace) -> Values:
    return {"deployment": pace.deployment, "model": pace.model, "document": dump_pace(pace)}


def key_values(record: KeyRecord) -> Values:
    values = {**asdict(record), "role": str(record.role)}
    return {**values, "models": dump(list(record.models)), "limits": dump(values["limits"])}


def key_of(row: DatabaseRow) -> KeyRecord:
    models = tuple(str(name) for name in json.loads(row.models))
    return KeyRecord(**{**row._asdict(), "models": models, "limits": load_limits(row.limits)})


def identity_values(fact: Identity) -> Values:
    """The columns by which it is found, and the whole as a document."""
    return {**_found_by(fact), "document": dump(asdict(fact))}


def _found_by(fact: Identity) -> Values:
    match fact:
        case Tenant():
            return {"name": fact.name}
        case Project():
            return {"tenant": fact.tenant, "name": fact.name}
        case Principal():
            return {"id": fact.id}
        case CustomRole():
            return {"scope": fact.scope, "name": fact.name}


def job_values(job: Job) -> Values:
    return {
        "id": job.id,
        "kind": job.kind,
        "arguments": dump(dict(job.arguments)),
        "state": job.state.value,
        "progress": job.progress,
        "message": job.message,
        "result": dump(dict(job.result)),
        "error": None if job.error is None else dump(dict(job.error)),
        "created_at": job.created_at,
        "updated_at": job.updated_at,
    }


def job_of(row: DatabaseRow) -> Job:
    values = row._asdict()
    values["state"] = JobState(row.state)
    values["arguments"] = load_object(row.arguments)
    values["result"] = load_object(row.result)
    values["error"] = None if row.error is None else load_object(row.error)
    return Job(**values)


LEDGER_COLUMNS = LedgerRow.__struct_fields__
_OUTCOME = LEDGER_COLUMNS.index("outcome")
_read = attrgetter(*LEDGER_COLUMNS)
_read_texts = attrgetter(
    *(name for name, kind in get_type_hints(LedgerRow).items() if kind in (str, Outcome))
)


def ledger_values(row: LedgerRow) -> list[Any]:
    """In the order of LEDGER_COLUMNS."""
    values = list(_read(row))
    values[_OUTCOME] = row.outcome._value_  # the same as ``value``, slow until Python 3.12
    # One look at all of them: a row is written for each attempt, and few have anything to escape.
    whole = "".join(_read_texts(row))
    if not is_storable(whole):
        values = [storable(value) if type(value) is str else value for value in values]
    return values


def ledger_of(row: DatabaseRow) -> LedgerRow:
    return LedgerRow(**{**row._asdict(), "outcome": Outcome(row.outcome)})
