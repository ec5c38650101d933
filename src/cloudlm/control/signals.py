"""What is known of a revision's answers, and whether they are worse than may be: pure functions.

Counted are attempts out of the ledger. One that its client cancelled says nothing; one that the
replica failed or refused is an error: clients' own faults meet both revisions alike, and only what
goes beyond the stable one's errors counts. 429 is none, by which other services say that there is
much to do. Our own workers say 503 then, as they do while they stop or sleep: the ledger does not
tell these apart, so all of them count.
Must not read a clock or a store.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from cloudlm.core.rollout import Strategy
from cloudlm.core.tenant import LedgerRow, Outcome

LATEST = 500
"""Attempts of a revision that are looked at, the newest."""
STABLE_LOOKS_BACK_S = 3600.0
"""How long before a stage began the stable revision's answers still count."""
QUANTILE = 0.95
CONFIDENCE = 0.95
_TOO_MANY = 429


@dataclass(frozen=True, slots=True)
class Signals:
    """The answers of one revision. ``ttft_s`` and ``latency_s`` are those of good answers, sorted:
    seconds to the first token and to the end. ``scores`` sum up to ``score_total``."""

    attempts: int = 0
    failed: int = 0
    ttft_s: tuple[float, ...] = ()
    latency_s: tuple[float, ...] = ()
    scores: int = 0
    score_total: float = 0.0

    @property
    def error_rate(self) -> float:
        """The share of attempts that failed."""
        return self.failed / self.attempts if self.attempts else 0.0

    @property
    def score(self) -> float | None:
        """The mean score, None without any."""
        return self.score_total / self.scores if self.scores else None


NOTHING_KNOWN = Signals()


def signals_of(rows: Iterable[LedgerRow], scores: int = 0, score_total: float = 0.0) -> Signals:
    """The signals in a revision's ledger rows."""
    good: list[LedgerRow] = []
    failed = 0
    for row in rows:
        if row.outcome is Outcome.FINISHED:
            good.append(row)
        elif row.outcome in (Outcome.FAILED, Outcome.REFUSED) and row.status != _TOO_MANY:
            failed += 1
    ttft = sorted(row.first_token_s for row in good if row.first_token_s is not None)
    latency = sorted(row.duration_s for row in good)
    return Signals(len(good) + failed, failed, tuple(ttft), tuple(latency), scores, score_total)


def breach(strategy: Strategy, new: Signals, stable: Signals) -> str:
    """Which limit the new revision breaks, in words; empty if none.

    Errors: more than ``max_error_rate`` beyond the stable share, of its attempts or of
    ``min_requests`` if it has fewer: so a revision that fails everything is known after few.
    Times: the 95th percentile is longer than the ratio allows beyond chance (``quantile_bounds``),
    once both have ``min_requests``. Score: its mean, once there are ``min_scores``.
    """
    # Exactly, in the decimals of the limit: 1 of 49 is not more than 1 of 49.
    beside = Fraction(stable.failed, stable.attempts or 1)
    allowed = beside + Fraction(str(strategy.max_error_rate))
    if new.failed > allowed * max(new.attempts, strategy.min_requests):
        return (
            f"{new.failed} of {new.attempts} attempts failed, more than {float(allowed):.1%} "
            f"(stable revision {stable.error_rate:.1%}, max_error_rate {strategy.max_error_rate:g})"
        )
    for what, ratio, ours, theirs in (
        ("time to first token", strategy.max_ttft_ratio, new.ttft_s, stable.ttft_s),
        ("time of whole answers", strategy.max_latency_ratio, new.latency_s, stable.latency_s),
    ):
        if ratio and min(len(ours), len(theirs)) >= max(strategy.min_requests, 1):
            least, most = quantile_bounds(ours)[0], quantile_bounds(theirs)[1]
            if least > ratio * most:
                return (
                    f"{what}: 95th percentile at least {least:.3f} s, more than {ratio:g} times "
                    f"the stable revision's {most:.3f} s"
                )
    judged = strategy.min_score > 0 and new.scores >= strategy.min_scores
    score = new.score if judged else None
    if score is not None and score < strategy.min_score:
        least_score = f"min_score {strategy.min_score:g}"
        return f"mean score {score:.3f} of {new.scores} is below {least_score}"
    return ""


def lacking(strategy: Strategy, new: Signals) -> list[str]:
    """What is missing before a stage can be judged, in words."""
    missing = []
    if new.attempts < strategy.min_requests:
        missing.append(f"{strategy.min_requests - new.attempts} more requests")
    if strategy.min_score and new.scores < strategy.min_scores:
        missing.append(f"{strategy.min_scores - new.scores} more scores")
    return missing


def quantile(ordered: Sequence[float]) -> float | None:
    """The 95th percentile of sorted numbers (nearest rank), None without any."""
    return ordered[math.ceil(QUANTILE * len(ordered)) - 1] if ordered else None


def quantile_bounds(ordered: Sequence[float]) -> tuple[float, float]:
    """Between which of the sorted numbers the 95th percentile of what they were drawn from lies:
    each bound holds with 95 % confidence, whatever the distribution.

    Order statistics: how many of n numbers lie above the percentile is binomial (David and
    Nagaraja, "Order Statistics", 3rd edition 2003, section 7.1). Where there are too few numbers
    for an upper bound (under 59) the largest stands for it.
    """
    count = len(ordered)
    above = 1.0 - QUANTILE
    probability = total = QUANTILE**count
    number, upper = 0, 0
    while total < CONFIDENCE and number < count:
        if total <= 1.0 - CONFIDENCE:
            upper = number
        number += 1
        probability *= (count - number + 1) / number * above / QUANTILE
        total += probability
    least = ordered[count - number - 1] if number < count else 0.0
    return least, ordered[count - 1 - upper]
