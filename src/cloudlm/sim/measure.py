"""What a simulation counts: how long requests waited, how they ended, and the fleet over time.

Every arrival ends exactly once; the sums show it. Must not influence what happens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from cloudlm.core.tenant import LedgerRow, Outcome
from cloudlm.sim.traffic import Arrival

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """What an answer should keep: seconds to the first token, seconds per further token, and
    seconds until a replica begins with it."""

    ttft_s: float = 2.0
    tpot_s: float = 0.2
    queue_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Moment:
    """The fleet at one time. ``arrived`` counts requests since the last moment."""

    at: float
    arrived: int
    in_flight: int
    queued: int
    ready: int
    exist: int
    wanted: int


class Books:
    """``rows`` are the ledger's, if they are kept."""

    def __init__(self, level: ServiceLevel, *, keep_rows: bool = False) -> None:
        self.level = level
        self.rows: list[LedgerRow] | None = [] if keep_rows else None
        self.moments: list[Moment] = []
        self.arrivals = 0
        self.outcomes = dict.fromkeys(Outcome, 0)
        self.attempts = 0
        self.retried = 0
        self.resumed = 0
        self.begun = 0
        self.late = 0
        self.violations = 0
        self.output_tokens = 0
        self.ttft = array("d")
        self.tpot = array("d")
        self.queue = array("d")
        self._since = 0

    def arrived(self, _: Arrival) -> None:
        """A client asked."""
        self.arrivals += 1

    def began(self, arrival: Arrival, begun_at: float, now: float) -> None:
        """The first token was shown; a replica had begun at ``begun_at``."""
        queue_s = begun_at - arrival.at
        self.begun += 1
        self.queue.append(queue_s)
        self.ttft.append(now - arrival.at)
        self.late += queue_s > self.level.queue_s

    def ended(self, arrival: Arrival, outcome: Outcome, first_at: float, now: float) -> None:
        """A request is over; ``first_at`` is below nothing if it had no token."""
        self.outcomes[outcome] += 1
        if outcome is not Outcome.FINISHED:
            self.violations += 1
            self.late += first_at < 0
            return
        self.output_tokens += arrival.output_tokens
        tpot_s = (now - first_at) / max(arrival.output_tokens - 1, 1)
        if arrival.output_tokens > 1:
            self.tpot.append(tpot_s)
        kept = first_at - arrival.at <= self.level.ttft_s and tpot_s <= self.level.tpot_s
        self.violations += not kept

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return self.arrivals - sum(self.outcomes.values())

    def look(self, at: float, ready: int, exist: int, wanted: int, queued: int) -> None:
        """Note the fleet."""
        arrived, self._since = self.arrivals - self._since, self.arrivals
        self.moments.append(Moment(at, arrived, self.open, queued, ready, exist, wanted))


@dataclass(frozen=True, slots=True)
class Spread:
    """A quantity over all requests: mean and percentiles, in its unit."""

    mean: float = 0.0
    percentiles: dict[int, float] = field(default_factory=dict)

    def __getitem__(self, percent: int) -> float:
        return self.percentiles.get(percent, 0.0)


def spread_of(values: Sequence[float]) -> Spread:
    """Mean and percentiles, by the nearest rank."""
    if not values:
        return Spread(0.0, dict.fromkeys(PERCENTILES, 0.0))
    ordered = sorted(values)
    last = len(ordered) - 1
    found = {p: ordered[min(last, max(0, -(-len(ordered) * p // 100) - 1))] for p in PERCENTILES}
    return Spread(sum(ordered) / len(ordered), found)
