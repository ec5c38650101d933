"""How much load there will be when a replica started now is ready, and how wrong that may be. Pure.

*Levels.* Exponential averages of the arriving load, over half to sixteen times the start's
length, and the line through two of them are each held against what came one start later. They are
mixed by powers of their inverse mean squared errors (after Bates and Granger, *The Combination of
Forecasts*, 1969; a power, since averages of the same load err alike): on steady traffic the long
ones count, on a slope the line, and nothing is set for any traffic.

*Changes.* A rise or a fall beyond chance is found by a cumulative sum (Page, *Continuous inspection
schemes*, 1954); the levels then begin anew from what came since. Beyond chance is what is more than
late errors and the swings from one observation to the next explain, so that bursts that are usual
change no level.

*Errors.* What the load was more or less than the mix one start later, in square roots of the mix,
as chance has it: of half an hour, and for what is not yet known of it those that Poisson arrivals
would have made, so that nothing is feared where nobody asks. Forecasts made out of less than a
start's length are no record of later ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from cloudlm.control.autoscale.facts import Forecast

SPANS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""The averages' time constants, in lengths of a start."""
_NEAR, _FAR = 1, 3
SCORE_MEMORY = 0.99
SHARPNESS = 3.0
MISSES_KEPT_S = 1800.0
MOST_MISSES = 360
PRIOR = 1.0 / 6.0
"""How many of those misses what is not known weighs as: forecasts overlap, six in one start."""
CHANCE = 0.5
"""The variance of a load that is averaged over a stay, for Poisson arrivals, in loads."""
UNUSUAL = 1.5
"""By how much traffic is more uneven than Poisson's before anything is known of it."""
SETTLED_S = 60.0
SLACK, CHANGED, FALLEN = 0.5, 4.0, 8.0
"""Of the cumulative sum, in deviations: what is allowed, what is a rise, and what is a fall, which
nobody waits for."""
JUMP_SEEN_S, JUMP = 2.0, 1.0
"""After how much of a bucket a rise may be seen in it, and by how much more it must be beyond."""
SWINGS_KNOWN = 12.0
"""How many observations the noise of arrivals by chance weighs as, before it is measured."""
_NORMAL = ((0.07, 1.9), (0.25, 1.0), (0.36, 0.0), (0.25, -1.0), (0.07, -1.9))

Miss = tuple[float, float, float]
Change = tuple[float, float, float]
NONE: Change = (0.0, 0.0, 0.0)


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
        fell=False,
        since=since,
        total=before.total + load,
        arrived=before.arrived + requests_per_s,
        samples=before.samples + 1,
    )
    elapsed_s = now - since
    if elapsed_s >= bucket_s(start_s) or _jumps(seen, elapsed_s, request_s):
        return _closed(seen, elapsed_s, request_s, start_s, now)
    if before.count:
        return seen
    so_far = seen.total / seen.samples
    errors = errors_of((), max(elapsed_s, 1.0), request_s, start_s, so_far)
    return replace(seen, load=so_far, errors=errors)


def _jumps(seen: Forecast, elapsed_s: float, request_s: float) -> bool:
    """Whether what the bucket holds so far is a rise already, which then begins with it."""
    if not seen.count or elapsed_s < JUMP_SEEN_S:
        return False
    rise, _ = _changes(seen, seen.total / seen.samples, request_s, elapsed_s)
    return rise[0] > CHANGED + JUMP


def bucket_s(start_s: float) -> float:
    """How much time one observation holds."""
    return min(max(start_s / 6.0, 1.0), 10.0)


def _closed(
    seen: Forecast, elapsed_s: float, request_s: float, start_s: float, now: float
) -> Forecast:
    """The bucket is full: look at what was foretold for now, and foretell anew."""
    load = seen.total / seen.samples
    share = 1.0 - math.exp(-elapsed_s / max(request_s, 0.1 * elapsed_s))
    occupancy = seen.occupancy + (load - seen.occupancy) * share if seen.levels else load
    seen = _judged(seen, occupancy, seen.arrived / seen.samples, now)
    seen = _levelled(seen, load, elapsed_s, request_s, start_s)
    foretold = (*seen.levels, _extrapolated(seen.levels))
    mix = _mixed(foretold, seen.scores)
    pending = seen.pending
    if seen.known_s >= start_s:
        pending = (*pending, (now + start_s, foretold, mix))
    return replace(
        seen,
        since=now,
        total=0.0,
        arrived=0.0,
        samples=0,
        occupancy=occupancy,
        pending=pending,
        load=mix,
        errors=errors_of(seen.misses, seen.known_s, request_s, start_s, mix),
    )


def _judged(seen: Forecast, occupancy: float, weight: float, now: float) -> Forecast:
    """With the scores and misses of what has come due."""
    scores = seen.scores or ((0.0, 0.0),) * (len(SPANS) + 1)
    misses = [one for one in seen.misses if now - one[0] <= MISSES_KEPT_S][-MOST_MISSES:]
    for _, foretold, mix in (one for one in seen.pending if one[0] <= now):
        scores = tuple(
            (count * SCORE_MEMORY + 1.0, error * SCORE_MEMORY + (occupancy - level) ** 2)
            for (count, error), level in zip(scores, foretold, strict=True)
        )
        misses.append((now, (occupancy - mix) / math.sqrt(max(mix, 1.0)), weight))
    pending = tuple(one for one in seen.pending if one[0] > now)
    return replace(seen, scores=scores, misses=tuple(misses), pending=pending)


def _levelled(
    seen: Forecast, load: float, width_s: float, request_s: float, start_s: float
) -> Forecast:
    """With one more load in the levels, which a change sets anew."""
    count, known_s = seen.count + 1, seen.known_s + width_s
    rise, fall = _changes(seen, load, request_s, width_s) if seen.count else (NONE, NONE)
    if seen.count:
        squares, weight = (SCORE_MEMORY * one for one in seen.swings)
        mean = max(seen.load, 1.0)
        seen = replace(seen, swings=(squares + (load - mean) ** 2 / mean, weight + 1.0))
    for (score, since, number), beyond, fell in ((rise, CHANGED, False), (fall, FALLEN, True)):
        if score > beyond:
            levels = (since / number,) * len(SPANS)
            known_s = number * width_s
            return replace(
                seen, levels=levels, count=1, known_s=known_s, rise=NONE, fall=NONE, fell=fell
            )
    # The first observations count alike, however long the average.
    shares = (max(min(width_s / (span * max(start_s, 1.0)), 1.0), 1.0 / count) for span in SPANS)
    levels = tuple(
        level + (load - level) * share
        for level, share in zip(seen.levels or (load,) * len(SPANS), shares, strict=True)
    )
    return replace(seen, levels=levels, count=count, known_s=known_s, rise=rise, fall=fall)


def _changes(
    seen: Forecast, load: float, request_s: float, width_s: float
) -> tuple[Change, Change]:
    """The cumulative sums upwards and downwards."""
    mean = max(seen.load, 1.0)
    total = math.fsum(weight for weight, _ in seen.errors)
    square = math.fsum(weight * error * error for weight, error in seen.errors) / max(total, 1e-9)
    uneven = max(square / (UNUSUAL**2 * CHANCE), 1.0)
    usual = 2.0 * max(request_s, 0.1) / width_s * uneven
    squares, weight = seen.swings
    measured = (usual * SWINGS_KNOWN + squares) / (SWINGS_KNOWN + weight)
    noise = math.sqrt(max(usual, measured) * mean)
    return (
        _summed(seen.rise, (load - mean) / noise, load),
        _summed(seen.fall, (mean - load) / noise, load),
    )


def _summed(before: Change, deviations: float, load: float) -> Change:
    """The cumulative sum, and the loads since it is above nothing, of which each counts half as
    much as the next, with their number."""
    score, loads, number = before
    score += deviations - SLACK
    return (score, loads / 2.0 + load, number / 2.0 + 1.0) if score > 0.0 else NONE


def _extrapolated(levels: Sequence[float]) -> float:
    """Where the slope leads in one start: on it, an average lags by its span, so that two of them
    tell how steep it is."""
    near, far = levels[_NEAR], levels[_FAR]
    slope = (near - far) / (SPANS[_FAR] - SPANS[_NEAR])
    return max(near + slope * (SPANS[_NEAR] + 1.0), 0.0)


def _mixed(foretold: Sequence[float], scores: Sequence[tuple[float, float]]) -> float:
    quality = [count / max(error, 1e-9) if count else 0.0 for count, error in scores]
    best = max(quality, default=0.0)
    if not best:
        averages = foretold[: len(SPANS)]
        return math.fsum(averages) / len(averages)
    weights = [(one / best) ** SHARPNESS for one in quality]
    mixed = math.fsum(w * load for w, load in zip(weights, foretold, strict=True))
    return mixed / math.fsum(weights)


def errors_of(
    misses: Sequence[Miss], known_s: float, request_s: float, start_s: float, load: float
) -> tuple[tuple[float, float], ...]:
    """How much more or less there may be than the ``load`` foretold, in square roots of it (of 1,
    if it is less), each with its weight. Misses are put into cells that grow from the worst on, for
    it is those that matter; all is wider as long as the levels hold little. What is not known yet
    is chance with what arrives: of nothing there is none."""
    chance = CHANCE + request_s / max(known_s, 1.0)
    wider = max(math.sqrt(chance / (CHANCE + request_s / SETTLED_S)), 1.0)
    cells: list[tuple[float, float]] = []
    ordered = sorted(misses, key=lambda one: -one[1])
    begin, size = 0, 1
    while begin < len(ordered):
        part = ordered[begin : begin + size]
        error = math.fsum(one[1] for one in part) / len(part)
        cells.append((math.fsum(one[2] for one in part), wider * error))
        begin, size = begin + size, size + (size + 1) // 2
    mean = math.fsum(one[2] for one in misses) / len(misses) if misses else 1.0
    most = min(MISSES_KEPT_S / bucket_s(start_s), MOST_MISSES) * PRIOR
    unknown = max(most - len(misses), 0.0) * max(mean, 1e-9)
    deviation = UNUSUAL * math.sqrt(chance * min(max(load, 0.0), 1.0))
    return (*cells, *((unknown * weight, deviation * at) for weight, at in _NORMAL))
