"""The in-memory twin of a driver: replicas that exist only as facts, on the context's clock.

For tests and for trying the control plane out. Its world (``MemoryWorld``) outlives the driver, as
real replicas outlive a control process, and takes orders: how long a start takes, which replica
crashes, which cannot start. Must behave as the contract says in everything that a caller can see.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from cloudlm.core.deployment import GroupObservation, GroupSpec, Replica, ReplicaState
from cloudlm.core.errors import NotFound
from cloudlm.drivers.base import Ability, DriverContext
from cloudlm.drivers.fence import check_token
from cloudlm.drivers.groups import (
    check_group,
    check_group_name,
    check_same_group,
    replica_ids,
    replica_index,
)

_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 30.0
_STABLE_S = 60.0
_FOLLOW_INTERVAL_S = 0.25


@dataclass(slots=True)
class _MemoryReplica:
    started: float
    started_at: float
    url: str
    restarts: int = 0
    failures: int = 0
    resume_at: float | None = None
    ends_at: float | None = None
    message: str = ""
    log: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _MemoryGroup:
    spec: GroupSpec
    replicas: dict[str, _MemoryReplica] = field(default_factory=dict)
    deleting: bool = False


@dataclass(slots=True)
class MemoryWorld:
    """What exists "out there", and the orders that tests give it.

    ``start_s``: seconds from start to READY. ``stop_s``: seconds that a stopped replica is listed
    for as DRAINING. ``broken``: models whose replicas end at once, with
    the reason. ``started`` and ``stopped`` list replica ids in order. ``token`` is the greatest
    that an order or a look had.
    """

    start_s: float = 0.0
    stop_s: float = 0.0
    broken: dict[str, str] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    groups: dict[str, _MemoryGroup] = field(default_factory=dict)
    token: int = 0


class MemoryDriver:
    """Runs groups nowhere (the port's ``Driver``)."""

    name = "memory"
    abilities = frozenset(
        {
            Ability.REPLICA_LOGS,
            Ability.RESTARTS_REPLICAS,
            Ability.STOPS_ONE_REPLICA,
            Ability.THIS_MACHINE,
        }
    )

    def __init__(self, context: DriverContext, world: MemoryWorld | None = None) -> None:
        self._clock = context.clock
        self.world = world if world is not None else MemoryWorld()
        self._token = 0

    def fence(self, token: int) -> None:
        self._token = token

    # The contract -------------------------------------------------------------------------------

    async def groups(self) -> list[str]:
        return sorted(self.world.groups)

    async def observe(self, name: str) -> GroupObservation:
        group = self.world.groups.get(check_group_name(name))
        if group is None:
            return GroupObservation(name, None)
        self.world.token = max(self.world.token, self._token)
        self._bury(group)
        if group.deleting and not group.replicas:
            del self.world.groups[name]
            return GroupObservation(name, None)
        replicas = [self._observed(group, one) for one in sorted(group.replicas, key=replica_index)]
        return GroupObservation(name, group.spec, tuple(replicas))

    async def apply(self, spec: GroupSpec) -> None:
        check_group(spec)
        self._check_token()
        group = self.world.groups.get(spec.name)
        if group is None:
            group = self.world.groups[spec.name] = _MemoryGroup(spec)
        check_same_group(group.spec, spec)
        group.spec, group.deleting = spec, False
        wanted = replica_ids(spec)
        self._stop(group, [one for one in group.replicas if one not in wanted])
        for replica in wanted:
            if replica not in group.replicas:
                group.replicas[replica] = self._new_replica(replica)

    async def stop_replica(self, name: str, replica: str) -> None:
        check_group_name(name)
        self._check_token()
        group = self.world.groups.get(name)
        if group is not None and replica in group.replicas:
            self._end(group.replicas[replica], "stopped")

    async def delete(self, name: str) -> None:
        check_group_name(name)
        self._check_token()
        group = self.world.groups.get(name)
        if group is None:
            return
        group.deleting, group.spec = True, replace(group.spec, replicas=0)
        self._stop(group, list(group.replicas))
        if not group.replicas:
            del self.world.groups[name]

    async def logs(
        self, name: str, *, replica: str | None = None, tail: int = 100, follow: bool = False
    ) -> AsyncIterator[str]:
        """Lines that ``say`` and the replicas' own life wrote. Raises NotFound."""
        group = self.world.groups.get(check_group_name(name))
        if group is None:
            raise NotFound(f"group {name!r} does not exist")
        if replica is not None and replica not in group.replicas:
            raise NotFound(f"group {name!r} has no replica {replica!r}")
        read: dict[str, int] = {}
        first = True
        while group is not None:
            for one in sorted(group.replicas, key=replica_index):
                if replica not in (None, one):
                    continue
                lines = group.replicas[one].log
                start = max(len(lines) - tail, 0) if first else read.get(one, 0)
                read[one] = len(lines)
                for line in lines[start:]:
                    yield line
            if not follow:
                return
            first = False
            await self._clock.sleep(_FOLLOW_INTERVAL_S)
            group = self.world.groups.get(name)

    async def close(self) -> None:
        """Nothing to let go of."""

    # Orders -------------------------------------------------------------------------------------

    def crash(self, name: str, replica: str, message: str = "crashed") -> None:
        """End a replica as if its process had died; it comes back after its back-off."""
        self._end(self.world.groups[name].replicas[replica], message)

    def say(self, name: str, replica: str, line: str) -> None:
        """Write a line into a replica's log."""
        self.world.groups[name].replicas[replica].log.append(line)

    def _check_token(self) -> None:
        check_token(self._token, self.world.token)
        self.world.token = self._token

    # Its life -----------------------------------------------------------------------------------

    def _new_replica(self, replica: str) -> _MemoryReplica:
        self.world.started.append(replica)
        now = self._clock.monotonic()
        url = f"http://{replica}.memory.invalid"
        return _MemoryReplica(now, self._clock.now(), url, log=[f"{replica} started"])

    def _stop(self, group: _MemoryGroup, replicas: list[str]) -> None:
        """For ever."""
        for replica in replicas:
            if group.replicas[replica].ends_at is None:
                group.replicas[replica].ends_at = self._clock.monotonic() + self.world.stop_s
                self.world.stopped.append(replica)
        self._bury(group)

    def _bury(self, group: _MemoryGroup) -> None:
        """Those whose time to stop is over go; one that is wanted again meanwhile begins anew."""
        now, wanted = self._clock.monotonic(), replica_ids(group.spec)
        for name, replica in list(group.replicas.items()):
            if replica.ends_at is None or now < replica.ends_at:
                continue
            del group.replicas[name]
            if name in wanted:
                group.replicas[name] = self._new_replica(name)

    def _end(self, replica: _MemoryReplica, message: str) -> None:
        now = self._clock.monotonic()
        if replica.resume_at is not None and now < replica.resume_at:
            return  # it does not run: there is nothing to end
        if now - replica.started >= _STABLE_S:
            replica.failures = 0
        replica.failures += 1
        pause_s = min(_FIRST_BACKOFF_S * 2 ** (replica.failures - 1), _LONGEST_BACKOFF_S)
        replica.resume_at = now + pause_s
        replica.message = message
        replica.log.append(message)

    def _observed(self, group: _MemoryGroup, name: str) -> Replica:
        replica = group.replicas[name]
        now = self._clock.monotonic()
        if replica.resume_at is not None and now >= replica.resume_at:
            replica.started = replica.resume_at
            replica.started_at = self._clock.now() - (now - replica.resume_at)
            replica.resume_at = None
            replica.restarts += 1
        reason = self.world.broken.get(group.spec.model)
        if reason is not None and replica.resume_at is None:
            self._end(replica, reason)
        seen = Replica(
            id=name,
            state=ReplicaState.STARTING,
            url=replica.url,
            restarts=replica.restarts,
            message=replica.message,
            started_at=replica.started_at,
        )
        if replica.ends_at is not None:
            return replace(seen, state=ReplicaState.DRAINING)
        if replica.resume_at is not None:
            return replace(seen, state=ReplicaState.BACKOFF, url=None)
        if now - replica.started >= self.world.start_s:
            return replace(seen, state=ReplicaState.READY)
        return seen
