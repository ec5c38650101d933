"""Which replica gets a request: least load, ties to the one chosen longest ago.

Pure: facts and ``now`` come as arguments; no I/O, no clock, no logging. The load of a replica is
what this gateway has ongoing there, divided by its weight. That is the "least outstanding
requests" rule; with equal answers it is also round robin, because ties go to the replica chosen
least recently. A replica that fails is idle and would draw everything to it; so each failure puts
it behind the others for a while that doubles (outlier ejection, as service meshes do it).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from cloudlm.core.deployment import Endpoint


@dataclass(slots=True)
class ReplicaLoad:
    """What this gateway knows of one replica; times are monotonic seconds.

    ``cooling_until`` is the end of the last ``Retry-After`` that it sent, ``suspect_until`` the end
    of the distrust that its last ``failures`` in a row earned it.
    """

    ongoing: int = 0
    chosen_at: int = 0
    cooling_until: float = float("-inf")
    suspect_until: float = float("-inf")
    failures: int = 0


_UNKNOWN = ReplicaLoad()
FIRST_DISTRUST_S = 1.0
LONGEST_DISTRUST_S = 16.0


class Loads:
    """Requests ongoing per replica. Every ``begin`` is matched by one ``end``."""

    def __init__(self) -> None:
        self._loads: dict[str, ReplicaLoad] = {}
        self._choices = 0

    def of(self, replica: str) -> ReplicaLoad:
        """The load of a replica; nothing is remembered of one never chosen."""
        return self._loads.get(replica, _UNKNOWN)

    def begin(self, replica: str) -> None:
        """Count a request sent to ``replica``."""
        load = self._loads.setdefault(replica, ReplicaLoad())
        self._choices += 1
        load.ongoing += 1
        load.chosen_at = self._choices

    def end(self, replica: str) -> None:
        """Count the end of a request that ``begin`` counted."""
        load = self._loads[replica]
        assert load.ongoing > 0, f"request ended twice on {replica}"
        load.ongoing -= 1

    def cool(self, replica: str, until: float) -> None:
        """Avoid ``replica`` until ``until`` while there is another."""
        load = self._loads.setdefault(replica, ReplicaLoad())
        load.cooling_until = max(load.cooling_until, until)

    def failed(self, replica: str, now: float) -> None:
        """Distrust ``replica`` for a while, twice as long with each failure in a row."""
        load = self._loads.setdefault(replica, ReplicaLoad())
        distrust_s = min(FIRST_DISTRUST_S * 2.0 ** min(load.failures, 30), LONGEST_DISTRUST_S)
        load.failures += 1
        load.suspect_until = now + distrust_s

    def answered(self, replica: str) -> None:
        """Trust ``replica`` again: it answered."""
        load = self._loads.get(replica)
        if load is not None and load.failures:
            load.failures = 0
            load.suspect_until = float("-inf")

    def keep_only(self, replicas: Container[str]) -> None:
        """Forget idle replicas that are no longer endpoints."""
        gone = [r for r, load in self._loads.items() if r not in replicas and not load.ongoing]
        for replica in gone:
            del self._loads[replica]

    def total(self, replicas: Iterable[str]) -> int:
        """Requests ongoing on these replicas together."""
        return sum(self.of(replica).ongoing for replica in replicas)


def choose(
    endpoints: Sequence[Endpoint],
    loads: Loads,
    now: float,
    *,
    tried: Container[str] = (),
    retrying: bool = False,
) -> Endpoint | None:
    """The endpoint for the next attempt, or None if none may get it.

    Never one that was ``tried`` before or has weight 0. A replica that asked for time
    (``Retry-After``) is chosen only for a first attempt, and only if all others asked as well: a
    request that was never sent is not a retry, and refusing it here would be a guess. One that
    failed lately is chosen only if no other is left.
    """
    best: Endpoint | None = None
    best_rank: tuple[bool, bool, float, int] | None = None
    for endpoint in endpoints:
        if endpoint.weight <= 0 or endpoint.replica in tried:
            continue
        load = loads.of(endpoint.replica)
        cooling = load.cooling_until > now
        if cooling and retrying:
            continue
        suspect = load.suspect_until > now
        rank = (cooling, suspect, (load.ongoing + 1) / endpoint.weight, load.chosen_at)
        if best_rank is None or rank < best_rank:
            best, best_rank = endpoint, rank
    return best
