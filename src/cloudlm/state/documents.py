"""Facts as JSON documents and back, for the parts of a fact that have no columns of their own.

Both twins store through these, so that what is read is a fresh value and looks the same whichever
store it came from. Reading passes over fields that a newer cloudlm wrote. No validation: that
happened at the edge.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from cloudlm.core.access import (
    CustomRole,
    Effect,
    Grant,
    Identity,
    Limits,
    Principal,
    PrincipalKind,
    Project,
    Rule,
    Tenant,
)
from cloudlm.core.deployment import DeploymentSpec, Endpoint, Replica, ReplicaState
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.external import ExternalEndpoint
from cloudlm.core.figures import ModelFigures
from cloudlm.core.job import Job
from cloudlm.core.pace import Pace
from cloudlm.core.placement import (
    Latency,
    Measured,
    Placement,
    ServiceLevel,
    Spot,
    Traffic,
    Users,
)
from cloudlm.core.price import Price
from cloudlm.core.rollout import Kind, Order, Rollout, Stage, Step, Strategy
from cloudlm.core.routing import Policy, Routing
from cloudlm.core.scaling import Algorithm, Scaling
from cloudlm.core.schedule import Schedule

_IN_PLACEMENT = {
    "traffic": Traffic,
    "level": ServiceLevel,
    "spot": Spot,
    "figures": ModelFigures,
}
_LISTED_IN_PLACEMENT = {"users": Users, "latencies": Latency, "measured": Measured}


def dump(value: Any) -> str:
    """Compact ASCII JSON; any text survives every database."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def load_object(text: str) -> dict[str, Any]:
    """A JSON object that ``dump`` wrote."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def dump_spec(spec: DeploymentSpec) -> str:
    return dump(asdict(spec))


def load_spec(text: str) -> DeploymentSpec:
    body = _known(DeploymentSpec, load_object(text))
    if "routing" in body:
        body["routing"] = _load_routing(body["routing"])
    if "rollout" in body:
        body["rollout"] = _load_strategy(body["rollout"])
    if "scaling" in body:
        body["scaling"] = _load_scaling(body["scaling"])
    if body.get("prices") is not None:
        body["prices"] = Price(**_known(Price, body["prices"]))
    if body.get("placement") is not None:
        body["placement"] = _load_placement(body["placement"])
    entries = body.get("endpoints", ())
    body["endpoints"] = tuple(ExternalEndpoint(**_known(ExternalEndpoint, e)) for e in entries)
    return DeploymentSpec(**body)


def _load_routing(body: Any) -> Routing:
    known = _known(Routing, body)
    if "policy" in known:
        known["policy"] = Policy(known["policy"])
    return Routing(**known)


def _load_placement(body: Any) -> Placement:
    known = _known(Placement, body)
    for name, kind in _IN_PLACEMENT.items():
        if known.get(name) is not None:
            known[name] = kind(**_known(kind, known[name]))
    for name, kind in _LISTED_IN_PLACEMENT.items():
        known[name] = tuple(kind(**_known(kind, one)) for one in known.get(name, ()))
    for name in ("regions", "providers", "forbidden_providers"):
        known[name] = tuple(known.get(name, ()))
    return Placement(**known)


def _load_strategy(body: Any) -> Strategy:
    known = _known(Strategy, body)
    if "kind" in known:
        known["kind"] = Kind(known["kind"])
    if "steps" in known:
        known["steps"] = tuple(Step(**_known(Step, entry)) for entry in known["steps"])
    return Strategy(**known)


def load_rollout(text: str) -> Rollout:
    """A roll-out out of the JSON of its fields."""
    body = _known(Rollout, load_object(text))
    body["stages"] = tuple(Stage(*one) for one in body.get("stages", ()))
    return Rollout(**{**body, "order": Order(body.get("order", ""))})


def _load_scaling(body: Any) -> Scaling:
    known = _known(Scaling, body)
    if "algorithm" in known:
        known["algorithm"] = Algorithm(known["algorithm"])
    schedules = known.get("schedules", ())
    known["schedules"] = tuple(Schedule(**_known(Schedule, entry)) for entry in schedules)
    return Scaling(**known)


def dump_pace(pace: Pace) -> str:
    return dump(asdict(pace))


def load_pace(text: str) -> Pace:
    return Pace(**_known(Pace, load_object(text)))


def dump_replicas(replicas: Iterable[Replica]) -> str:
    return dump([asdict(replica) for replica in replicas])


def load_replicas(text: str) -> tuple[Replica, ...]:
    entries = (_known(Replica, entry) for entry in json.loads(text))
    return tuple(Replica(**{**e, "state": ReplicaState(e["state"])}) for e in entries)


def plain_job(job: Job) -> Job:
    """The job with its objects as JSON gives them back (fresh, lists for tuples)."""
    return replace(
        job,
        arguments=load_object(dump(dict(job.arguments))),
        result=load_object(dump(dict(job.result))),
        error=None if job.error is None else load_object(dump(dict(job.error))),
    )


def load_limits(text: str) -> Limits:
    return Limits(**_known(Limits, load_object(text)))


def load_identity(kind: str, text: str) -> Identity:
    """An identity out of the JSON of its fields; ``kind`` is the name of its class."""
    body = load_object(text)
    if "limits" in body:
        body["limits"] = Limits(**_known(Limits, body["limits"]))
    match kind:
        case "Tenant":
            return Tenant(**_known(Tenant, body))
        case "Project":
            return Project(**_known(Project, body))
        case "Principal":
            body["kind"] = PrincipalKind(body["kind"])
            body["grants"] = tuple(Grant(**_known(Grant, entry)) for entry in body["grants"])
            return Principal(**_known(Principal, body))
        case _:
            body["rules"] = tuple(_rule(entry) for entry in body["rules"])
            return CustomRole(**_known(CustomRole, body))


def _rule(entry: Mapping[str, Any]) -> Rule:
    return Rule(tuple(entry["verbs"]), tuple(entry["resources"]), Effect(entry["effect"]))


def check_endpoints(model: str, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
    """The endpoints sorted by replica. Raises InvalidRequest for one of another model or twice
    the same replica."""
    for endpoint in endpoints:
        if endpoint.model != model:
            raise InvalidRequest(
                f"an endpoint of {endpoint.model[:80]!r} was put among those of {model[:80]!r}",
                param="model",
            )
    if len({endpoint.replica for endpoint in endpoints}) != len(endpoints):
        raise InvalidRequest(f"{model[:80]!r} has the same replica twice", param="replica")
    return sorted(endpoints, key=lambda endpoint: endpoint.replica)


def _known(cls: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    names = {one.name for one in fields(cls)}
    return {name: value for name, value in body.items() if name in names}
