"""Looks at the world once per pass: which groups exist, which replicas answer, which have stalled.

Remembers per replica what judging needs. Must not change anything; a driver that fails is a fact,
and so is one that misses most of what it ran a moment ago (``blackout``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from cloudlm.control.blackout import BELIEVED_AFTER_S, Doubt, missed, silent_at_once, staying, told
from cloudlm.control.drivers import Drivers
from cloudlm.control.handover import Life, first_record, handed_over, life_of
from cloudlm.control.probe import Prober, ProbeRecord, Verdict, judge
from cloudlm.core.clock import Clock
from cloudlm.core.deployment import (
    DeploymentStatus,
    Endpoint,
    GroupObservation,
    Replica,
    ReplicaState,
)
from cloudlm.core.errors import CloudlmError, InternalError, Unavailable
from cloudlm.drivers.base import Ability, Driver
from cloudlm.telemetry.logs import get_logger

DRIVER_TIMEOUT_S = 60.0
NOTHING: Mapping[str, Mapping[str, str]] = {}
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SeenGroup:
    """A group and the driver that runs it."""

    driver: str
    observation: GroupObservation

    @property
    def deployment(self) -> str:
        spec = self.observation.spec
        return "" if spec is None else spec.deployment


@dataclass(frozen=True, slots=True)
class Seen:
    """The world at one moment.

    ``ready``, ``sleeping`` and ``stalled`` hold replica ids, ``busy`` the requests at those that
    answer, ``faults`` what went wrong with a driver: its groups are then unknown, not gone, and
    ``unknown`` the replicas that it ran when it was last heard.
    """

    groups: tuple[SeenGroup, ...] = ()
    ready: frozenset[str] = frozenset()
    stalled: frozenset[str] = frozenset()
    busy: Mapping[str, int] = field(default_factory=dict)
    faults: Mapping[str, CloudlmError] = field(default_factory=dict)
    sleeping: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()

    @property
    def existing(self) -> frozenset[str]:
        """The replicas of which something must be remembered: all that may be there."""
        seen = (one.id for group in self.groups for one in group.observation.replicas)
        return self.unknown.union(seen)

    def of(self, deployment: str) -> list[SeenGroup]:
        """The groups of one deployment."""
        return [group for group in self.groups if group.deployment == deployment]


class Observer:
    """Observes drivers and probes replicas."""

    def __init__(
        self, drivers: Drivers, prober: Prober, clock: Clock, stall_timeout_s: float
    ) -> None:
        self._drivers = drivers
        self._prober = prober
        self._clock = clock
        self._stall_timeout_s = stall_timeout_s
        self._records: dict[str, tuple[Life, ProbeRecord]] = {}
        self._handed: dict[str, tuple[Life, Verdict]] = {}
        self._ending: set[str] = set()  # those that were stopping when they were last seen
        self._listed: dict[str, dict[str, str]] = {}
        """By driver the groups of the replicas that stay, as it was last believed."""
        self._sent_off: dict[str, set[str]] = {}
        """By driver those of them that an order since then does not leave."""
        self._doubts: dict[str, Doubt] = {}
        self._failing: dict[str, float] = {}  # since when
        self._silence = Doubt()

    def expect(self, driver: str, group: str, replicas: Collection[str]) -> None:
        """An order goes out that leaves a group these replicas: others of it may be missed."""
        listed = self._listed.get(driver, {}).items()
        gone = {one for one, of in listed if of == group and one not in replicas}
        # Still remembered: the order may fail, and its driver be away for a while.
        self._sent_off.setdefault(driver, set()).update(gone)

    def recall(
        self,
        statuses: Iterable[DeploymentStatus],
        endpoints: Iterable[Endpoint],
        ran: Mapping[str, Mapping[str, str]] = NOTHING,
    ) -> None:
        """Take over what an earlier control has written of its replicas. ``ran``: by driver the
        groups of those that serve; what only the machine of the control before us sees is left
        out."""
        self._handed = handed_over(statuses, endpoints)
        for name, listed in ran.items():
            try:
                abilities = self._drivers.get(name).abilities
            except CloudlmError:
                continue  # it is not installed any more: ``look`` says so
            if Ability.ONLY_HERE not in abilities:
                self._listed[name] = dict(listed)

    async def look(self, wanted_drivers: Iterable[str]) -> Seen:
        """Observe all groups of these drivers and of every driver used before."""
        faults: dict[str, CloudlmError] = {}
        for name in wanted_drivers:
            try:
                self._drivers.get(name)
            except CloudlmError as error:
                faults[name] = error
        groups: list[SeenGroup] = []
        for name, driver in self._drivers.in_use().items():
            try:
                groups += self._believed(name, await self._heard(name, driver))
            except CloudlmError as error:
                faults[name] = error
            except TimeoutError:
                faults[name] = Unavailable(f"driver {name!r} did not answer")
            except Exception:
                _log.exception("driver_failed", extra={"fields": {"driver": name}})
                faults[name] = InternalError(f"driver {name!r} failed; see control's log")
        return await self._probe(groups, faults)

    async def _heard(self, name: str, driver: Driver) -> list[SeenGroup]:
        """What a driver lists. If it failed for long, a doubt of what it listed before is over;
        if it fails now and then, it is not, or a loss would never be believed."""
        try:
            found = await self._groups_of(name, driver)
        except Exception:
            self._failing.setdefault(name, self._clock.monotonic())
            raise
        now = self._clock.monotonic()
        if now - self._failing.pop(name, now) > BELIEVED_AFTER_S / 2:
            self._doubts.pop(name, None)
        return found

    async def _groups_of(self, name: str, driver: Driver) -> list[SeenGroup]:
        async with asyncio.timeout(DRIVER_TIMEOUT_S):
            observations = [await driver.observe(group) for group in await driver.groups()]
        return [SeenGroup(name, seen) for seen in observations if seen.spec is not None]

    def _believed(self, name: str, groups: list[SeenGroup]) -> list[SeenGroup]:
        """What a driver lists. Raises Unavailable while it misses so much that it is doubted."""
        listed = {r.id for g in groups for r in g.observation.replicas}
        sent_off, now = self._sent_off.get(name, ()), self._clock.monotonic()
        known = [one for one in self._listed.get(name, ()) if one not in sent_off]
        lost = missed(known, listed)
        doubt = self._doubts.get(name, Doubt()).next(len(known), len(lost), now)
        self._doubts[name] = doubt
        if doubt.holds(now):
            raise Unavailable(told(name, len(known), lost))
        if lost and doubt.since is not None:
            fields = {"driver": name, "replicas": len(lost)}
            _log.warning("replicas_gone", extra={"fields": fields})
        stays = {one: g.observation.name for g in groups for one in staying(g.observation)}
        self._doubts[name], self._listed[name] = Doubt(), stays
        self._sent_off.pop(name, None)
        return groups

    async def _probe(self, groups: list[SeenGroup], faults: dict[str, CloudlmError]) -> Seen:
        replicas = [(g, r) for g in groups for r in g.observation.replicas]
        # What a driver cannot tell of now is not gone.
        unknown = frozenset(one for name in faults for one in self._listed.get(name, ()))
        known = unknown.union(replica.id for _, replica in replicas)
        self._records = {one: found for one, found in self._records.items() if one in known}
        ending = {r.id for _, r in replicas if r.state is ReplicaState.DRAINING}
        for one in self._ending - ending:  # what has its name now is another one, and begins anew
            self._records.pop(one, None)
        self._ending = ending
        asked = [r for g, r in replicas if self._is_to_probe(g.driver, r)]
        stays = {one for g in groups for one in staying(g.observation)}
        before = {one.id: self._verdict(one) for one in asked if one.id in stays}
        await asyncio.gather(*(self._probe_one(one) for one in asked))
        self._doubt_silence(before)
        ready, sleeping, stalled, busy = set(), set(), set(), {}
        for group, replica in replicas:
            record = self._record(replica)
            if record is None:
                if replica.state is ReplicaState.READY:  # the driver answers for it
                    ready.add(replica.id)
                if self._ends_nothing(group.driver):
                    busy[replica.id] = 0
                continue
            if record.misses == 0 and record.answered:
                busy[replica.id] = record.busy
            if record.verdict is Verdict.STALLED:
                stalled.add(replica.id)
            elif replica.state is ReplicaState.DRAINING:
                continue  # it gets no endpoint any more
            elif record.verdict is Verdict.READY:
                ready.add(replica.id)
            elif record.verdict is Verdict.SLEEPING:
                sleeping.add(replica.id)
        return Seen(
            tuple(groups),
            frozenset(ready),
            frozenset(stalled),
            busy,
            faults,
            frozenset(sleeping),
            unknown,
        )

    def _verdict(self, replica: Replica) -> Verdict | None:
        """What it counted as until now."""
        record = self._record(replica)
        if record is not None:
            return record.verdict
        life, verdict = self._handed.get(replica.id, (None, None))
        return verdict if life == life_of(replica) else None

    def _doubt_silence(self, before: Mapping[str, Verdict | None]) -> None:
        """Where most of those that served are silent at once, they serve on for a while."""
        now = self._clock.monotonic()
        after = {one: self._records[one][1] for one in before}
        began = self._silence.since
        self._silence, doubted = silent_at_once(self._silence, before, after, now)
        if doubted and began is None:
            fields = {"silent": len(doubted), "known": len(before)}
            _log.warning("replicas_silent_at_once", extra={"fields": fields})
        for one, verdict in doubted.items():
            life, record = self._records[one]
            self._records[one] = (life, replace(record, verdict=verdict))

    def _is_to_probe(self, driver: str, replica: Replica) -> bool:
        has_address = Ability.PER_REPLICA_ADDRESS in self._drivers.get(driver).abilities
        runs = replica.state in (ReplicaState.STARTING, ReplicaState.READY, ReplicaState.DRAINING)
        return has_address and runs and replica.url is not None

    def _ends_nothing(self, driver: str) -> bool:
        """Whether requests at a replica go on when it is removed."""
        return Ability.KEEPS_RUNNING in self._drivers.get(driver).abilities

    async def _probe_one(self, replica: Replica) -> None:
        assert replica.url is not None
        now, wall_now = self._clock.monotonic(), self._clock.now()
        record = self._record(replica) or first_record(replica, self._handed, now, wall_now)
        self._handed.pop(replica.id, None)  # said once: a later life is another one
        before = record.verdict
        record = await self._asked(replica.url, record)
        if record.misses == 1 and before is Verdict.READY:
            # Requests go to it at this moment: ask again now, not in the next pass.
            record = await self._asked(replica.url, record)
        self._records[replica.id] = (life_of(replica), record)

    async def _asked(self, url: str, record: ProbeRecord) -> ProbeRecord:
        sample = await self._prober.probe(url)
        return judge(record, sample, self._clock.monotonic(), self._stall_timeout_s)

    def _record(self, replica: Replica) -> ProbeRecord | None:
        """What is remembered of this life of the replica; a restart begins anew."""
        found = self._records.get(replica.id)
        return found[1] if found is not None and found[0] == life_of(replica) else None
