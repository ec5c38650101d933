"""How often the injection heuristic is right: hit and false alarm rates with 95 % intervals.

    python -m bench.guardrails.measure [--threshold 0.5]

Reads ``prompts.yaml`` beside it and the starter's customer questions (BANKING77), of which none is
an attack. Intervals are Wilson's.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import yaml

from cloudlm.security.guardrails.injection import score

_HERE = Path(__file__).parent
_QUESTIONS = _HERE.parent.parent / "starter" / "data" / "banking77.csv"


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson 1927)."""
    rate = hits / count
    middle = rate + z * z / (2 * count)
    half = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


def prompts() -> dict[str, list[str]]:
    """The labelled texts."""
    found: dict[str, list[str]] = yaml.safe_load((_HERE / "prompts.yaml").read_text("utf-8"))
    with _QUESTIONS.open(encoding="utf-8") as file:
        found["questions"] = [row["text"] for row in csv.DictReader(file)]
    return found


def rates(threshold: float) -> dict[str, tuple[int, int]]:
    """How many of each set reach the threshold, and of how many."""
    return {
        name: (sum(score(text) >= threshold for text in texts), len(texts))
        for name, texts in prompts().items()
    }


def main() -> None:
    """Print one line for each set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threshold", type=float, default=0.5)
    for name, (hits, count) in rates(parser.parse_args().threshold).items():
        low, high = wilson(hits, count)
        print(f"{name:<10} {hits:>5} of {count:>5}  {hits / count:6.1%}  [{low:.1%}, {high:.1%}]")


if __name__ == "__main__":
    main()
