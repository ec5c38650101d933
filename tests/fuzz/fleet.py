"""What runs replicas when control takes part: a driver in virtual time, and the way to ask them.

The replicas are those that answer the gateway's requests (``replicas``). The fleet outlives every
control process; each has a ``FleetDriver`` of its own, with the token of its term. Orders and looks
can be lost, late or answered with what was true a while ago. It notes orders that may never be
given; must not decide anything for control.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

from tests.fuzz.life import Life
from tests.fuzz.loop import VirtualClock, VirtualLoop
from tests.fuzz.replicas import MemoryUpstream, Replica

from cloudlm.control.probe import UNREACHABLE, Sample
from cloudlm.core.deployment import GroupObservation, GroupSpec, ReplicaState
from cloudlm.core.deployment import Replica as Found
from cloudlm.core.errors import Unavailable
from cloudlm.drivers import fence
from cloudlm.drivers.base import Ability
from cloudlm.drivers.groups import check_group, check_same_group, replica_ids

BROKEN_FROM = 100
"""Versions from this number on end as soon as they are started."""
PROBE_TIMEOUT_S = 0.5
_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 8.0
_PASS_S = 2.0
"""So long a pass of control may go by what it saw at its beginning."""
_LOST_PROBE = 2  # each other one of a control's, so that it never loses two in a row


@dataclass(slots=True)
class Running:
    """One life after the other of one replica; times are the loop's, ``started_at`` is the wall's.
    ``withdrawn_at``: since when requests no longer go there (None: they do, or never did)."""

    there: Replica
    started_at: float
    ready_at: float
    broken: bool
    restarts: int = 0
    failures: int = 0
    resume_at: float | None = None
    wedged: bool = False
    was_ill: bool = False
    withdrawn_at: float | None = None
    probes: int = 0


@dataclass(slots=True)
class _Group:
    spec: GroupSpec
    running: dict[str, Running] = field(default_factory=dict)
    stopping: set[str] = field(default_factory=set)
    deleting: bool = False


class Fleet:
    """Groups of replicas, and the faults of the way to them. ``note`` is told what may never be."""

    def __init__(
        self,
        loop: VirtualLoop,
        clock: VirtualClock,
        replicas: dict[str, Replica],
        upstream: MemoryUpstream,
        start_s: float,
        drain_s: float,
        note: Callable[[str, str], None],
        tell: Callable[..., None],
    ) -> None:
        self._loop, self._clock = loop, clock
        self._replicas, self._upstream = replicas, upstream
        self._start_s, self._drain_s = start_s, drain_s
        self._note, self._tell = note, tell
        self.groups: dict[str, _Group] = {}
        self.token = 0
        self.greatest = 0
        """The greatest token that was ever seen here, whatever the fence made of it."""
        self.ordered_at = 0.0
        self.leads: Callable[[], int] = lambda: 0
        self.has_endpoint: Callable[[str], bool] = lambda _: False
        self.down_until = self.forgets_until = self.late_until = 0.0
        self.stale_until = self.loses_until = 0.0
        self.blank_until = self.cut_until = 0.0
        self.stops_in_s = 0.0
        """So long a stopped replica is listed as draining, and silent."""
        self.fits = 0
        """How many replicas have room (0: any number)."""
        self._pictures: dict[str, GroupObservation] = {}
        self.calm = True
        """Whether the gateway sees within its usual time which endpoints are gone."""

    def heal(self) -> None:
        """From now on everything arrives; what is wedged stays so until it is started anew."""
        self.down_until = self.forgets_until = self.late_until = 0.0
        self.stale_until = self.loses_until = 0.0
        self.blank_until = self.cut_until = 0.0

    def running(self) -> dict[str, Running]:
        """All replicas by id."""
        return {
            one: found for group in self.groups.values() for one, found in group.running.items()
        }

    def is_well(self, one: Running) -> bool:
        """Whether it answers everybody now."""
        ill = one.wedged or one.there.troubles or one.there.stalled_by > self._loop.time()
        return one.there.alive and not ill

    # What it is told ------------------------------------------------------------------------------

    def apply(self, spec: GroupSpec, token: int) -> None:
        check_group(spec)
        self._accept("apply", f"{spec.name}={spec.replicas}", token)
        before = len(self.running())
        group = self.groups.get(spec.name)
        if group is None:
            group = self.groups[spec.name] = _Group(spec)
        check_same_group(group.spec, spec)
        group.spec, group.deleting = spec, False
        wanted = replica_ids(spec)
        for name in [one for one in group.running if one not in wanted]:
            self._leaves(group, name)
        self._fill(group)
        seen = self._loop.time() > max(self.stale_until, self.blank_until) + _PASS_S
        if self.fits and seen and len(self.running()) > max(before, self.fits):
            self._note("memory", f"{len(self.running())} replicas where {self.fits} have room")

    def delete(self, name: str, token: int) -> None:
        self._accept("delete", name, token)
        group = self.groups.get(name)
        if group is None:
            return
        group.deleting = True
        for replica in list(group.running):
            self._leaves(group, replica)
        self._forget(name, group)

    def stop_replica(self, name: str, replica: str, token: int) -> None:
        self._accept("stop", replica, token)
        group = self.groups.get(name)
        if group is None or replica not in group.running:
            return
        one = group.running[replica]
        if self.is_well(one) and not one.was_ill:
            self._note("stopped", f"{replica} is well and was stopped as if it stood still")
        self.crash(one)

    def observe(self, name: str, token: int) -> GroupObservation:
        self.token, self.greatest = max(self.token, token), max(self.greatest, token)
        seen = self._observed(name)
        if self._loop.time() < self.stale_until:
            return self._pictures.setdefault(name, seen)
        self._pictures.pop(name, None)
        return seen

    def crash(self, one: Running) -> None:
        """Its process ends, and is started anew after a while."""
        if one.resume_at is not None:
            return
        now = self._loop.time()
        one.was_ill, one.wedged = True, False
        one.there.crash()
        one.there.troubles.clear()
        one.failures += 1
        back_s = min(_FIRST_BACKOFF_S * 2 ** (one.failures - 1), _LONGEST_BACKOFF_S)
        one.resume_at = now + back_s
        self._loop.call_later(back_s, self._resume, one)

    def _accept(self, what: str, whom: str, token: int) -> None:
        """Of two that give orders the one overtaken is refused, as production drivers do."""
        fence.check_token(token, self.token)
        if token < self.greatest:
            self._note("writer", f"{what} {whom} with token {token} after {self.greatest}")
        self.token, self.greatest = token, max(token, self.greatest)
        self.ordered_at = self._loop.time()
        self._tell(what, whom, token)

    # Their lives ----------------------------------------------------------------------------------

    def _started(self, name: str, spec: GroupSpec) -> Running:
        there = self._replicas[name] = Replica(name, spec.revision, alive=False)
        now = self._loop.time()
        broken = int(spec.model.rpartition("/")[2]) >= BROKEN_FROM
        one = Running(there, self._clock.now(), now + self._start_s, broken)
        self._loop.call_later(self._start_s, self._up, one)
        return one

    def _resume(self, one: Running) -> None:
        if self._replicas.get(one.there.name) is not one.there:
            return
        one.resume_at = None
        one.restarts += 1
        one.started_at = self._clock.now()
        one.ready_at = self._loop.time() + self._start_s
        self._loop.call_later(self._start_s, self._up, one)

    def _up(self, one: Running) -> None:
        if self._replicas.get(one.there.name) is not one.there or one.resume_at is not None:
            return
        if one.broken:
            self.crash(one)
        else:
            one.there.alive = True

    def _stop(self, name: str, one: Running) -> None:
        """For ever. Nobody is sent there any more, and who is still served had his time."""
        if self.has_endpoint(name):
            self._note("drain", f"{name} was stopped while it had an endpoint")
        working = [send for send in self._upstream.under_way if send.replica == name]
        away_s = 0.0 if one.withdrawn_at is None else self._loop.time() - one.withdrawn_at
        if working and self.calm and not one.was_ill and away_s < self._drain_s:
            whom = working[0].request_id
            self._note("drain", f"{name} was stopped in the middle of {len(working)} ({whom})")
        if self._replicas.get(name) is one.there:
            del self._replicas[name]
        one.there.crash()

    def _leaves(self, group: _Group, name: str) -> None:
        self._stop(name, group.running.pop(name))
        if self.stops_in_s:
            group.stopping.add(name)
            self._loop.call_later(self.stops_in_s, self._ended, group, name)

    def _ended(self, group: _Group, name: str) -> None:
        """It is listed no more; one that is wanted again by now begins anew."""
        group.stopping.discard(name)
        self._forget(group.spec.name, group)
        if self.groups.get(group.spec.name) is group and not group.deleting:
            self._fill(group)

    def _fill(self, group: _Group) -> None:
        for name in replica_ids(group.spec):
            if name not in group.running and name not in group.stopping:
                group.running[name] = self._started(name, group.spec)

    def _forget(self, name: str, group: _Group) -> None:
        if group.deleting and not group.stopping and self.groups.get(name) is group:
            del self.groups[name]

    def _observed(self, name: str) -> GroupObservation:
        group = self.groups.get(name)
        if group is None:
            return GroupObservation(name, None)
        spec = replace(group.spec, replicas=0) if group.deleting else group.spec
        draining = ReplicaState.DRAINING
        going = [Found(one, draining, f"http://{one}") for one in sorted(group.stopping)]
        running = [_found(one) for one in group.running.values()]
        return GroupObservation(name, spec, (*running, *going))


def _found(one: Running) -> Found:
    state = ReplicaState.READY if one.there.alive else ReplicaState.STARTING
    if one.resume_at is not None:
        state = ReplicaState.BACKOFF
    url = None if one.resume_at is not None else f"http://{one.there.name}"
    message = "it ended" if one.failures and not one.there.alive else ""
    return Found(one.there.name, state, url, None, one.restarts, message, one.started_at)


class FleetDriver:
    """A control process's hand on the fleet (the port's ``Driver``)."""

    name = "process"
    abilities = frozenset(
        {
            Ability.PER_REPLICA_ADDRESS,
            Ability.RESTARTS_REPLICAS,
            Ability.STOPS_ONE_REPLICA,
            Ability.THIS_MACHINE,
        }
    )

    def __init__(
        self, fleet: Fleet, life: Life, loop: VirtualLoop, note: Callable[[str, str], None]
    ) -> None:
        self._fleet, self._life, self._loop, self._note = fleet, life, loop, note
        self._token = 0

    def fence(self, token: int) -> None:
        self._token = token

    async def groups(self) -> list[str]:
        await self._way()
        blank = self._loop.time() < self._fleet.blank_until
        return [] if blank else sorted(self._fleet.groups)

    async def observe(self, name: str) -> GroupObservation:
        await self._way()
        return self._fleet.observe(name, self._token)

    async def apply(self, spec: GroupSpec) -> None:
        await self._order(lambda: self._fleet.apply(spec, self._token), spec.name)

    async def stop_replica(self, name: str, replica: str) -> None:
        await self._order(lambda: self._fleet.stop_replica(name, replica, self._token), replica)

    async def delete(self, name: str) -> None:
        await self._order(lambda: self._fleet.delete(name, self._token), name)

    def logs(
        self, name: str, *, replica: str | None = None, tail: int = 100, follow: bool = False
    ) -> AsyncIterator[str]:
        raise NotImplementedError

    async def close(self) -> None:
        """Nothing to let go of."""

    async def _way(self) -> None:
        await self._life.leaves()
        if self._loop.time() < self._fleet.down_until:
            raise Unavailable("the driver is away")

    async def _order(self, done: Callable[[], None], whom: str) -> None:
        leads = self._fleet.leads()
        if not self._life.dead and self._token < leads:
            self._note("writer", f"{whom}: an order with token {self._token} while {leads} leads")
        self._life.comes("on the way")
        await self._way()
        if self._loop.time() < self._fleet.late_until:
            await asyncio.sleep(1.0)
        done()
        await self._life.returns()
        if self._loop.time() < self._fleet.forgets_until:
            raise Unavailable("the driver broke off")


class FleetProber:
    """Asks the fleet's replicas how they are (``control.probe.Prober``)."""

    def __init__(
        self, fleet: Fleet, life: Life, loop: VirtualLoop, upstream: MemoryUpstream
    ) -> None:
        self._fleet, self._life, self._loop, self._upstream = fleet, life, loop, upstream
        self._asked: Counter[str] = Counter()

    async def probe(self, url: str) -> Sample:
        name = url.removeprefix("http://")
        one = self._fleet.running().get(name)
        if self._life.dead or one is None or not one.there.alive:
            return UNREACHABLE
        one.probes += 1
        self._asked[name] += 1
        lost = self._asked[name] % _LOST_PROBE == 0
        lost = lost and self._loop.time() < self._fleet.loses_until
        lost = lost or self._loop.time() < self._fleet.cut_until
        if lost or one.there.stalled_by > self._loop.time():
            await asyncio.sleep(PROBE_TIMEOUT_S)
            return UNREACHABLE
        running = sum(send.replica == name for send in self._upstream.under_way)
        return Sample(
            True, ready=not one.wedged, alive=not one.wedged, steps=one.probes, running=running
        )
