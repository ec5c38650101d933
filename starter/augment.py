"""Altered and mixed versions of the training questions, so that the real ones go further."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from starter.corpus import Example

SHORT = {"I am": "I'm", "do not": "don't", "cannot": "can't", "please": "pls", "you": "u"}
PLAIN = {"top-up": "top up", "top up": "top-up", "ATM": "atm", "app": "application"}
SWAPS = {**SHORT, **PLAIN, "I'm": "I am", "don't": "do not", "can't": "cannot", "Why": "why"}


@dataclass(frozen=True)
class Noise:
    """How often a training question is altered, and how."""

    lower: float = 0.25
    unpunctuated: float = 0.15
    frame: float = 0.12
    join: float = 0.05
    swap: float = 0.15
    typo: float = 0.15
    drop: float = 0.5
    drop_word: float = 0.08


class Augmenter:
    """Alters questions so that the few thousand real ones go further."""

    def __init__(self, noise: Noise, talk: dict[str, Any], pool: list[Example]) -> None:
        self.noise, self.before, self.after = noise, talk["before"], talk["after"]
        self.peers: dict[str, list[str]] = {}
        for example in pool:
            self.peers.setdefault(example.intent, []).append(example.text)
        self.small = set(talk["groups"])

    def __call__(self, example: Example, rng: random.Random) -> str:
        """One altered version of the example's question."""
        text, noise = example.text, self.noise
        bank = example.intent not in self.small
        if bank and rng.random() < noise.join:
            text = f"{text} {rng.choice(self.peers[example.intent])}"
        if rng.random() < noise.swap:
            for old in rng.sample(list(SWAPS), 4):
                text = re.sub(rf"\b{re.escape(old)}\b", SWAPS[old], text, count=1)
        if bank and rng.random() < noise.drop:
            words = text.split()
            kept = [w for w in words if rng.random() >= noise.drop_word]
            text = " ".join(kept if len(kept) > 2 else words)
        if rng.random() < noise.typo:
            text = typo(text, rng)
        if bank and rng.random() < noise.frame:
            text = self._frame(text, rng)
        if rng.random() < noise.unpunctuated:
            text = text.rstrip(".?! ") or text
        return text.lower() if rng.random() < noise.lower else text

    def _frame(self, text: str, rng: random.Random) -> str:
        if rng.random() < 0.7:
            text = rng.choice(self.before) + text
        return text + rng.choice(self.after) if rng.random() < 0.5 else text


def typo(text: str, rng: random.Random) -> str:
    """Drop, double or swap one letter."""
    if len(text) < 6:
        return text
    i = rng.randrange(1, len(text) - 1)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:i] + text[i + 1 :]
    if kind == 1:
        return text[:i] + text[i] + text[i:]
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def crossed(first: str, second: str, rng: random.Random) -> str:
    """The beginning of one question and the end of another, as a doubtful case."""
    a, b = first.split(), second.split()
    return " ".join(a[: rng.randint(1, len(a))] + b[rng.randrange(len(b)) :])
