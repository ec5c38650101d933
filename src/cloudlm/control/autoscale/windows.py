"""What several rules share: averages over a window, going neither up nor down in haste. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cloudlm.control.autoscale.facts import Bucket, Recommendation

BUCKET_S = 1.0


def sampled(
    buckets: Sequence[Bucket], value: float, now: float, keep_s: float
) -> tuple[Bucket, ...]:
    """With one more sample; samples of one second are one bucket, as in Knative's collector."""
    at = math.floor(now / BUCKET_S) * BUCKET_S
    kept = [one for one in buckets if one.at > now - keep_s - BUCKET_S]
    if kept and kept[-1].at == at:
        last = kept[-1]
        kept[-1] = Bucket(at, last.total + value, last.samples + 1)
    else:
        kept.append(Bucket(at, value, 1))
    return tuple(kept)


def average(buckets: Sequence[Bucket], now: float, window_s: float) -> float:
    """The mean of the buckets of a window that ends now; there must be one."""
    means = [one.total / one.samples for one in buckets if one.at > now - window_s]
    return sum(means) / len(means) if means else buckets[-1].total / buckets[-1].samples


def stabilised(
    history: Sequence[Recommendation],
    wanted: int,
    current: int,
    now: float,
    up_s: float,
    down_s: float,
    stands_s: float = math.inf,
) -> tuple[int, tuple[Recommendation, ...]]:
    """``wanted`` held back by what was recommended of late, and the history with it. On the way
    down this one counts for no longer than ``stands_s``.

    Down only to the highest of the last ``down_s``, up only to the lowest of the last ``up_s``
    (Kubernetes, ``horizontal.go``, stabilizeRecommendationWithBehaviors). Without history what runs
    now counts as recommended, so that a restart scales nothing down.
    """
    history = history or (Recommendation(now, current),)
    kept = [one for one in history if now - one.at <= max(up_s, down_s)]
    if wanted > current:
        lows = [one.replicas for one in kept if now - one.at <= up_s and up_s > 0]
        answer = max(current, min([wanted, *lows]))
    else:
        highs = [one.replicas for one in kept if now - one.at <= down_s]
        answer = min(current, max([wanted, *highs]))
    spent_s = max(down_s - stands_s, 0.0) if up_s <= 0 else 0.0
    return answer, _compact([*kept, Recommendation(now - spent_s, wanted)], compact=up_s <= 0)


def _compact(recent: Sequence[Recommendation], *, compact: bool) -> tuple[Recommendation, ...]:
    """Of entries that can only be a maximum, keep those higher than all that outlast them."""
    kept: list[Recommendation] = []
    for one in recent:
        while compact and kept and kept[-1].replicas <= one.replicas and kept[-1].at <= one.at:
            kept.pop()
        kept.append(one)
    return tuple(kept)
