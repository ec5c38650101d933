"""What the autoscaler is told and what it remembers. Data alone, and how it is joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cloudlm.core.deployment import Demand
from cloudlm.core.pace import Pace

GATEWAY_MISSED_S = 60.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """The replicas at this moment. ``ready`` answer (None: all that are wanted), ``starting_s``
    are the ages of those that have not answered yet, seconds, ``missing`` of the ready ones did not
    say how they are. ``wall_s`` is Unix time, for schedules (None: there are none). ``lost`` are
    wanted and there, but nobody waits for their answer any more."""

    ready: int | None = None
    starting_s: tuple[float, ...] = ()
    missing: int = 0
    wall_s: float | None = None
    lost: int = 0

    def answering(self, current: int) -> int:
        """Replicas that answer, of ``current`` wanted."""
        return current if self.ready is None else self.ready


@dataclass(frozen=True, slots=True)
class TotalDemand:
    """The demand of all gateways together; times are means over what ended."""

    ongoing: float = 0.0
    queued: float = 0.0
    requests_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    waiting_prompt_tokens: float = 0.0
    finished_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    computed_tokens_per_s: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    measured_at: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether anybody asks for anything."""
        return self.ongoing > 0 or self.requests_per_s > 0


@dataclass(frozen=True, slots=True)
class Recommendation:
    """How many replicas the load asked for at a monotonic moment, seconds."""

    at: float
    replicas: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Samples of one second: their sum and their number."""

    at: float
    total: float
    samples: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the forecaster remembers; see ``forecast``. Loads are in requests at once.

    ``levels`` are the averages of late, the short one first, ``known_s`` what they are made of,
    ``by_work`` whether of work or of mere requests. ``rise`` and ``fall`` say how far the load
    has left them: the score, and the loads since with their number; ``fell``: they began anew below
    just now. ``swings`` are the squares of what observations differ by from the mix, in loads, and
    their number. ``scores`` are the weight and the squared
    error of each level and of their line, ``pending`` forecasts not yet due: when, each, and the
    mix. ``misses`` are late errors of the mix: when, how much more there was, and its weight;
    ``errors`` is what they make of the forecast ``load``. Errors are in square roots of the load.
    """

    since: float | None = None
    total: float = 0.0
    arrived: float = 0.0
    samples: int = 0
    count: int = 0
    known_s: float = 0.0
    by_work: bool = False
    occupancy: float = 0.0
    levels: tuple[float, ...] = ()
    rise: tuple[float, float, float] = (0.0, 0.0, 0.0)
    fall: tuple[float, float, float] = (0.0, 0.0, 0.0)
    fell: bool = False
    swings: tuple[float, float] = (0.0, 0.0)
    scores: tuple[tuple[float, float], ...] = ()
    pending: tuple[tuple[float, tuple[float, ...], float], ...] = ()
    misses: tuple[tuple[float, float, float], ...] = ()
    load: float = 0.0
    errors: tuple[tuple[float, float], ...] = ((1.0, 0.0),)


@dataclass(frozen=True, slots=True)
class Stay:
    """How long answers take: the seconds that all spent on them, and how many ended;
    beside it how many came, with the tokens of their prompts, and the seconds of the replicas that
    answered. All fade."""

    busy_s: float = 0.0
    ended: float = 0.0
    arrived: float = 0.0
    prompt_tokens: float = 0.0
    replicas_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ScaleMemory:
    """What the autoscaler remembers of one deployment. Empty after a restart, but for ``pace``.

    ``why`` says for people how it came to its last answer. Times are monotonic seconds.
    """

    recommendations: tuple[Recommendation, ...] = ()
    pace: Pace = field(default_factory=Pace)
    why: str = ""
    gateways: tuple[tuple[str, float], ...] = ()
    idle_since: float | None = None
    measured_at: float = 0.0
    buckets: tuple[Bucket, ...] = ()
    decided_at: float | None = None
    rises: tuple[Recommendation, ...] = ()
    panic_at: float | None = None
    panic_most: int = 0
    forecast: Forecast = field(default_factory=Forecast)
    stay: Stay = field(default_factory=Stay)
    ttft_s: float = 0.0
    tpot_s: float = 0.0


def joined(demand: Sequence[Demand]) -> TotalDemand:
    """The reports of all gateways as one."""
    finished = sum(one.finished_per_s for one in demand)
    tokens = sum(one.output_tokens_per_s for one in demand)
    return TotalDemand(
        ongoing=sum(one.ongoing for one in demand),
        queued=sum(one.queued for one in demand),
        requests_per_s=sum(one.requests_per_s for one in demand),
        prompt_tokens_per_s=sum(one.prompt_tokens_per_s for one in demand),
        waiting_prompt_tokens=sum(one.waiting_prompt_tokens for one in demand),
        finished_per_s=finished,
        output_tokens_per_s=tokens,
        computed_tokens_per_s=sum(one.computed_tokens_per_s for one in demand),
        ttft_s=sum(one.ttft_s * one.finished_per_s for one in demand) / (finished or 1.0),
        tpot_s=sum(one.tpot_s * one.output_tokens_per_s for one in demand) / (tokens or 1.0),
        measured_at=max((one.measured_at for one in demand), default=0.0),
    )


def reporting(
    gateways: Sequence[tuple[str, float]], demand: Sequence[Demand], now: float
) -> tuple[tuple[tuple[str, float], ...], bool]:
    """The gateways heard of late, and whether none of them is silent now: what a silent one serves
    is not known, and must not look like nothing."""
    heard = {name: at for name, at in gateways if now - at <= GATEWAY_MISSED_S}
    present = {one.gateway for one in demand}
    complete = present >= heard.keys()
    heard |= dict.fromkeys(present, now)
    return tuple(sorted(heard.items())), complete
