"""Which deployments stay in a machine's memory when not all of them fit: a pure function.

The rules, of which the last holds only as far as those before it allow:

1. What starts fits beside all that is still there; what is on its way out counts until it is gone.
2. What is pinned stays, and is loaded first.
3. Who is asked for and has no replica waits in the order of asking. Nobody behind takes memory that
   the first of them needs, however large that one is: so each has its turn.
4. For them go, in this order: what does not come up or was put to sleep; what nobody asks, the
   least recently used first; replicas beside a deployment's first; and what is asked all the time,
   the longest resident first. Nothing goes before its shortest stay is over (``min_residency_s``,
   and for what is asked ``BUSY_STAYS`` times that), or models would be loaded for one answer each.
   No more goes than is needed, and nothing unless it is enough.
5. More replicas of what runs may only take the place of what nobody asks; deployments that nobody
   asks are loaded where there is room.

Unloading ends no request: the caller takes a replica's endpoint away, waits until it has nothing
more to do and only then stops it. Must not know drivers, versions or a clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from cloudlm.core.deployment import Residence

BUSY_STAYS = 4
"""How many shortest stays a model has that is asked all the time while others wait."""
_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Claim:
    """What one deployment wants of the memory. Times are monotonic seconds.

    ``need_bytes`` is for one more replica, ``held_bytes`` what the ``present`` ones hold, those on
    their way out included; ``wanted`` would be there if memory were no matter. ``asked``: requests
    for it are waiting or under way, ``used_at`` the last moment of that and ``asked_at`` since when
    they wait for a first replica. ``loaded_at`` is since when a replica answers (None: none does
    yet). A pinned one keeps ``least``. ``failing``: its replicas do not come up. ``sizes_bytes`` is
    what each of the present replicas holds, in the order in which they would go (empty: all alike).
    """

    name: str
    need_bytes: int
    wanted: int
    present: int = 0
    held_bytes: int = 0
    asked: bool = False
    used_at: float = _NEVER
    asked_at: float = _NEVER
    loaded_at: float | None = None
    pinned: bool = False
    least: int = 1
    asleep: bool = False
    failing: bool = False
    sizes_bytes: tuple[int, ...] = ()

    @property
    def staying(self) -> int:
        """Replicas that would go on if memory were no matter."""
        return min(self.wanted, self.present)

    def size_of(self, number: int) -> int:
        """What one of the present replicas holds. Number 0 would go last."""
        if len(self.sizes_bytes) == self.present:
            return self.sizes_bytes[-1 - number]
        return self.held_bytes // self.present


@dataclass(frozen=True, slots=True)
class Verdict:
    """A deployment may have so many ``replicas``, of all its revisions together. ``unload``: those
    that it has shall go, to make room for others."""

    replicas: int
    residence: Residence
    unload: bool = False


class _Rank(IntEnum):
    """Who goes first."""

    USELESS = 0
    IDLE = 1
    BESIDE = 2
    BUSY = 3


@dataclass(frozen=True, slots=True, order=True)
class _Victim:
    """One replica that may go. ``place`` is the greater, the later it would go of its
    deployment's."""

    rank: _Rank
    since: float
    name: str
    place: int
    size_bytes: int = field(compare=False)


def reside(
    claims: Sequence[Claim],
    budget_bytes: int,
    now: float,
    min_residency_s: float,
    other_bytes: int = 0,
) -> dict[str, Verdict]:
    """A verdict for each claim. ``other_bytes`` is held by what belongs to no deployment (any
    more). Call it about once a second with fresh facts: it remembers nothing."""
    room = _Room(claims, budget_bytes - other_bytes, now, min_residency_s)
    misfits = too_large(claims, budget_bytes)
    room.take(-room.planned, anything=True)  # the budget was lowered
    first = [one for one in claims if one.wanted and not one.present and one.name not in misfits]
    for one in sorted((c for c in first if c.asked or c.pinned), key=_turn):
        room.admit(one)
    for one in sorted((c for c in claims if c.asked or c.pinned), key=_turn):
        room.extend(one)
    for one in sorted((c for c in claims if not (c.asked or c.pinned)), key=_recency):
        if one.name not in misfits:
            room.fill(one)
    return {one.name: _verdict(one, room.granted[one.name], one.name in misfits) for one in claims}


def too_large(claims: Iterable[Claim], budget_bytes: int) -> frozenset[str]:
    """Those that can never be loaded: a replica (of a pinned one: those that it keeps) is larger
    than what pinned deployments leave. Of these come first those that are there, then by name; one
    that does not fit keeps nothing from others."""
    found = list(claims)
    left, misfits = budget_bytes, set[str]()
    for one in sorted((c for c in found if c.pinned), key=lambda c: (not c.present, c.name)):
        kept_bytes = one.need_bytes * max(one.least, 1)
        if one.present or kept_bytes <= left:
            left -= kept_bytes
        else:
            misfits.add(one.name)
    others = (one for one in found if not one.pinned and not one.present)
    return frozenset(misfits | {one.name for one in others if one.need_bytes > left})


class _Room:
    """The memory while it is given away. ``free`` is so now; ``planned`` is what will be once all
    that shall go is gone and all that waits has come, below 0 while the first in line must wait."""

    def __init__(
        self, claims: Sequence[Claim], budget_bytes: int, now: float, min_residency_s: float
    ) -> None:
        self.free = budget_bytes - sum(one.held_bytes for one in claims)
        self.planned = self.free + sum(
            one.size_of(number) for one in claims for number in range(one.staying, one.present)
        )
        self.granted = {one.name: one.staying for one in claims}
        self._victims = sorted(
            victim for one in claims for victim in _victims(one, now, min_residency_s)
        )

    def admit(self, claim: Claim) -> None:
        """The first replica, now if there is room; whoever may go makes it."""
        self.take(claim.need_bytes - self.planned)
        self.planned -= claim.need_bytes
        if self.planned >= 0:
            self._start(claim)

    def extend(self, claim: Claim) -> None:
        """Further replicas of what has its first one."""
        while 0 < self.granted[claim.name] < claim.wanted:
            self.take(claim.need_bytes - self.planned, most=_Rank.IDLE, spared=(claim.name,))
            if self.planned < claim.need_bytes:
                return
            self.planned -= claim.need_bytes
            if not self._start(claim):
                return

    def fill(self, claim: Claim) -> None:
        """What nobody asks takes only what nobody else needs."""
        while self.granted[claim.name] < claim.wanted:
            if claim.need_bytes > min(self.free, self.planned):
                return
            self.planned -= claim.need_bytes
            self._start(claim)

    def take(
        self,
        short_bytes: int,
        *,
        most: _Rank = _Rank.BUSY,
        anything: bool = False,
        spared: Collection[str] = (),
    ) -> None:
        """Have so much go, and nothing if that cannot be (unless ``anything`` helps)."""
        chosen: list[_Victim] = []
        found = 0
        for one in self._victims:
            if found >= short_bytes:
                break
            if one.rank <= most and one.name not in spared:
                chosen.append(one)
                found += one.size_bytes
        if short_bytes <= 0 or (found < short_bytes and not anything):
            return
        for one in list(reversed(chosen)):
            first = not any(o.name == one.name and o.place > one.place for o in chosen)
            if first and found - one.size_bytes >= short_bytes:  # who goes anyway is enough
                chosen.remove(one)
                found -= one.size_bytes
        for one in chosen:
            self._victims.remove(one)
            self.granted[one.name] -= 1
        self.planned += found

    def _start(self, claim: Claim) -> bool:
        if claim.need_bytes > self.free:
            return False  # what makes room for it is not gone yet
        self.free -= claim.need_bytes
        self.granted[claim.name] += 1
        return True


def _victims(claim: Claim, now: float, min_residency_s: float) -> list[_Victim]:
    """The replicas that may go for others, each with its rank."""
    kept = claim.least if claim.pinned else 0
    name = claim.name
    useless = (claim.failing or claim.asleep) and not claim.pinned
    stayed_s = 0.0 if claim.loaded_at is None else now - claim.loaded_at
    unused = claim.loaded_at is not None and claim.used_at < claim.loaded_at
    found = []
    for number in range(kept, claim.staying):
        place, size = -number, claim.size_of(number)
        if useless:
            found.append(_Victim(_Rank.USELESS, claim.used_at, name, place, size))
        elif not claim.asked and (unused or claim.loaded_at is None or stayed_s >= min_residency_s):
            found.append(_Victim(_Rank.IDLE, claim.used_at, name, place, size))
        elif number and stayed_s >= min_residency_s:
            found.append(_Victim(_Rank.BESIDE, claim.used_at, name, place, size))
        elif stayed_s >= BUSY_STAYS * min_residency_s and claim.loaded_at is not None:
            found.append(_Victim(_Rank.BUSY, claim.loaded_at, name, place, size))
    return found


def _turn(claim: Claim) -> tuple[bool, float, str]:
    return not claim.pinned, claim.asked_at, claim.name


def _recency(claim: Claim) -> tuple[float, str]:
    return -claim.used_at, claim.name


def _verdict(claim: Claim, granted: int, misfit: bool) -> Verdict:
    if misfit and claim.wanted:
        return Verdict(0, Residence.TOO_LARGE)
    if claim.present and not granted:
        return Verdict(0, Residence.LEAVING, unload=claim.staying > 0)
    if granted:
        return Verdict(granted, Residence.RESIDENT)
    waits = claim.wanted and (claim.asked or claim.pinned)
    return Verdict(0, Residence.WAITING if waits else Residence.UNLOADED)


def held_by(verdicts: Mapping[str, Verdict], residence: Residence) -> list[str]:
    """The names of the deployments that stand so, in order."""
    return sorted(name for name, one in verdicts.items() if one.residence is residence)
