"""How a changed deployment takes over from the one before: what a user may say of it, what is kept
of it, and what is remembered of each revision.

Words, bounds and JSON alone. Must not decide what happens next: ``control.rollout`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.fields import Fields, check_number

if TYPE_CHECKING:
    from cloudlm.core.deployment import DeploymentSpec

MAX_STEPS = 20
MAX_DURATION_S = 30 * 86_400.0
MAX_REQUESTS = 100_000
HISTORY_KEPT = 20
"""Revisions of a deployment that are remembered, the newest."""


class Kind(StrEnum):
    """The ways to roll out."""

    ROLLING = "rolling"
    BLUE_GREEN = "blue_green"
    CANARY = "canary"
    MIRROR = "mirror"


@dataclass(frozen=True, slots=True)
class Step:
    """So much of the requests, in percent, goes to the new revision for so long at least."""

    percent: float
    duration_s: float


DEFAULT_STEPS = (Step(5.0, 300.0), Step(25.0, 300.0), Step(50.0, 300.0))


@dataclass(frozen=True, slots=True)
class Strategy:
    """A deployment's wishes for its next roll-out.

    ``steps`` are a canary's. ``bake_s`` is for how long blue-green keeps the old revision beside
    the new one that answers, and for how long a mirror copies; ``mirror_percent`` are the requests
    that it copies. Limits on the new revision, each against the stable one where it says so:
    ``max_error_rate`` is the share of attempts that may fail beyond the stable revision's share;
    ``max_ttft_ratio`` and ``max_latency_ratio`` bound the 95th percentiles of the time to the first
    token and of the whole answer (0: not judged); ``min_score`` is the least mean of at least
    ``min_scores`` scores from 0 to 1 (0: not judged). ``min_requests`` are needed in each step
    before it may end. ``start_timeout_s`` is the time in which its replicas must be ready.
    """

    kind: Kind = Kind.ROLLING
    steps: tuple[Step, ...] = DEFAULT_STEPS
    bake_s: float = 300.0
    mirror_percent: float = 10.0
    max_error_rate: float = 0.05
    max_ttft_ratio: float = 1.5
    max_latency_ratio: float = 2.0
    min_requests: int = 20
    min_score: float = 0.0
    min_scores: int = 10
    start_timeout_s: float = 900.0
    auto_promote: bool = True
    auto_rollback: bool = True


DEFAULT_STRATEGY = Strategy()


class Stage(NamedTuple):
    """One step of a roll-out as control carries it out: the part of the requests that the new
    revision answers, the part that it gets copies of, its replicas as a part of those wanted, and
    how long that lasts at least. ``measured``: not over before there were enough requests."""

    share: float
    mirror: float
    size: float
    duration_s: float
    measured: bool = True


def stages_of(strategy: Strategy) -> tuple[Stage, ...]:
    """What comes before the new revision is promoted; nothing for a rolling update."""
    match strategy.kind:
        case Kind.CANARY:
            return tuple(
                Stage(one.percent / 100, 0.0, one.percent / 100, one.duration_s)
                for one in strategy.steps
            )
        case Kind.BLUE_GREEN:
            return (
                Stage(0.0, 0.0, 1.0, 0.0, measured=False),
                Stage(1.0, 0.0, 1.0, strategy.bake_s, measured=False),
            )
        case Kind.MIRROR:
            part = strategy.mirror_percent / 100
            return (Stage(0.0, part, part, strategy.bake_s),)
        case Kind.ROLLING:
            return ()


# What is remembered -----------------------------------------------------------------------------


class Outcome(StrEnum):
    """What became of a revision."""

    PENDING = "pending"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"
    SUPERSEDED = "superseded"


class Order(StrEnum):
    """What a person asked of a roll-out under way, until control has done it."""

    NONE = ""
    PROMOTE = "promote"
    PROMOTE_FULLY = "promote_fully"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Revision:
    """One revision in a deployment's history: the spec as it was asked for last while this revision
    was, by whom it was made (a principal's name), and what became of it. ``model`` and ``adapters``
    are the fixed versions that its addresses meant when it was first run, empty until then. Times
    are Unix seconds."""

    number: int
    spec: DeploymentSpec
    created_at: float = 0.0
    by: str = ""
    outcome: Outcome = Outcome.PENDING
    reason: str = ""
    ended_at: float = 0.0
    model: str = ""
    adapters: Mapping[str, str] = field(default_factory=dict)
    scores: int = 0
    score_total: float = 0.0


@dataclass(frozen=True, slots=True)
class Rollout:
    """Where a deployment's roll-out stands: all that control must not forget.

    ``stable`` is the revision that answers (0: none was ever whole), ``target`` the one that is to.
    They are equal while nothing is rolled out; then ``rejected`` is the revision that was taken
    back last (0: none), which gets no request any more. ``stage`` counts the stages that are over,
    and ``began_at`` is when this one began; ``since`` is when its traffic did (0: it waits for
    replicas). ``stages`` are those of which ``stage`` is one (none: not known, or none are left),
    for the strategy may be changed meanwhile. ``plain``: it goes without stages, whatever the
    strategy says. ``reason`` says which revision was rolled back last and why. Unix seconds;
    ``paused_at`` 0 is not paused.
    """

    name: str
    stable: int = 0
    target: int = 0
    rejected: int = 0
    stage: int = 0
    began_at: float = 0.0
    since: float = 0.0
    plain: bool = False
    paused_at: float = 0.0
    order: Order = Order.NONE
    reason: str = ""
    stages: tuple[Stage, ...] = ()

    @property
    def under_way(self) -> bool:
        """Whether a revision is on its way to replace another."""
        return self.target != self.stable


# Rules and JSON ---------------------------------------------------------------------------------


def check_strategy(strategy: Strategy) -> Strategy:
    """Return ``strategy`` if it may be used. Raises InvalidRequest naming the field."""
    if not 1 <= len(strategy.steps) <= MAX_STEPS:
        raise InvalidRequest(
            f"rollout.steps must be 1 to {MAX_STEPS}, not {len(strategy.steps)}",
            param="rollout.steps",
        )
    before = 0.0
    for one in strategy.steps:
        check_number(one.percent, "rollout.steps.percent", 0.0, 100.0, above=True)
        check_number(one.duration_s, "rollout.steps.duration_s", 0.0, MAX_DURATION_S)
        if one.percent < before:
            raise InvalidRequest(
                f"rollout.steps: {one.percent:g} % comes after {before:g} %; a step never sends "
                "less than the one before",
                param="rollout.steps",
            )
        before = one.percent
    check_number(strategy.mirror_percent, "rollout.mirror_percent", 0.0, 100.0, above=True)
    for name in ("bake_s", "start_timeout_s"):
        check_number(getattr(strategy, name), f"rollout.{name}", 0.0, MAX_DURATION_S)
    for name in ("max_error_rate", "min_score"):
        check_number(getattr(strategy, name), f"rollout.{name}", 0.0, 1.0)
    for name in ("max_ttft_ratio", "max_latency_ratio"):
        ratio = check_number(getattr(strategy, name), f"rollout.{name}", 0.0, 1000.0)
        if 0.0 < ratio < 1.0:
            raise InvalidRequest(
                f"rollout.{name} must be 0 (not judged) or from 1 to 1000, not {ratio:g}",
                param=f"rollout.{name}",
            )
    return strategy


def strategy_body(strategy: Strategy) -> dict[str, Any]:
    """A strategy as JSON; ``strategy_from_body`` reads it back."""
    return {
        "strategy": strategy.kind.value,
        "steps": [{"percent": s.percent, "duration_s": s.duration_s} for s in strategy.steps],
        "bake_s": strategy.bake_s,
        "mirror_percent": strategy.mirror_percent,
        "max_error_rate": strategy.max_error_rate,
        "max_ttft_ratio": strategy.max_ttft_ratio,
        "max_latency_ratio": strategy.max_latency_ratio,
        "min_requests": strategy.min_requests,
        "min_score": strategy.min_score,
        "min_scores": strategy.min_scores,
        "start_timeout_s": strategy.start_timeout_s,
        "auto_promote": strategy.auto_promote,
        "auto_rollback": strategy.auto_rollback,
    }


def strategy_from_body(body: Any) -> Strategy:
    """Read a strategy by type; ``check_strategy`` looks at the values. Raises InvalidRequest and
    UnprocessableRequest naming the field."""
    fields = Fields(body, "rollout", path="rollout.")
    usual = DEFAULT_STRATEGY
    numbers = {
        name: fields.number(name, getattr(usual, name))
        for name in (
            "bake_s",
            "mirror_percent",
            "max_error_rate",
            "max_ttft_ratio",
            "max_latency_ratio",
            "min_score",
            "start_timeout_s",
        )
    }
    steps = usual.steps
    if "steps" in fields:
        steps = tuple(_step(entry) for entry in fields.items("steps", max_entries=1000))
    found = Strategy(
        kind=fields.choice("strategy", Kind, usual.kind),
        steps=steps,
        min_requests=fields.integer("min_requests", usual.min_requests, high=MAX_REQUESTS),
        min_scores=fields.integer("min_scores", usual.min_scores, low=1, high=MAX_REQUESTS),
        auto_promote=fields.flag("auto_promote", usual.auto_promote),
        auto_rollback=fields.flag("auto_rollback", usual.auto_rollback),
        **numbers,
    )
    fields.end()
    return found


def _step(entry: Any) -> Step:
    fields = Fields(entry, "a step", path="rollout.steps.")
    step = Step(fields.number("percent"), fields.number("duration_s"))
    fields.end()
    return step


def longest_s(strategy: Strategy) -> float:
    """How long its stages take if requests come, without the time to start replicas."""
    return sum(one.duration_s for one in stages_of(strategy))
