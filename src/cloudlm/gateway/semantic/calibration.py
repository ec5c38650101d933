"""From labelled pairs to a threshold that keeps a stated budget of false hits.

A false hit is a pair of different questions of which one would be answered with the other's
answer; its rate is counted over all pairs of different questions, which are made to be hard. The
lowest threshold is taken whose rate is within the budget at the upper end of its 95 % interval
(Clopper and Pearson 1934, exact for a binomial). The rate that is reported comes from groups that
the threshold was not chosen on (cross-validation). Pairs of one group are not independent, so the
interval is somewhat too narrow; the count of groups is told beside it. Pure but for the two
functions that read and write files.
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

SAME = "="
CONFIDENCE = 0.95
FOLDS = 5
SHIPPED_PAIRS = Path(__file__).with_name("pairs.txt")
FILE_NAME = "semantic.json"
KINDS = ("negation", "number", "entity", "polarity", "language", "asked", "scope", "other")


class Pair(NamedTuple):
    """Two questions. ``kind`` is SAME or what turns one into the other; ``group`` is where they
    come from."""

    one: str
    other: str
    kind: str
    group: int


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


# Pairs ------------------------------------------------------------------------------------------


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
        return math.nextafter(false[allowed] + 1e-4, 2.0)
    return min((one.likeness for one in judged if _passes(one, same_words)), default=2.0)


def _passes(judged: Judged, same_words: bool) -> bool:
    return judged.passes_same if same_words else judged.passes


def calibrate(
    pairs: Sequence[Pair],
    likeness: Callable[[str, str], float],
    budget: float,
    embedder: str,
    fingerprint: tuple[float, ...] = (),
) -> Calibration:
    """Choose a rule, and measure on groups apart what such a choice does. Raises as ``choose``."""
    judged = judge(pairs, likeness)
    choice = choose(judged, budget)
    false = found = 0
    for fold in range(FOLDS):
        apart = [one for one in judged if one.pair.group % FOLDS == fold]
        rest = [one for one in judged if one.pair.group % FOLDS != fold]
        if not apart or not rest:
            raise InvalidRequest(f"pairs of at least {FOLDS} groups are needed")
        rule = Choice(_lowest(rest, budget, choice.same_words), choice.same_words)
        false += sum(hits(one, rule) for one in apart if one.pair.kind != SAME)
        found += sum(hits(one, rule) for one in apart if one.pair.kind == SAME)
    different = sum(one.pair.kind != SAME for one in judged)
    low, high = interval(false, different)
    return Calibration(
        embedder=embedder,
        threshold=round(choice.threshold, 6),
        same_words=choice.same_words,
        budget=budget,
        false_hits=false,
        different_pairs=different,
        false_hit_rate=false / different,
        false_hit_low=low,
        false_hit_high=high,
        hits=found,
        same_pairs=len(judged) - different,
        groups=len({one.pair.group for one in judged}),
        rules=rules(),
        fingerprint=fingerprint,
    )


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
