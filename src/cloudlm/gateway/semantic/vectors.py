"""The built-in embedder: a text as a vector, out of its letters and words alone.

Content words, pairs of them and runs of three letters are hashed into a vector of fixed length
(feature hashing, Weinberger et al. 2009, arXiv:0902.2206, with signs). It knows spelling, order and
the few synonyms of the lexicon; "car" and "lorry" have nothing in common for it. It costs a tenth
of a millisecond and no model. Must not decide what is near enough.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from typing import Any

from cloudlm.core.errors import MissingExtra
from cloudlm.gateway.semantic.meaning import Meaning

try:
    import numpy as np
except ImportError:
    raise MissingExtra("semantic", "gateway.semantic_models") from None

DIMENSIONS = 512
_WORD, _PAIR, _LETTERS, _SPELLED = 1.0, 0.6, 0.35, 0.1


def built_in(meaning: Meaning) -> Any:
    """A unit vector of DIMENSIONS float32."""
    weights: defaultdict[str, float] = defaultdict(float)
    words = meaning.words
    for word in words:
        weights["w" + word] += _WORD
        for letters in _runs(f"<{word}>"):
            weights["l" + letters] += _LETTERS
    for pair in pairwise(words):
        weights["p" + " ".join(pair)] += _PAIR
    for word in (*meaning.spelled, *meaning.numbers, *meaning.ids):
        weights["s" + word] += _SPELLED
    vector = np.zeros(DIMENSIONS, np.float32)
    for feature, weight in weights.items():
        place, sign = _hashed(feature)
        vector[place] += sign * weight
    return unit(vector)


def unit(values: Iterable[float]) -> Any:
    """A vector of length 1; zeros stay zeros. Raises ValueError if it is no vector of numbers."""
    vector = np.asarray(values, np.float32)
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
        raise ValueError("not a vector of finite numbers")
    length = float(np.linalg.norm(vector))
    return vector / length if length > 0 else vector


def _runs(text: str) -> Iterable[str]:
    return (text[i : i + 3] for i in range(len(text) - 2))


@lru_cache(16_384)
def _hashed(feature: str) -> tuple[int, float]:
    number = zlib.crc32(feature.encode("utf-8", "surrogatepass"))
    return number % DIMENSIONS, 1.0 if number & (1 << 31) else -1.0
