"""Draws one token from one row of logits on a CPU, in as few passes over the vocabulary as can be.

The same token as ``sampler``'s tensors draw, which are for GPUs: sums are in float64 and in the
vocabulary's order, and what is left out of them is zero there. Must not know requests.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

# A vocabulary is cut into so many rows; the largest of each column tell where the likeliest begin.
_FOLD = 64
# Nuclei are looked for among so many likeliest tokens before a whole vocabulary is sorted.
_NUCLEUS_GUESSES = (128, 2048)

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Places = NDArray[np.int64]


def draw(
    logits: Floats, draw: float, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> int:
    """A token of ``logits`` [vocabulary], of which one at least is finite and none is NaN, by
    inverting the cumulative distribution at ``draw`` in [0, 1). top_k 0, top_p 1 and min_p 0 leave
    everything in; see ``sampler.sample`` for their order and ties."""
    if 0 < top_k < len(logits):
        places = _among_largest(logits, top_k)
        scores = _scores(logits[places], logits.max(), temperature)
        border = np.partition(scores, -top_k)[-top_k]
        kept = scores >= border
        places, weights = places[kept], _exp(scores[kept])
    else:
        places, weights = None, _exp(_scores(logits, logits.max(), temperature))
    if top_p < 1.0:
        kept = weights / weights.sum() >= _nucleus_border(weights, top_p)
        inside = np.flatnonzero(kept)
        places, weights = inside if places is None else places[inside], weights[inside]
    if min_p > 0.0:
        weights[weights < min_p] = 0.0  # the best one's weight is 1
    cumulative = torch.from_numpy(weights).cumsum(0).numpy()
    total = cumulative[-1]
    # Rounding must not push the target onto the total, behind the last possible token.
    target = min(draw * total, np.nextafter(total, 0.0))
    place = int(np.searchsorted(cumulative, target, side="right"))
    return place if places is None else int(places[place])


def _scores(logits: Floats, most: np.float32, temperature: float) -> Doubles:
    scores = torch.from_numpy(logits).double()  # which does not warn of infinities, as NumPy does
    answer: Doubles = scores.sub_(float(most)).div_(temperature).numpy()
    return answer


def _exp(scores: Doubles) -> Doubles:
    """In place."""
    torch.from_numpy(scores).exp_()
    return scores


def _among_largest(logits: Floats, count: int) -> Places:
    """The places, in order, of tokens among which are the ``count`` largest and all that a score
    in float64 cannot tell from the last of them."""
    least = _bound(logits, count)
    if not np.isfinite(least):
        return np.arange(len(logits))
    slack = (abs(least) + abs(float(logits.max()))) * 1e-6
    return np.flatnonzero(logits >= max(least - slack, float(np.finfo(logits.dtype).min)))


def _bound(values: Floats | Doubles, count: int) -> float:
    """At least ``count`` of ``values`` are not smaller than this."""
    columns = len(values) // _FOLD
    if count > columns // 2:
        return float(np.partition(values, -count)[-count])
    # Of each column one value is its largest, so that count columns have count such values.
    folded = values[: columns * _FOLD].reshape(_FOLD, columns).max(axis=0)
    return float(np.partition(folded, -count)[-count])


def _nucleus_border(weights: Doubles, top_p: float) -> float:
    """The probability of the last of the fewest likeliest whose sum is at least ``top_p``."""
    total = weights.sum()
    likeliest = weights
    for guess in _NUCLEUS_GUESSES:
        if guess >= len(weights):
            break
        likeliest = weights[weights >= _bound(weights, guess)]
        if likeliest.sum() / total >= top_p:
            break
        likeliest = weights
    ordered = np.sort(likeliest)[::-1] / total
    before = ordered.cumsum() - ordered
    return float(ordered[max(int((before < top_p).sum()), 1) - 1])
