"""A kernel classifier that teaches the decoder which intents a question could belong to.

Eight thousand questions are few for a decoder that starts from nothing, and plenty for ridge
regression over character n-grams, which is solved in seconds. The decoder learns from its
opinions on altered and mixed questions. An opinion on a question never comes from a classifier
that was fitted on that same question (five folds), so it is honest about doubt.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from starter.corpus import Example

FEATURES = 1 << 12
FOLDS = 5
RIDGE = 0.3
SHARPNESS = 16.0


def grams(text: str) -> Counter[str]:
    """Character 3- to 5-grams of the lower-cased text."""
    plain = " " + " ".join(re.findall(r"[a-z0-9']+", text.lower())) + " "
    return Counter(plain[i : i + n] for n in (3, 4, 5) for i in range(len(plain) - n + 1))


class Teacher:
    """Ridge regression with a squared cosine kernel on weighted n-grams."""

    def __init__(self, examples: list[Example], intents: list[str]) -> None:
        self.intents = intents
        counts = [grams(e.text) for e in examples]
        seen = Counter(g for count in counts for g in count)
        self.weight = {g: math.log((1 + len(examples)) / (1 + n)) + 1 for g, n in seen.items()}
        self.base = self._vectors([e.text for e in examples])
        kernel = self._kernel(self.base)
        labels = torch.zeros(len(examples), len(intents))
        for i, e in enumerate(examples):
            labels[i, intents.index(e.intent)] = 1.0
        self.fold = torch.arange(len(examples)) % FOLDS
        # The last solution is fitted on everything, the others each leave one fold out.
        self.solutions = torch.zeros(FOLDS + 1, len(examples), len(intents))
        for k in range(FOLDS + 1):
            used = (self.fold != k).nonzero()[:, 0]
            part = kernel[used][:, used]
            part.diagonal().add_(RIDGE)
            factor = torch.linalg.cholesky(part)
            self.solutions[k, used] = torch.cholesky_solve(labels[used], factor)

    def _vectors(self, texts: list[str]) -> Tensor:
        """Unit vectors; n-grams share the columns by a signed hash, which keeps angles."""
        vectors = np.zeros((len(texts), FEATURES), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            found = [(g, n) for g, n in grams(text).items() if g in self.weight]
            if not found:
                continue
            values = np.array([(1 + math.log(n)) * self.weight[g] for g, n in found])
            hashes = np.array([zlib.crc32(g.encode()) for g, _ in found])
            signs = np.where(hashes & (1 << 30), 1.0, -1.0)
            np.add.at(row, hashes % FEATURES, signs * values / np.linalg.norm(values))
        return torch.from_numpy(vectors).bfloat16()

    def _kernel(self, vectors: Tensor) -> Tensor:
        return (vectors @ self.base.T).float().square()

    def opinions(self, texts: list[str], sources: list[int]) -> Tensor:
        """Probabilities over the intents for each text.

        ``sources`` names the training question that a text was made from, whose fold is then
        left out; -1 stands for none in particular.
        """
        kept = torch.tensor([int(self.fold[s]) if s >= 0 else FOLDS for s in sources])
        scores = torch.zeros(len(texts), len(self.intents))
        for start in range(0, len(texts), 8192):
            kernel = self._kernel(self._vectors(texts[start : start + 8192]))
            part = kept[start : start + 8192]
            for k in range(FOLDS + 1):
                rows = (part == k).nonzero()[:, 0]
                if len(rows):
                    scores[start + rows] = kernel[rows] @ self.solutions[k]
        return torch.softmax(scores * SHARPNESS, dim=-1)
