"""The control API's JSON: what each word of core looks like on the wire, both ways.

Control and client share it, so the two cannot disagree. ``…_from_body`` of a *request* (spec,
scale, import, job, alias) refuses unknown fields (UnprocessableRequest) and bad values
(InvalidRequest with ``param``). ``…_from_body`` of an *answer* checks every field that it knows
and passes over those that a newer server added. Keys and identities: ``core.wire_access``. No I/O.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cloudlm.core.deployment import (
    Deployment,
    DeploymentPhase,
    DeploymentSpec,
    DeploymentStatus,
    Replica,
    ReplicaState,
    Residence,
)
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.external import EXTERNAL, endpoints_body, endpoints_from_body
from cloudlm.core.fields import Fields, check_text
from cloudlm.core.job import Job, JobState
from cloudlm.core.model import (
    Manifest,
    address_kind,
    check_alias,
    check_name,
    manifest_from_body,
)
from cloudlm.core.placement import placement_body, placement_from_body
from cloudlm.core.price import price_body, price_from_body
from cloudlm.core.rollout import strategy_body, strategy_from_body
from cloudlm.core.routing import Policy, routing_body, routing_from_body
from cloudlm.core.scaling import scaling_body, scaling_from_body
from cloudlm.core.spec import (
    MAX_ADAPTERS,
    MAX_ADDRESS_LENGTH,
    MAX_ENTRIES,
    check_replicas,
    check_spec,
)

MAX_ARGUMENTS_BYTES = 65_536


# What the API answers with, where core has no word of its own -----------------------------------


class DeploymentView(NamedTuple):
    """A deployment as the control API shows it: what was asked, and what is known of it."""

    deployment: Deployment
    status: DeploymentStatus | None = None

    @property
    def name(self) -> str:
        return self.deployment.spec.name

    @property
    def spec(self) -> DeploymentSpec:
        return self.deployment.spec

    @property
    def generation(self) -> int:
        return self.deployment.generation

    @property
    def phase(self) -> DeploymentPhase:
        """``pending`` until control has looked at it for the first time."""
        return DeploymentPhase.PENDING if self.status is None else self.status.phase

    @property
    def settled(self) -> bool:
        """Whether the status speaks of the newest generation."""
        return self.status is not None and self.status.observed_generation >= self.generation


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model of the registry: its versions (oldest first) and its aliases."""

    name: str
    versions: tuple[Manifest, ...] = ()
    aliases: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DriverEntry:
    """One installed driver: the package that brought it and its abilities."""

    name: str
    package: str
    abilities: tuple[str, ...] = ()


# Requests ---------------------------------------------------------------------------------------


def spec_body(spec: DeploymentSpec) -> dict[str, Any]:
    """A spec as JSON; ``spec_from_body`` reads it back."""
    return {
        "name": spec.name,
        "model": spec.model,
        "driver": spec.driver,
        "engine": spec.engine,
        "min_replicas": spec.min_replicas,
        "max_replicas": spec.max_replicas,
        "target_ongoing_requests": spec.target_ongoing_requests,
        "max_surge": spec.max_surge,
        "options": dict(spec.options),
        "env": dict(spec.env),
        "asleep": spec.asleep,
        "adapters": [{"name": name, "model": model} for name, model in spec.adapters.items()],
        "prices": None if spec.prices is None else price_body(spec.prices),
        "tenant": spec.tenant,
        "routing": routing_body(spec.routing),
        "placement": None if spec.placement is None else placement_body(spec.placement),
        "rollout": strategy_body(spec.rollout),
        "scaling": scaling_body(spec.scaling),
        "endpoints": endpoints_body(spec.endpoints),
        "pinned": spec.pinned,
        "memory_mb": spec.memory_mb,
    }


def spec_from_body(body: Any, *, name: str | None = None) -> DeploymentSpec:
    """Read and check a spec from a request.

    ``name`` is the one in the path: the body may then leave it out, but not contradict it.
    """
    fields = Fields(body, "a deployment")
    if name is not None and fields.raw("name", name) != name:
        raise InvalidRequest(
            f"the body names another deployment than the path ({name!r})", param="name"
        )
    spec = _spec(fields, name)
    fields.end()
    return check_spec(spec)


def scale_body(min_replicas: int, max_replicas: int) -> dict[str, Any]:
    return {"min_replicas": min_replicas, "max_replicas": max_replicas}


def scale_from_body(body: Any) -> tuple[int, int]:
    """Read ``{"min_replicas", "max_replicas"}``."""
    fields = Fields(body, "a scale request")
    low, high = fields.integer("min_replicas"), fields.integer("max_replicas")
    fields.end()
    check_replicas(low, high)
    return low, high


def import_from_body(body: Any) -> dict[str, str]:
    """Read ``{"source", "name"?, "alias"?}``: the arguments of an import job."""
    fields = Fields(body, "an import")
    arguments = {"source": fields.text("source", low=1, max_length=MAX_ADDRESS_LENGTH)}
    address_kind(arguments["source"])
    name, alias = fields.optional_text("name"), fields.optional_text("alias")
    fields.end()
    if name is not None:
        arguments["name"] = check_name(name)
    if alias is not None:
        arguments["alias"] = check_alias(alias)
    return arguments


def alias_from_body(body: Any) -> int:
    """Read ``{"version": 3}``."""
    fields = Fields(body, "an alias")
    version = fields.integer("version", low=1, high=999_999_999)
    fields.end()
    return version


def job_request_from_body(body: Any) -> tuple[str, dict[str, Any]]:
    """Read ``{"kind", "arguments"}``; what the arguments may be is the kind's to check."""
    fields = Fields(body, "a job request")
    kind = check_name(fields.text("kind", low=1, max_length=64), "kind")
    arguments = fields.mapping("arguments", {}, max_entries=MAX_ENTRIES)
    fields.end()
    if len(json.dumps(arguments)) > MAX_ARGUMENTS_BYTES:
        raise InvalidRequest(
            f"arguments are larger than {MAX_ARGUMENTS_BYTES} bytes", param="arguments"
        )
    return kind, arguments


# Answers ----------------------------------------------------------------------------------------


def deployment_body(
    deployment: Deployment, status: DeploymentStatus | None = None
) -> dict[str, Any]:
    return {
        "spec": spec_body(deployment.spec),
        "generation": deployment.generation,
        "revision": deployment.revision,
        "deleting": deployment.deleting,
        "created_at": deployment.created_at,
        "updated_at": deployment.updated_at,
        "last_revision": deployment.last_revision,
        "status": None if status is None else status_body(status),
    }


def deployment_from_body(body: Any) -> DeploymentView:
    fields = Fields(body, "a deployment")
    status = fields.raw("status", None)
    return DeploymentView(
        Deployment(
            spec=read_spec(fields.raw("spec")),
            generation=fields.integer("generation", low=1),
            revision=fields.integer("revision", low=1),
            deleting=fields.flag("deleting"),
            created_at=fields.number("created_at"),
            updated_at=fields.number("updated_at"),
            last_revision=fields.integer("last_revision", 0),
        ),
        None if status is None else status_from_body(status),
    )


def status_body(status: DeploymentStatus) -> dict[str, Any]:
    return {
        "name": status.name,
        "phase": status.phase.value,
        "observed_generation": status.observed_generation,
        "wanted_replicas": status.wanted_replicas,
        "ready_replicas": status.ready_replicas,
        "replicas": [replica_body(replica) for replica in status.replicas],
        "message": status.message,
        "updated_at": status.updated_at,
        "residence": status.residence.value,
        "memory_bytes": status.memory_bytes,
    }


def status_from_body(body: Any) -> DeploymentStatus:
    fields = Fields(body, "a status", path="status.")
    return DeploymentStatus(
        name=fields.text("name"),
        phase=fields.choice("phase", DeploymentPhase),
        observed_generation=fields.integer("observed_generation"),
        wanted_replicas=fields.integer("wanted_replicas"),
        ready_replicas=fields.integer("ready_replicas"),
        replicas=tuple(replica_from_body(entry) for entry in fields.items("replicas", ())),
        message=fields.text("message", "", max_length=1_000_000),
        updated_at=fields.number("updated_at", 0.0),
        residence=fields.choice("residence", Residence, Residence.NONE),
        memory_bytes=fields.integer("memory_bytes", 0, high=2**62),
    )


def replica_body(replica: Replica) -> dict[str, Any]:
    return {
        "id": replica.id,
        "state": replica.state.value,
        "url": replica.url,
        "pid": replica.pid,
        "restarts": replica.restarts,
        "message": replica.message,
        "started_at": replica.started_at,
    }


def replica_from_body(body: Any) -> Replica:
    fields = Fields(body, "a replica", path="replica.")
    return Replica(
        id=fields.text("id"),
        state=fields.choice("state", ReplicaState),
        url=fields.optional_text("url"),
        pid=None if fields.raw("pid", None) is None else fields.integer("pid"),
        restarts=fields.integer("restarts", 0),
        message=fields.text("message", "", max_length=1_000_000),
        started_at=fields.number("started_at", 0.0),
    )


def job_body(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "kind": job.kind,
        "arguments": dict(job.arguments),
        "state": job.state.value,
        "progress": job.progress,
        "message": job.message,
        "result": dict(job.result),
        "error": None if job.error is None else dict(job.error),
        "created_at": job.created_at,
        "updated_at": job.updated_at,
    }


def job_from_body(body: Any) -> Job:
    fields = Fields(body, "a job")
    return Job(
        id=fields.text("id", low=1),
        kind=fields.text("kind"),
        arguments=fields.mapping("arguments", {}),
        state=fields.choice("state", JobState),
        progress=fields.number("progress", 0.0),
        message=fields.text("message", "", max_length=1_000_000),
        result=fields.mapping("result", {}),
        error=None if fields.raw("error", None) is None else fields.mapping("error"),
        created_at=fields.number("created_at", 0.0),
        updated_at=fields.number("updated_at", 0.0),
    )


def model_body(entry: ModelEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "versions": [manifest.body() for manifest in entry.versions],
        "aliases": dict(entry.aliases),
    }


def model_from_body(body: Any) -> ModelEntry:
    fields = Fields(body, "a model")
    aliases = Fields(fields.raw("aliases", {}), "aliases", path="aliases.")
    return ModelEntry(
        name=fields.text("name", low=1),
        versions=tuple(manifest_from_body(entry) for entry in fields.items("versions", ())),
        aliases={alias: aliases.integer(alias, low=1) for alias in fields.mapping("aliases", {})},
    )


def driver_body(entry: DriverEntry) -> dict[str, Any]:
    return {"name": entry.name, "package": entry.package, "abilities": sorted(entry.abilities)}


def driver_from_body(body: Any) -> DriverEntry:
    fields = Fields(body, "a driver")
    abilities = fields.items("abilities", ())
    return DriverEntry(
        fields.text("name", low=1),
        fields.text("package", "?"),
        tuple(check_text(word, "abilities", max_length=64) for word in abilities),
    )


def read_spec(body: Any) -> DeploymentSpec:
    """A spec in an answer, by type alone."""
    return _spec(Fields(body, "a spec", path="spec."), None)


def _spec(fields: Fields, name: str | None) -> DeploymentSpec:
    """Read a spec's fields by type; ``check_spec`` looks at the values."""
    options = fields.mapping("options", {}, max_entries=MAX_ENTRIES)
    env = fields.mapping("env", {}, max_entries=MAX_ENTRIES)
    prices, placement = fields.raw("prices", None), fields.raw("placement", None)
    model = fields.text("model")
    endpoints = endpoints_from_body(fields.items("endpoints", ()), model)
    return DeploymentSpec(
        name=fields.text("name") if name is None else fields.text("name", name),
        model=model,
        driver=fields.text("driver", EXTERNAL if endpoints else "process"),
        engine=fields.text("engine", "cloudlm"),
        min_replicas=fields.integer("min_replicas", 1, low=-(2**31), high=2**31),
        max_replicas=fields.integer("max_replicas", 1, low=-(2**31), high=2**31),
        target_ongoing_requests=fields.number("target_ongoing_requests", 8.0),
        max_surge=fields.integer("max_surge", 1, low=-(2**31), high=2**31),
        options=options,
        env=env,
        asleep=None if fields.raw("asleep", None) is None else fields.flag("asleep"),
        adapters=_adapters(fields),
        prices=None if prices is None else price_from_body(prices, fields.param("prices")),
        tenant=fields.text("tenant", "", max_length=64),
        routing=routing_from_body(
            fields.raw("routing", {}), Policy.WEIGHTED if endpoints else Policy.LEAST_COST
        ),
        endpoints=endpoints,
        placement=None if placement is None else placement_from_body(placement),
        rollout=strategy_from_body(fields.raw("rollout", {})),
        scaling=scaling_from_body(fields.raw("scaling", {})),
        pinned=fields.flag("pinned", False),
        memory_mb=fields.integer("memory_mb", 0, low=-(2**31), high=2**31),
    )


def _adapters(fields: Fields) -> dict[str, str]:
    """Read ``[{"name", "model"}, …]``; no name may come twice."""
    found: dict[str, str] = {}
    entries = fields.items("adapters", ())
    if len(entries) > MAX_ADAPTERS:
        raise InvalidRequest(
            f"{len(entries)} adapters are more than {MAX_ADAPTERS}", param="adapters"
        )
    for entry in entries:
        one = Fields(entry, "an adapter", path="adapters.")
        name, model = one.text("name"), one.text("model")
        one.end()
        if name in found:
            raise InvalidRequest(f"adapter {name[:80]!r} is named twice", param="adapters")
        found[name] = model
    return found
