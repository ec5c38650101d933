"""How much load there will be when a replica started now is ready, and how wrong that may be. Pure.

Four exponential averages of the arriving load, over half to four times the start's length, and the
line through two of them are each held against what came one start later. They are mixed by the
inverse of their mean squared errors (Bates and Granger, *The Combination of Forecasts*, 1969): on
steady traffic the long ones count, on a slope the line, and nothing is set for any traffic. The
*margin* is what the load exceeded the mix by in all but a small share of late requests: an
empirical quantile, so that bursts that come again find replicas, whatever their distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from cloudlm.control.autoscale.facts import Forecast

SPANS = (0.5, 1.0, 2.0, 4.0)
"""The averages' time constants, in lengths of a start."""
_NEAR, _FAR = 1, 3
SCORE_MEMORY = 0.96
MISSES_KEPT_S = 1800.0
MOST_MISSES = 360
MISSED_SHARE = 0.02


def observed(
    before: Forecast,
    load: float,
    requests_per_s: float,
    request_s: float,
    start_s: float,
    now: float,
) -> Forecast:
    """With one more sample of the load that arrives, in requests at once. ``request_s`` is how long
    one stays at a replica, ``start_s`` how far ahead to look."""
    since = now if before.since is None else before.since
    seen = replace(
        before,
        since=since,
        total=before.total + load,
        arrived=before.arrived + requests_per_s,
        samples=before.samples + 1,
    )
    width_s = bucket_s(start_s)
    if before.count and now - since < width_s:
        return seen
    return _closed(seen, max(now - since, 1e-3), width_s, request_s, start_s, now)


def bucket_s(start_s: float) -> float:
    """How much time one observation holds."""
    return min(max(start_s / 6.0, 1.0), 10.0)


def _closed(
    seen: Forecast, elapsed_s: float, width_s: float, request_s: float, start_s: float, now: float
) -> Forecast:
    """The bucket is full: look at what was foretold for now, and foretell anew."""
    load = seen.total / seen.samples
    weight = seen.arrived / seen.samples
    share = 1.0 - math.exp(-width_s / max(request_s, 0.1 * width_s))
    occupancy = load if not seen.count else seen.occupancy + (load - seen.occupancy) * share
    scores, misses, pending = _judged(seen, occupancy, weight, now)
    levels = _levelled(seen.levels, load, width_s, start_s, seen.count + 1)
    foretold = (*levels, _extrapolated(levels))
    mix = _mixed(foretold, scores)
    return Forecast(
        since=now,
        count=seen.count + 1,
        occupancy=occupancy,
        levels=levels,
        scores=scores,
        pending=(*pending, (now + start_s, foretold, mix)),
        misses=misses,
        load=mix,
        margin=_quantile(misses, MISSED_SHARE),
    )


def _judged(
    seen: Forecast, occupancy: float, weight: float, now: float
) -> tuple[
    tuple[tuple[float, float], ...],
    tuple[tuple[float, float, float], ...],
    tuple[tuple[float, tuple[float, ...], float], ...],
]:
    """The scores and misses after what has come due, and what has not."""
    scores = seen.scores or ((0.0, 0.0),) * (len(SPANS) + 1)
    misses = [one for one in seen.misses if now - one[0] <= MISSES_KEPT_S][-MOST_MISSES:]
    for _, foretold, mix in (one for one in seen.pending if one[0] <= now):
        scores = tuple(
            (count * SCORE_MEMORY + 1.0, error * SCORE_MEMORY + (occupancy - level) ** 2)
            for (count, error), level in zip(scores, foretold, strict=True)
        )
        misses.append((now, occupancy - mix, weight))
    return scores, tuple(misses), tuple(one for one in seen.pending if one[0] > now)


def _levelled(
    levels: Sequence[float], load: float, width_s: float, start_s: float, count: int
) -> tuple[float, ...]:
    if not levels:
        return (load,) * len(SPANS)
    # The first observations count alike, however long the average.
    shares = (max(min(width_s / (span * max(start_s, 1.0)), 1.0), 1.0 / count) for span in SPANS)
    return tuple(
        level + (load - level) * share for level, share in zip(levels, shares, strict=True)
    )


def _extrapolated(levels: Sequence[float]) -> float:
    """Where the slope leads in one start: on it, an average lags by its span, so that two of them
    tell how steep it is."""
    near, far = levels[_NEAR], levels[_FAR]
    slope = (near - far) / (SPANS[_FAR] - SPANS[_NEAR])
    return max(near + slope * (SPANS[_NEAR] + 1.0), 0.0)


def _mixed(foretold: Sequence[float], scores: Sequence[tuple[float, float]]) -> float:
    weights = [count / max(error, 1e-9) if count else 0.0 for count, error in scores]
    total = sum(weights)
    if not total:
        averages = foretold[: len(SPANS)]
        return sum(averages) / len(averages)
    return sum(w * load for w, load in zip(weights, foretold, strict=True)) / total


def _quantile(misses: Sequence[tuple[float, float, float]], share: float) -> float:
    """What at most ``share`` of the requests met more than; never below 0."""
    left = share * sum(weight for _, _, weight in misses)
    for _, error, weight in sorted(misses, key=lambda one: -one[1]):
        left -= weight
        if left < 0:
            return max(error, 0.0)
    return 0.0
