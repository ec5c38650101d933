"""How long replicas take to start: from the beginning of their process until they first answer.

A start ends once in a replica's life. One that has served or slept, is silent for a while and
answers again did not start. Time is taken by the monotonic clock from the moment at which a replica
is first seen, and only its age at that moment by the wall clock, so that a clock which is set
during a start makes it no longer. Must not look at replicas or decide anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from cloudlm.control.observe import Seen
from cloudlm.control.probe import START_TIMEOUT_S
from cloudlm.core.deployment import Replica

STARTS_AWAITED, LEAST_AWAITED_S = 3.0, 60.0
LONGEST_UNSEEN_S = START_TIMEOUT_S
"""How old a replica may be when it is first seen for its start to be measured: of an older one that
is silent it is not known whether it served before."""


def awaited_s(start_s: float) -> float:
    """For how long a replica is expected to come up whose version takes ``start_s`` (0: unknown)
    to start."""
    return max(STARTS_AWAITED * start_s, LEAST_AWAITED_S) if start_s else START_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class _Start:
    """One life of a replica: when its process began (Unix time, 0: not told) and after how many
    others. ``seen_at`` is when it was first seen, monotonic, ``age_s`` how old it was then.
    ``ended``: it has answered or slept since; ``is_measured``: how long that takes is worth
    knowing."""

    began_at: float
    restarts: int
    seen_at: float
    age_s: float
    is_measured: bool
    ended: bool = False

    def is_of(self, replica: Replica) -> bool:
        """Whether the replica is still in this life."""
        return replica.restarts == self.restarts and replica.started_at in (self.began_at, 0.0)


class Starts:
    """The starts of all replicas that exist. What served under an earlier control is told once, by
    ``recall``; all else may be lost with the process."""

    def __init__(self) -> None:
        self._known: dict[str, _Start] = {}
        self._served: frozenset[str] = frozenset()

    def recall(self, served: Iterable[str]) -> None:
        """The replicas that had an endpoint when this control began: they have answered before."""
        self._served = frozenset(served)

    def keep_only(self, existing: Collection[str]) -> None:
        """Forget replicas that exist no longer."""
        self._known = {one: start for one, start in self._known.items() if one in existing}
        self._served = self._served.intersection(existing)

    def look(
        self, replicas: Iterable[Replica], seen: Seen, now: float, wall_s: float
    ) -> dict[str, float]:
        """Take note of these replicas; returns the starts that ended just now, in seconds by
        replica. ``now`` is monotonic seconds, ``wall_s`` Unix time."""
        ended: dict[str, float] = {}
        for replica in replicas:
            start = self._known.get(replica.id)
            if start is None or not start.is_of(replica):
                start = self._first_seen(replica, now, wall_s)
            if not start.ended and (replica.id in seen.ready or replica.id in seen.sleeping):
                waited_s = now - start.seen_at
                if start.is_measured and waited_s > 0.0 and replica.id in seen.ready:
                    ended[replica.id] = start.age_s + waited_s
                start = replace(start, ended=True)
            self._known[replica.id] = start
        return ended

    def ages_s(self, now: float) -> dict[str, float]:
        """By replica how long its start lasts until now, of all whose start has not ended."""
        known = self._known.items()
        return {one: start.age_s + now - start.seen_at for one, start in known if not start.ended}

    def _first_seen(self, replica: Replica, now: float, wall_s: float) -> _Start:
        age_s = max(wall_s - replica.started_at, 0.0) if replica.started_at else 0.0
        is_measured = (
            replica.started_at > 0.0
            and not replica.restarts
            and age_s <= LONGEST_UNSEEN_S
            and replica.id not in self._served
        )
        return _Start(replica.started_at, replica.restarts, now, age_s, is_measured)
