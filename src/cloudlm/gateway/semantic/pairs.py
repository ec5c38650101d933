"""Labelled questions in text files: which mean the same, and which only look like it.

Must not judge them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cloudlm.core.errors import InvalidRequest

SAME = "="
SHIPPED_PAIRS = Path(__file__).with_name("pairs.txt")
SHIPPED_APART = Path(__file__).with_name("pairs_apart.txt")
KINDS = ("negation", "number", "entity", "polarity", "language", "asked", "scope", "other")


class Pair(NamedTuple):
    """Two questions. ``kind`` is SAME or what turns one into the other; ``group`` is where they
    come from."""

    one: str
    other: str
    kind: str
    group: int


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file in the form of ``pairs.txt``: within a group, each two that mean the
    same, and each of these with each that does not. Raises InvalidRequest naming the line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read as pairs: {error}") from None
    pairs: list[Pair] = []
    same: list[str] = []
    others: list[tuple[str, str]] = []
    group = 0
    for number, line in enumerate([*lines, ""], start=1):
        kind, _, text = line.strip().partition(" ")
        if kind.startswith("#"):
            continue
        if not kind:
            pairs += _pairs_of(same, others, group)
            group += bool(same)
            same, others = [], []
        elif kind == SAME and text.strip():
            same.append(text.strip())
        elif kind in KINDS and text.strip():
            others.append((kind, text.strip()))
        else:
            raise InvalidRequest(
                f"line {number} of {path} must begin with '=' or one of {', '.join(KINDS)}, then "
                "a question"
            )
    if not pairs:
        raise InvalidRequest(f"{path} holds no pairs")
    return pairs


def _pairs_of(same: list[str], others: list[tuple[str, str]], group: int) -> list[Pair]:
    found = [Pair(a, b, SAME, group) for i, a in enumerate(same) for b in same[i + 1 :]]
    return found + [Pair(a, b, kind, group) for a in same for kind, b in others]
