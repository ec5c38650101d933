"""The driver of services that are not ours: it starts nothing, it watches.

A group's replicas are its endpoints, in their order; that a group exists is a small file in home,
so that a new control process knows what the one before it knew. Each endpoint is looked at now and
then (``external_look``), in the background, because ``observe`` must not wait for strangers. Must
not keep, log or report a key.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import ParamSpec, TypeVar

from cloudlm.core.deployment import GroupObservation, GroupSpec, Replica, ReplicaState
from cloudlm.core.errors import InvalidRequest, NotSupported, StorageFailed
from cloudlm.core.external import EXTERNAL, ExternalEndpoint
from cloudlm.core.health import MISSES_TO_FAIL
from cloudlm.drivers.base import Ability, DriverContext
from cloudlm.drivers.external_look import Looker, Looks, Record
from cloudlm.drivers.fence import NotedToken
from cloudlm.drivers.groups import (
    check_group,
    check_group_name,
    check_same_group,
    group_from_body,
    replica_ids,
)
from cloudlm.drivers.runfiles import read_json, write_json
from cloudlm.security.credentials import Credentials
from cloudlm.security.outside import Outside
from cloudlm.security.transport import external_context
from cloudlm.state.home import Home, load_settings
from cloudlm.telemetry.logs import get_logger

P = ParamSpec("P")
T = TypeVar("T")
_log = get_logger(__name__)


class ExternalDriver:
    """Endpoints of any service that speaks OpenAI's API (the port's ``Driver``)."""

    name = EXTERNAL
    abilities = frozenset({Ability.KEEPS_RUNNING})

    def __init__(self, context: DriverContext, looks: Looks | None = None) -> None:
        flags = {"home": str(context.home)}
        settings = load_settings(flags, context.environment)[0].external
        self._clock = context.clock
        self._folder = context.home / EXTERNAL
        self._interval_s = settings.probe_interval_s
        self._looks: Looks = looks or Looker(
            Credentials(Home(context.home).credentials, context.environment),
            Outside(settings),
            external_context(settings),
        )
        self._known: dict[str, GroupSpec] | None = None
        self._records: dict[str, Record] = {}
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._leader = NotedToken(context.home / "run" / "external-leader.json")
        self._token = self._noted = 0

    def fence(self, token: int) -> None:
        if token != self._token:
            self._known = None  # somebody else may have given orders since
        self._token = token

    async def groups(self) -> list[str]:
        return sorted(await self._groups())

    async def observe(self, name: str) -> GroupObservation:
        """The endpoints as they were seen last; those not seen for a while are looked at."""
        if self._noted != self._token:
            await self._in_thread(self._leader.allows, self._token)
            self._noted = self._token
        spec = (await self._groups()).get(check_group_name(name))
        if spec is None:
            return GroupObservation(name, None)
        replicas = []
        for replica, endpoint in zip(replica_ids(spec), spec.endpoints, strict=False):
            record = self._records.setdefault(replica, Record())
            if replica not in self._looking and record.is_due(
                self._clock.monotonic(), self._interval_s
            ):
                self._looking[replica] = asyncio.create_task(self._look(replica, endpoint))
            replicas.append(_replica(replica, endpoint, record))
        return GroupObservation(name, spec, tuple(replicas))

    async def apply(self, spec: GroupSpec) -> None:
        check_group(spec)
        await self._in_thread(self._leader.check, self._token)
        if spec.replicas > len(spec.endpoints):
            raise InvalidRequest(
                f"group {spec.name!r} has {len(spec.endpoints)} endpoints and cannot have "
                f"{spec.replicas} replicas"
            )
        known = await self._groups()
        before = known.get(spec.name)
        if before is not None:
            check_same_group(before, spec)
        if before != spec:
            await self._in_thread(self._write, spec)
            known[spec.name] = spec
            self._forget(spec, keep=spec.replicas)

    async def stop_replica(self, name: str, replica: str) -> None:
        """There is nothing to stop."""
        await self._in_thread(self._leader.check, self._token)

    async def delete(self, name: str) -> None:
        await self._in_thread(self._leader.check, self._token)
        known = await self._groups()
        spec = known.get(check_group_name(name))
        if spec is not None:
            await self._in_thread(self._path(name).unlink, True)
            del known[name]
            self._forget(spec, keep=0)

    def logs(
        self, name: str, *, replica: str | None = None, tail: int = 100, follow: bool = False
    ) -> AsyncIterator[str]:
        """Raises NotSupported: what others' services say of themselves is theirs."""
        raise NotSupported("the output of external endpoints is not ours to show")

    async def close(self) -> None:
        for task in self._looking.values():
            task.cancel()
        await asyncio.gather(*self._looking.values(), return_exceptions=True)
        self._looking.clear()

    # Looking --------------------------------------------------------------------------------------

    async def _look(self, replica: str, endpoint: ExternalEndpoint) -> None:
        try:
            look = await self._looks.look(endpoint)
            before = self._records.get(replica)
            if before is None:  # removed meanwhile
                return
            after = before.after(look, self._clock.monotonic(), self._clock.now())
            self._records[replica] = after
            if after.reason and after.reason != before.reason:
                fields = {"replica": replica, "reason": after.reason}
                _log.warning("external_endpoint_failing", extra={"fields": fields})
            if look.note and before.is_new:
                fields = {"replica": replica, "note": look.note}
                _log.warning("external_endpoint_doubtful", extra={"fields": fields})
        except Exception:
            _log.exception("external_look_failed", extra={"fields": {"replica": replica}})
        finally:
            if self._looking.get(replica) is asyncio.current_task():
                del self._looking[replica]

    def _forget(self, spec: GroupSpec, *, keep: int) -> None:
        """What is known of the group's endpoints but the first ``keep`` counts no longer."""
        for number in range(keep, len(spec.endpoints)):
            replica = f"{spec.name}-{number}"
            self._records.pop(replica, None)
            task = self._looking.pop(replica, None)
            if task is not None:  # what it sees is of an endpoint that is no more
                task.cancel()

    # Files ----------------------------------------------------------------------------------------

    async def _groups(self) -> dict[str, GroupSpec]:
        if self._known is None:
            self._known = await self._in_thread(self._read)
        return self._known

    def _read(self) -> dict[str, GroupSpec]:
        found = {}
        for path in sorted(self._folder.glob("*.json")):
            try:
                found[path.stem] = group_from_body((read_json(path) or {})["spec"])
            except (KeyError, TypeError):
                # Unreadable: belongs to no deployment, so that control deletes it.
                found[path.stem] = GroupSpec(path.stem, "", 0, "", replicas=0)
        return found

    def _write(self, spec: GroupSpec) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(self._path(spec.name), {"spec": asdict(spec)})

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await asyncio.to_thread(work, *args, **kwargs)
        except OSError as error:
            raise StorageFailed(
                f"the external driver cannot use {self._folder}: {error.strerror or error}; free "
                "space or make the installation's home writable"
            ) from error


def _replica(replica: str, endpoint: ExternalEndpoint, record: Record) -> Replica:
    state = ReplicaState.STARTING
    if not record.is_new:
        state = ReplicaState.FAILED if record.reason else ReplicaState.READY
    return Replica(
        id=replica,
        state=state,
        url=endpoint.url,
        message=record.reason,
        started_at=record.since,
        misses=min(record.misses, MISSES_TO_FAIL) if record.reason else 0,
    )
