"""Which replica gets a request: the one that would begin to answer it soonest.

Pure: facts and ``now`` come as arguments; no I/O, no clock, no logging. A replica's cost is one
number: the part of the prompt that it has not cached, plus what this gateway has in flight there,
divided by its weight. Without long prompts that is the "least outstanding requests" rule; with
equal answers it is also round robin, because ties go to the replica chosen least recently, and
those of a long prompt that nobody knows to the replica that was given such a one longest ago. A
replica that fails is idle and would draw everything to it; so each failure puts it behind the
others for a while that doubles (outlier ejection, as service meshes do it).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from cloudlm.core.deployment import Endpoint
from cloudlm.gateway.prefixes import Prefixes


@dataclass(slots=True)
class ReplicaLoad:
    """What this gateway knows of one replica; times are monotonic seconds.

    ``cooling_until`` is the end of the last ``Retry-After`` that it sent, ``suspect_until`` the end
    of the distrust that its last ``failures`` in a row earned it. ``blocks`` of prompts that it had
    not cached are in flight there. ``chosen_at`` and ``cold_at`` number the last choice of it, and
    the last for a prompt of which it knew nothing.
    """

    ongoing: int = 0
    blocks: int = 0
    chosen_at: int = 0
    cold_at: int = 0
    cooling_until: float = float("-inf")
    suspect_until: float = float("-inf")
    failures: int = 0


_UNKNOWN = ReplicaLoad()
FIRST_DISTRUST_S = 1.0
LONGEST_DISTRUST_S = 16.0
REQUEST_BLOCKS = 4.0
"""What a request in flight costs beside its prompt, in blocks: its answer's steps."""


class Loads:
    """Requests ongoing per replica. Every ``begin`` is matched by one ``end``."""

    def __init__(self) -> None:
        self._loads: dict[str, ReplicaLoad] = {}
        self._choices = 0
        self.prefixes = Prefixes()

    def of(self, replica: str) -> ReplicaLoad:
        """The load of a replica; nothing is remembered of one never chosen."""
        return self._loads.get(replica, _UNKNOWN)

    def begin(self, replica: str, keys: Sequence[bytes] = (), now: float = 0.0) -> int:
        """Count a request sent to ``replica``; ``keys`` are its prompt's blocks. Returns how many
        of them it must compute, for ``end``."""
        load = self._loads.setdefault(replica, ReplicaLoad())
        self._choices += 1
        known = self.prefixes.known(replica, keys, now)
        self.prefixes.note(replica, keys, now)
        blocks = len(keys) - known
        load.ongoing += 1
        load.blocks += blocks
        load.chosen_at = self._choices
        if keys and not known:
            load.cold_at = self._choices
        return blocks

    def end(self, replica: str, blocks: int = 0) -> None:
        """Count the end of a request that ``begin`` counted."""
        load = self._loads[replica]
        assert load.ongoing > 0, f"request ended twice on {replica}"
        load.ongoing -= 1
        load.blocks -= blocks

    def cool(self, replica: str, until: float) -> None:
        """Avoid ``replica`` until ``until`` while there is another."""
        load = self._loads.setdefault(replica, ReplicaLoad())
        load.cooling_until = max(load.cooling_until, until)

    def failed(self, replica: str, now: float) -> None:
        """Distrust ``replica`` for a while, twice as long with each failure in a row."""
        load = self._loads.setdefault(replica, ReplicaLoad())
        distrust_s = min(FIRST_DISTRUST_S * 2.0 ** min(load.failures, 30), LONGEST_DISTRUST_S)
        load.failures += 1
        self.prefixes.forget(replica)
        load.suspect_until = now + distrust_s

    def answered(self, replica: str) -> None:
        """Trust ``replica`` again: it answered."""
        load = self._loads.get(replica)
        if load is not None and load.failures:
            load.failures = 0
            load.suspect_until = float("-inf")

    def keep_only(self, replicas: Container[str]) -> None:
        """Forget idle replicas that are no longer endpoints."""
        self.prefixes.keep_only(replicas)
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
    keys: Sequence[bytes] = (),
) -> Endpoint | None:
    """The endpoint for the next attempt, or None if none may get it.

    Never one that was ``tried`` before or has weight 0. A replica that asked for time
    (``Retry-After``) is chosen only for a first attempt, and only if all others asked as well: a
    request that was never sent is not a retry, and refusing it here would be a guess. One that
    failed lately is chosen only if no other is left. ``keys`` are the prompt's blocks.
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
        known = loads.prefixes.known(endpoint.replica, keys, now)
        work = len(keys) - known + load.blocks + (load.ongoing + 1) * REQUEST_BLOCKS
        last = load.chosen_at if known or not keys else load.cold_at
        rank = (cooling, suspect, work / endpoint.weight, last)
        if best_rank is None or rank < best_rank:
            best, best_rank = endpoint, rank
    return best
