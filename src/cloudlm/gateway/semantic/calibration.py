"""From labelled pairs to a threshold that keeps a stated budget of false hits.

A false hit is a pair of different questions of which one would be answered with the other's
answer; its rate is counted over all pairs of different questions, which are made to be hard. The
lowest threshold is taken whose rate is within the budget at the upper end of its 95 % interval
(Clopper and Pearson 1934, exact for a binomial). The rate that is reported comes from pairs that
the threshold was not chosen on: pairs apart, or groups left out in turn (cross-validation). Pairs
of one group are not independent, so the interval is somewhat too narrow; the count of groups is
told beside it. Pure but for the functions that read and write files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from cloudlm.core.errors import InvalidRequest
from cloudlm.gateway.semantic.meaning import difference, read
from cloudlm.gateway.semantic.pairs import SAME, Pair

CONFIDENCE = 0.95
FOLDS = 5
LEAST_LIKENESS = 0.5
"""No threshold is lower, for below it a vector says nothing, whatever the pairs at hand are."""
FILE_NAME = "semantic.json"


class Judged(NamedTuple):
    """A pair with its likeness, and whether the guards let it pass with other words and with the
    same words only."""

    pair: Pair
    likeness: float
    passes: bool
    passes_same: bool


class Choice(NamedTuple):
    """A rule for hits."""

    threshold: float
    same_words: bool


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was chosen and what it was measured to do; the file that the gateway reads.
    ``rules`` tells the guards that it was made with from others, ``fingerprint`` is the embedder's
    vector of a fixed text, empty for the built-in one."""

    embedder: str
    threshold: float
    same_words: bool
    budget: float
    false_hits: int
    different_pairs: int
    false_hit_rate: float
    false_hit_low: float
    false_hit_high: float
    hits: int
    same_pairs: int
    groups: int
    rules: str
    fingerprint: tuple[float, ...] = ()


# Choosing ---------------------------------------------------------------------------------------


def judge(pairs: Sequence[Pair], likeness: Callable[[str, str], float]) -> list[Judged]:
    """Each pair as vectors and guards see it."""
    meanings = {text: read(text) for pair in pairs for text in (pair.one, pair.other)}
    found = []
    for pair in pairs:
        one, other = meanings[pair.one], meanings[pair.other]
        passes = difference(one, other, same_words=False) is None
        passes_same = difference(one, other, same_words=True) is None
        found.append(Judged(pair, likeness(pair.one, pair.other), passes, passes_same))
    return found


def hits(judged: Judged, choice: Choice) -> bool:
    """Whether a pair would be a hit."""
    passes = judged.passes_same if choice.same_words else judged.passes
    return passes and judged.likeness >= choice.threshold


def choose(judged: Sequence[Judged], budget: float) -> Choice:
    """The rule with the most hits within the budget. Raises InvalidRequest if no rule keeps it, or
    the pairs are too few to show it."""
    different = sum(one.pair.kind != SAME for one in judged)
    if interval(0, different)[1] > budget:
        needed = math.ceil(math.log((1 - CONFIDENCE) / 2) / math.log1p(-budget))
        raise InvalidRequest(
            f"{different} pairs of different questions cannot show a rate of {budget:g}: at least "
            f"{needed} are needed; give more pairs or a larger budget",
            param="budget",
        )
    best, most = None, -1
    for same_words in (True, False):
        choice = Choice(_lowest(judged, budget, same_words), same_words)
        count = sum(one.pair.kind == SAME and hits(one, choice) for one in judged)
        if choice.threshold <= 1.0 and count > most:
            best, most = choice, count
    if best is None or most == 0:
        raise InvalidRequest(
            f"no threshold keeps false hits within {budget:g} with this embedder and answers "
            "anything; give a larger budget or another embedder",
            param="budget",
        )
    return best


def _lowest(judged: Sequence[Judged], budget: float, same_words: bool) -> float:
    """The lowest threshold within the budget, just above a false hit's likeness."""
    different = sum(one.pair.kind != SAME for one in judged)
    false = sorted(
        (one.likeness for one in judged if one.pair.kind != SAME and _passes(one, same_words)),
        reverse=True,
    )
    allowed = 0
    while allowed < len(false) and interval(allowed + 1, different)[1] <= budget:
        allowed += 1
    if allowed < len(false):
        return max(false[allowed] + 1e-4, LEAST_LIKENESS)
    passing = [one.likeness for one in judged if _passes(one, same_words)]
    return max(min(passing, default=2.0), LEAST_LIKENESS)


def _passes(judged: Judged, same_words: bool) -> bool:
    return judged.passes_same if same_words else judged.passes


def calibrate(
    pairs: Sequence[Pair],
    likeness: Callable[[str, str], float],
    budget: float,
    embedder: str,
    fingerprint: tuple[float, ...] = (),
    apart: Sequence[Pair] = (),
) -> Calibration:
    """Choose a rule on ``pairs``, and measure it on those ``apart``; where there are none, measure
    on each group what a choice without it does. Raises as ``choose``, and InvalidRequest if the
    rate that was measured is over the budget."""
    judged = judge(pairs, likeness)
    choice = choose(judged, budget)
    if apart:
        seen = [(one, choice) for one in judge(apart, likeness)]
    else:
        seen = _left_out(judged, budget, choice.same_words)
    same = [hits(one, rule) for one, rule in seen if one.pair.kind == SAME]
    different = [hits(one, rule) for one, rule in seen if one.pair.kind != SAME]
    false = sum(different)
    low, high = interval(false, len(different))
    if not different or false / len(different) > budget:
        raise InvalidRequest(
            f"{false} of {len(different)} pairs that the threshold was not chosen on are false "
            f"hits, more than the budget of {budget:g}; give a larger one or another embedder",
            param="budget",
        )
    return Calibration(
        embedder=embedder,
        threshold=round(choice.threshold, 6),
        same_words=choice.same_words,
        budget=budget,
        false_hits=false,
        different_pairs=len(different),
        false_hit_rate=false / len(different),
        false_hit_low=low,
        false_hit_high=high,
        hits=sum(same),
        same_pairs=len(same),
        groups=len({one.pair.group for one, _ in seen}),
        rules=rules(),
        fingerprint=fingerprint,
    )


def _left_out(
    judged: Sequence[Judged], budget: float, same_words: bool
) -> list[tuple[Judged, Choice]]:
    """Each pair with the rule that pairs of other groups give."""
    found: list[tuple[Judged, Choice]] = []
    for fold in range(FOLDS):
        rest = [one for one in judged if one.pair.group % FOLDS != fold]
        left = [one for one in judged if one.pair.group % FOLDS == fold]
        if not left or not rest:
            raise InvalidRequest(f"pairs of at least {FOLDS} groups are needed")
        rule = Choice(_lowest(rest, budget, same_words), same_words)
        found += [(one, rule) for one in left]
    return found


# The interval -----------------------------------------------------------------------------------


def interval(count: int, of: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact two-sided interval of a rate seen ``count`` times ``of`` so many (Clopper and
    Pearson 1934)."""
    if of <= 0:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    low = 0.0 if count == 0 else _where(lambda p: 1 - _at_most(count - 1, of, p), tail)
    high = 1.0 if count >= of else _where(lambda p: -_at_most(count, of, p), -tail)
    return low, high


def _where(grows: Callable[[float], float], value: float) -> float:
    """Where a growing function takes a value, by halving."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if grows(middle) < value else (low, middle)
    return (low + high) / 2


def _at_most(count: int, of: int, rate: float) -> float:
    """The binomial chance of no more than ``count``."""
    if rate <= 0.0:
        return 1.0
    if rate >= 1.0:
        return 1.0 if count >= of else 0.0
    log_all = math.lgamma(of + 1)
    return math.fsum(
        math.exp(
            log_all
            - math.lgamma(k + 1)
            - math.lgamma(of - k + 1)
            + k * math.log(rate)
            + (of - k) * math.log1p(-rate)
        )
        for k in range(count + 1)
    )


# The file ---------------------------------------------------------------------------------------


def rules() -> str:
    """Another text for other guards or another built-in embedder."""
    digest = hashlib.blake2b(digest_size=8)
    for name in ("lexicon.py", "meaning.py", "vectors.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


def write(calibration: Calibration, home: Path) -> Path:
    """Keep a calibration in an installation's home; returns the file. Raises OSError."""
    path = home / FILE_NAME
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(asdict(calibration)), indent=2))
    fresh.replace(path)
    return path


def load(home: Path) -> Calibration | None:
    """The calibration in a home, None if there is none. Raises InvalidRequest for a broken one."""
    path = home / FILE_NAME
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Calibration)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, ValueError) as error:
        raise InvalidRequest(
            f"{path} is no calibration ({error}); 'cloudlm cache calibrate' writes one"
        ) from None
    if not 0 < found.threshold <= 1.001:
        raise InvalidRequest(f"{path}: threshold must be from 0 to 1; calibrate anew")
    return found


def facts(calibration: Calibration) -> dict[str, Any]:
    """What people want to know of it."""
    known = asdict(calibration)
    del known["fingerprint"], known["rules"]
    return known | {"hit_rate": calibration.hits / max(calibration.same_pairs, 1)}
