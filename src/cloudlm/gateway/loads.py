"""What this gateway knows of each replica: its load, what it cached, and how far to trust it.

Pure: facts and ``now`` come as arguments. A replica that fails is *ejected* for a while that
doubles with each failure in a row. After it the replica is *half-open*: one request at a time goes
there, and the first good answer makes it trusted again (outlier ejection and circuit breakers, as
service meshes have them). Must not choose.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cloudlm.gateway.prefixes import Prefixes

if TYPE_CHECKING:
    from cloudlm.gateway.ranking import Ranking

FIRST_DISTRUST_S = 1.0
LONGEST_DISTRUST_S = 16.0
DECLINED_TO_DISTRUST = 5
"""So many requests in a row that a service will not do and another does are no longer those
requests' fault; five as in Envoy's outlier detection (``consecutive_5xx``, its default)."""


class Turn(NamedTuple):
    """One request that ``begin`` counted: the ``blocks`` it must compute, and its number."""

    blocks: int
    number: int


NO_TURN = Turn(0, 0)


@dataclass(slots=True)
class ReplicaLoad:
    """What is known of one replica; times are monotonic seconds.

    ``cooling_until`` is the end of the last ``Retry-After`` that it sent, ``suspect_until`` the end
    of the distrust that its last ``failures`` in a row earned it, ``probe`` the number of the
    request that tries it since (0: none). ``unreachable`` means that it took no connection.
    ``declined`` counts the requests in a row that it would not do, and another did.
    ``blocks`` of prompts that it had not cached are still to be computed there. ``chosen_at`` and
    ``cold_at`` number the last choice of it, and the last for a prompt of which it knew nothing.
    """

    ongoing: int = 0
    blocks: int = 0
    chosen_at: int = 0
    cold_at: int = 0
    cooling_until: float = float("-inf")
    suspect_until: float = float("-inf")
    failures: int = 0
    probe: int = 0
    unreachable: bool = False
    declined: int = 0

    def suspect(self, now: float) -> bool:
        """Whether it failed lately and nothing may be sent there but in need: its distrust has not
        ended, or a request is finding out."""
        return self.failures > 0 and (self.suspect_until > now or self.probe > 0)

    def available(self, now: float) -> bool:
        """Whether it may be sent a request without need: not asking for time, not suspect."""
        return self.cooling_until <= now and not self.suspect(now)


_UNKNOWN = ReplicaLoad()


class Loads:
    """Requests ongoing per replica. Every ``begin`` is matched by one ``end``."""

    def __init__(self) -> None:
        self._loads: dict[str, ReplicaLoad] = {}
        self._choices = 0
        self._computing: set[int] = set()  # turns whose blocks are not computed yet
        self.ranked: dict[str, Ranking] = {}
        """The order of large deployments, by model; ``router`` makes them."""
        self.ill: dict[str, None] = {}
        """Who failed or asked for time, perhaps long ago; others certainly did not."""
        self.prefixes = Prefixes()

    def of(self, replica: str) -> ReplicaLoad:
        """The load of a replica; nothing is remembered of one never chosen."""
        return self._loads.get(replica, _UNKNOWN)

    def begin(self, replica: str, keys: Sequence[bytes] = (), now: float = 0.0) -> Turn:
        """Count a request sent to ``replica``; ``keys`` are its prompt's blocks. Returns what
        ``end`` is to be told."""
        load = self._loads.get(replica)
        if load is None:
            load = self._loads[replica] = ReplicaLoad()
        self._choices += 1
        known = blocks = 0
        if keys:
            known = self.prefixes.known(replica, keys, now)
            self.prefixes.note(replica, keys, now)
            blocks = len(keys) - known
        load.ongoing += 1
        if blocks:
            load.blocks += blocks
            self._computing.add(self._choices)
        load.chosen_at = self._choices
        if keys and not known:
            load.cold_at = self._choices
        if load.failures and not load.probe:
            load.probe = self._choices
        if self.ranked:
            self._changed(replica)
        return Turn(blocks, self._choices)

    def computed(self, replica: str, turn: Turn) -> None:
        """The prompt of a request that ``begin`` counted is computed: its answer has begun."""
        if turn.blocks and turn.number in self._computing:
            self._computing.remove(turn.number)
            self._loads[replica].blocks -= turn.blocks
            self._changed(replica)

    def end(self, replica: str, turn: Turn = NO_TURN) -> None:
        """Count the end of a request that ``begin`` counted."""
        load = self._loads[replica]
        assert load.ongoing > 0, f"request ended twice on {replica}"
        load.ongoing -= 1
        if turn.blocks:
            self.computed(replica, turn)
        if self.ranked:
            self._changed(replica)
        if load.probe == turn.number:
            load.probe = 0

    def cool(self, replica: str, until: float) -> None:
        """Avoid ``replica`` until ``until`` while there is another."""
        load = self._loads.setdefault(replica, ReplicaLoad())
        load.cooling_until = max(load.cooling_until, until)
        self.ill[replica] = None

    def failed(self, replica: str, now: float, *, unreachable: bool = False) -> None:
        """Distrust ``replica`` for a while, twice as long with each failure in a row."""
        load = self._loads.setdefault(replica, ReplicaLoad())
        distrust_s = min(FIRST_DISTRUST_S * 2.0 ** min(load.failures, 30), LONGEST_DISTRUST_S)
        load.failures += 1
        self.ill[replica] = None
        load.unreachable = unreachable
        self.prefixes.forget(replica)
        load.suspect_until = max(load.suspect_until, now + distrust_s)

    def declined(self, replica: str, now: float) -> None:
        """``replica`` would not do a request that another has answered; too many of them in a row
        are a failure. Of one that nobody answers it is not known whose fault it is: whoever sends
        such requests must not take a replica from others."""
        load = self._loads.setdefault(replica, ReplicaLoad())
        load.declined += 1
        if load.declined >= DECLINED_TO_DISTRUST:
            self.failed(replica, now)

    def answered(self, replica: str) -> None:
        """Trust ``replica`` again: it answered."""
        load = self._loads.get(replica)
        if load is not None and (load.failures or load.declined):
            load.failures = load.declined = 0
            load.probe = 0
            load.unreachable = False
            load.suspect_until = float("-inf")

    def keep_only(self, replicas: Container[str]) -> None:
        """Forget idle replicas that are no longer endpoints."""
        self.prefixes.keep_only(replicas)
        self.ranked.clear()
        gone = [r for r, load in self._loads.items() if r not in replicas and not load.ongoing]
        for replica in gone:
            del self._loads[replica]
            self.ill.pop(replica, None)

    def not_well(self, now: float) -> set[str]:
        """Who failed lately or asked for time."""
        found: set[str] = set()
        for replica in list(self.ill):
            load = self.of(replica)
            if not load.available(now):
                found.add(replica)
            elif not load.failures:
                del self.ill[replica]
        return found

    def _changed(self, replica: str) -> None:
        for ranking in self.ranked.values():
            ranking.touched[replica] = None

    def total(self, replicas: Iterable[str]) -> int:
        """Requests ongoing on these replicas together."""
        return sum(self.of(replica).ongoing for replica in replicas)
