"""What the control API can be asked, as data: one ``Call`` per request, and programs of calls.

A program is a generator that yields calls and pauses, is sent their results, and returns a value;
``sync`` and ``asynchronous`` only carry it out. No I/O and no clock here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote

from cloudlm.core import wire
from cloudlm.core.deployment import DeploymentPhase, DeploymentSpec, DeploymentStatus
from cloudlm.core.errors import NotFound, Unavailable, UpstreamTimeout
from cloudlm.core.fields import Fields
from cloudlm.core.job import Job
from cloudlm.core.model import Manifest, manifest_from_body
from cloudlm.core.tenant import KeyRecord
from cloudlm.core.usage import UsageRow, usage_from_body
from cloudlm.core.wire import DeploymentView, DriverEntry, ModelEntry

T = TypeVar("T")
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0
_PAUSE_GROWTH = 1.5
_SETTLED = (DeploymentPhase.READY, DeploymentPhase.SLEEPING, DeploymentPhase.IDLE)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request; ``read`` makes the result of the decoded JSON of a good answer (None: empty)."""

    method: str
    path: str
    read: Callable[[Any], T]
    body: Mapping[str, Any] | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    needs_key: bool = True


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait; the result is the monotonic time afterwards, seconds."""

    seconds: float


Program = Generator[Call[Any] | Pause, Any, T]


class NewKey(NamedTuple):
    """A key that was just made: the only time that its text is shown."""

    text: str
    record: KeyRecord


class RotatedKey(NamedTuple):
    """As ``NewKey``, with the key that it replaces, as that is from now on (None: a control of
    before does not tell)."""

    text: str
    record: KeyRecord
    replaced: KeyRecord | None = None


# Models -----------------------------------------------------------------------------------------


def list_models() -> Call[list[ModelEntry]]:
    return Call("GET", path_of("models"), all_of(wire.model_from_body))


def get_model(name: str) -> Call[ModelEntry]:
    return Call("GET", path_of("models", name), wire.model_from_body)


def get_version(name: str, version: int) -> Call[Manifest]:
    return Call("GET", path_of("models", name, "versions", version), manifest_from_body)


def pull_model(source: str, name: str | None, alias: str | None) -> Call[Job]:
    given = {"source": source, "name": name, "alias": alias}
    body = {key: value for key, value in given.items() if value is not None}
    return Call("POST", path_of("models"), _job, body)


def remove_version(name: str, version: int) -> Call[None]:
    return Call("DELETE", path_of("models", name, "versions", version), nothing)


def set_alias(name: str, alias: str, version: int) -> Call[None]:
    return Call("PUT", path_of("models", name, "aliases", alias), nothing, {"version": version})


def remove_alias(name: str, alias: str) -> Call[None]:
    return Call("DELETE", path_of("models", name, "aliases", alias), nothing)


# Deployments ------------------------------------------------------------------------------------


def memory_budget() -> Call[int]:
    """Bytes; 0: there is none."""

    def read(body: Any) -> int:
        found = body.get("memory_budget_bytes") if isinstance(body, dict) else None
        return found if isinstance(found, int) else 0

    return Call("GET", path_of("deployments"), read)


def list_deployments() -> Call[list[DeploymentView]]:
    return Call("GET", path_of("deployments"), all_of(wire.deployment_from_body))


def get_deployment(name: str) -> Call[DeploymentView]:
    return Call("GET", path_of("deployments", name), wire.deployment_from_body)


def create_deployment(spec: DeploymentSpec) -> Call[DeploymentView]:
    return Call("POST", path_of("deployments"), wire.deployment_from_body, wire.spec_body(spec))


def apply_deployment(spec: DeploymentSpec, expected_generation: int | None) -> Call[DeploymentView]:
    headers = {} if expected_generation is None else {"If-Match": str(expected_generation)}
    path = path_of("deployments", spec.name)
    return Call("PUT", path, wire.deployment_from_body, wire.spec_body(spec), headers=headers)


def scale_deployment(name: str, low: int, high: int) -> Call[DeploymentView]:
    path = path_of("deployments", name, "scale")
    return Call("POST", path, wire.deployment_from_body, wire.scale_body(low, high))


def turn_deployment(name: str, *, asleep: bool) -> Call[DeploymentView]:
    path = path_of("deployments", name, "sleep" if asleep else "wake")
    return Call("POST", path, wire.deployment_from_body)


def delete_deployment(name: str) -> Call[None]:
    return Call("DELETE", path_of("deployments", name), nothing)


def deployment_logs(name: str, tail: int, follow: bool, replica: str | None) -> Call[None]:
    """The answer is lines of text, not JSON."""
    query = {"tail": str(tail), "follow": "true" if follow else "false"}
    if replica is not None:
        query["replica"] = replica
    return Call("GET", path_of("deployments", name, "logs"), nothing, query=query)


def wait_ready(
    name: str, timeout_s: float, on_status: Callable[[DeploymentStatus], None] | None
) -> Program[DeploymentView]:
    """Ask until the newest generation is ready, or asleep or without a replica as asked.

    Raises Unavailable if it failed, is being deleted or went back to an earlier revision,
    UpstreamTimeout if it takes too long.
    """
    asked: list[int] = []

    def done(view: DeploymentView) -> bool:
        asked.append(view.deployment.revision)
        if view.status is not None and on_status is not None:
            on_status(view.status)
        if view.deployment.deleting:
            raise Unavailable(f"deployment {name!r} is being deleted")
        if asked[-1] < asked[0]:
            raise Unavailable(
                f"revision {asked[0]} of {name!r} was rolled back; "
                f"'cloudlm rollout history {name}' says why"
            )
        if not view.settled:
            return False
        if view.phase is DeploymentPhase.FAILED:
            why = view.status.message if view.status else ""
            raise Unavailable(f"deployment {name!r} failed: {why}; see 'cloudlm logs {name}'")
        return view.phase in _SETTLED

    def late(view: DeploymentView) -> str:
        status = view.status
        ready = f"{status.ready_replicas} of {status.wanted_replicas}" if status else "0"
        why = f": {status.message}" if status and status.message else ""
        return (
            f"deployment {name!r} is not ready after {timeout_s:g} s: {view.phase}, "
            f"{ready} replicas ready{why}; see 'cloudlm logs {name}'"
        )

    return (yield from until(get_deployment(name), done, timeout_s, late))


def wait_gone(name: str, timeout_s: float) -> Program[None]:
    """Ask until there is no such deployment. Raises UpstreamTimeout if it takes too long."""

    def late(view: DeploymentView) -> str:
        return f"deployment {name!r} still exists after {timeout_s:g} s: {view.phase}"

    try:
        yield from until(get_deployment(name), lambda _view: False, timeout_s, late)
    except NotFound:
        return


# Jobs and drivers -------------------------------------------------------------------------------


def list_jobs() -> Call[list[Job]]:
    return Call("GET", path_of("jobs"), all_of(wire.job_from_body))


def get_job(job_id: str) -> Call[Job]:
    return Call("GET", path_of("jobs", job_id), _job)


def start_job(kind: str, arguments: Mapping[str, Any]) -> Call[Job]:
    return Call("POST", path_of("jobs"), _job, {"kind": kind, "arguments": dict(arguments)})


def cancel_job(job_id: str) -> Call[Job]:
    return Call("DELETE", path_of("jobs", job_id), _job)


def wait_job(
    job_id: str, timeout_s: float, on_progress: Callable[[Job], None] | None
) -> Program[Job]:
    """Ask until the job has ended, well or not. Raises UpstreamTimeout if it takes too long."""

    def done(job: Job) -> bool:
        if on_progress is not None:
            on_progress(job)
        return job.state.ended

    def late(job: Job) -> str:
        return (
            f"job {job_id!r} has not ended after {timeout_s:g} s: {job.state}, "
            f"{job.progress:.0%} {job.message}".rstrip()
        )

    return (yield from until(get_job(job_id), done, timeout_s, late))


def list_drivers() -> Call[list[DriverEntry]]:
    return Call("GET", path_of("drivers"), all_of(wire.driver_from_body))


# Usage ------------------------------------------------------------------------------------------


def usage(given: Mapping[str, str | None]) -> Call[list[UsageRow]]:
    query = {name: value for name, value in given.items() if value is not None}
    return Call("GET", path_of("usage"), all_of(usage_from_body), query=query)


def until(
    call: Call[T], done: Callable[[T], bool], timeout_s: float, late: Callable[[T], str]
) -> Program[T]:
    """Repeat a call with growing pauses until it is done."""
    now: float = yield Pause(0.0)
    deadline, pause_s = now + timeout_s, _FIRST_PAUSE_S
    while True:
        value: T = yield call
        if done(value):
            return value
        if now >= deadline:
            raise UpstreamTimeout(late(value))
        now = yield Pause(max(0.0, min(pause_s, deadline - now)))
        pause_s = min(pause_s * _PAUSE_GROWTH, _LONGEST_PAUSE_S)


def path_of(*parts: str | int) -> str:
    """The path of a noun's part in the control API."""
    return "/api/v1/" + "/".join(quote(str(part), safe="") for part in parts)


def all_of(read: Callable[[Any], T]) -> Callable[[Any], list[T]]:
    """Read ``{"data": [...]}``."""
    return lambda body: [read(entry) for entry in Fields(body, "a list").items("data")]


def _job(body: Any) -> Job:
    """Read a job, alone or under ``job``."""
    return wire.job_from_body(body["job"] if isinstance(body, dict) and "job" in body else body)


def nothing(_body: Any) -> None:
    """Read an answer that nobody needs."""
