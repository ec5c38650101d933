"""False hits of the semantic cache against those of a plain threshold, at an equal hit rate.

    python bench/gateway/semantic.py [--budget 0.01] [--vectors DIR] [--json]

The rule is calibrated on the pairs that cloudlm ships, then judged on those apart, which
neither the guards nor the threshold were made with. Beside it, what a gateway does that compares
vectors alone: on the same vectors, a threshold set so that it answers as many of the pairs that
mean the same (never fewer), and the usual ones of such gateways (0.8 and 0.9); and a threshold set
like this over runs of letters of the whole text. ``--vectors`` names a folder with
``vectors.json`` (text to list of numbers) of another embedder than the built-in one.

A false hit is a pair of different questions that would be answered as one; the interval is Clopper
and Pearson's at 95 %. Pairs of a group hang together, so groups with a false hit are told too.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from cloudlm.gateway.semantic import calibration
from cloudlm.gateway.semantic.calibration import Choice, Judged, hits, interval, judge
from cloudlm.gateway.semantic.meaning import difference, read
from cloudlm.gateway.semantic.pairs import SAME, SHIPPED_APART, SHIPPED_PAIRS, read_pairs
from cloudlm.gateway.semantic.vectors import built_in, unit

USUAL = (0.8, 0.9)


def count(judged: Sequence[Judged], hit: Callable[[Judged], bool]) -> dict[str, Any]:
    """Hits and false hits of one rule."""
    same = [one for one in judged if one.pair.kind == SAME]
    different = [one for one in judged if one.pair.kind != SAME]
    false = [one for one in different if hit(one)]
    low, high = interval(len(false), len(different))
    return {
        "hits": sum(map(hit, same)),
        "of": len(same),
        "false_hits": len(false),
        "of_different": len(different),
        "rate": round(len(false) / len(different), 5),
        "low": round(low, 5),
        "high": round(high, 5),
        "groups": len({one.pair.group for one in false}),
        "of_groups": len({one.pair.group for one in different}),
        "kinds": dict(Counter(one.pair.kind for one in false)),
    }


def plain_at(judged: Sequence[Judged], wanted: int) -> float:
    """The highest plain threshold with at least so many hits."""
    same = sorted((one.likeness for one in judged if one.pair.kind == SAME), reverse=True)
    return same[max(wanted, 1) - 1]


def likeness_of(folder: Path | None) -> Callable[[str, str], float]:
    known: dict[str, Any] = {}
    if folder is not None:
        raw = json.loads((folder / "vectors.json").read_text("utf-8"))
        known = {text: unit(values) for text, values in raw.items()}

    def vector(text: str) -> Any:
        if text not in known:
            if folder is not None:
                raise SystemExit(f"vectors.json has no vector of {text!r}")
            known[text] = built_in(read(text))
        return known[text]

    return lambda one, other: float(vector(one) @ vector(other))


def letters_of(text: str) -> Any:
    """A vector of all runs of three to five letters of the text as it is: negations, numbers and
    small words count like all others."""
    text = f" {' '.join(text.lower().split())} "
    vector = [0.0] * 4096
    for length in (3, 4, 5):
        for begin in range(len(text) - length + 1):
            vector[zlib.crc32(text[begin : begin + length].encode()) % len(vector)] += 1.0
    return unit(vector)


def by_letters(judged: Sequence[Judged]) -> list[Judged]:
    """The same pairs, compared by ``letters_of``."""
    return [
        one._replace(likeness=float(letters_of(one.pair.one) @ letters_of(one.pair.other)))
        for one in judged
    ]


def cost_us(texts: Sequence[str]) -> dict[str, float]:
    """What reading, embedding and comparing cost, microseconds per text."""
    began = time.perf_counter()
    meanings = [read(text) for text in texts]
    read_at = time.perf_counter()
    for meaning in meanings:
        built_in(meaning)
    embedded_at = time.perf_counter()
    for one, other in pairwise(meanings):
        difference(one, other, same_words=True)
    ended = time.perf_counter()
    steps = {"read": read_at - began, "embed": embedded_at - read_at, "guard": ended - embedded_at}
    return {name: round(seconds / len(texts) * 1e6, 1) for name, seconds in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=0.01)
    parser.add_argument("--vectors", type=Path)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    likeness = likeness_of(wanted.vectors)
    made = read_pairs(SHIPPED_PAIRS)
    others = read_pairs(SHIPPED_APART)
    rule = calibration.calibrate(made, likeness, wanted.budget, "bench", apart=others)
    choice = Choice(rule.threshold, rule.same_words)
    apart = judge(others, likeness)
    ours = count(apart, lambda one: hits(one, choice))
    equal = plain_at(apart, ours["hits"])
    rows = {
        f"guards and threshold {choice.threshold:.3f}": ours,
        f"plain threshold {equal:.3f}, as many hits": count(apart, lambda o: o.likeness >= equal),
    }
    letters = by_letters(apart)
    equal_letters = plain_at(letters, ours["hits"])
    rows[f"the same over letters alone, {equal_letters:.3f}"] = count(
        letters, lambda one: one.likeness >= equal_letters
    )
    for usual in USUAL:
        rows[f"plain threshold {usual}"] = count(apart, lambda o, t=usual: o.likeness >= t)
    texts = sorted({text for one in apart for text in one.pair[:2]})
    found = {
        "calibration": calibration.facts(rule),
        "held_out": rows,
        "cost_us": cost_us(texts),
    }
    if wanted.json:
        print(json.dumps(found, indent=2))
        return
    print(json.dumps(found["calibration"]), json.dumps(found["cost_us"]), sep="\n")
    for name, row in rows.items():
        print(
            f"{name:45} hits {row['hits']:3}/{row['of']}  false {row['false_hits']:3}/"
            f"{row['of_different']} = {row['rate']:.2%} ({row['low']:.2%} to {row['high']:.2%})  "
            f"groups {row['groups']}/{row['of_groups']}  {row['kinds']}"
        )


if __name__ == "__main__":
    main()
