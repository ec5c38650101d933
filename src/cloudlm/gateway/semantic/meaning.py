"""What two texts must have in common before one may be answered with the other's answer.

Vectors find texts that look alike; "enable" and "disable", 10 and 100, Paris and Rome look alike
too. This module reads what a vector blurs: negations, numbers, names and ids, words that have an
opposite, what is asked for (who, when, how many, may I), what stands after "to" and "from", tense,
whose it is, and the language. In doubt texts differ: a wrong "differs" costs one computation, a
wrong "same" a wrong answer. Pure. Must not measure likeness.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from cloudlm.gateway.semantic.lexicon import (
    BEFORE_VERBS,
    CALENDAR,
    FUTURE,
    LANGUAGES,
    MEASURES,
    NEGATIONS,
    NUMBERS,
    PARTICLES,
    PAST,
    PHRASES,
    READ_AS,
    SIGNS,
    SLOTS,
    STOP,
    THEIRS,
    stem,
)

LEAST_SHARED = 0.5
"""Where other words may stand for each other, this part of the words must still be the same."""
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|«([^»]+)»|`([^`]+)`|(?<!\w)\'([^\']+)\'(?!\w)')
_NUMBER = re.compile(
    r"([$€£¥+\-−]?)(\d[\d,]*(?:\.\d+)?)([^\W\d_]{0,4}|%)", re.ASCII | re.IGNORECASE
)
_EDGES = ".,;:!?()[]{}\"'“”«»`…¿¡’"
_INSIDE = re.compile(r"[@/\\_#:=<>+*&|^~.]")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_ASKS_FOR = r"(?:tell|explain|show|help|give|find|list|describe)(?: to)?(?: (?:me|us))?"
_POLITE = re.compile(
    r"^(?:(?:please|hi|hello|hey)[ ,]+)?"
    rf"(?:(?:can|could|would|will) you(?: please)?(?: {_ASKS_FOR})?"
    rf"|{_ASKS_FOR}|do you know|i(?:'d| would) like to know|i want to know|please)\b[ ,:]+(?=\w)",
    re.IGNORECASE,
)
_PHRASES = dict(PHRASES)
_PHRASE = re.compile(rf"\b(?:{'|'.join(_PHRASES)})\b", re.IGNORECASE)
_TURNED = ("un", "in", "im", "ir", "il", "dis", "non", "de", "mis", "anti", "re")
_ASKED = ("who", "whom", "whose", "when", "where", "why", "which")
_YES_OR_NO = ("do", "does", "did", "is", "are", "was", "were", "am", "has", "have", "had")
_MODALS = frozenset(
    (*_YES_OR_NO, "can", "could", "may", "might", "must", "shall", "should", "will", "would")
)
_KINDS = dict.fromkeys(_YES_OR_NO, "whether") | dict.fromkeys(("can", "could", "might"), "may")
_ARTICLES = ("a", "an", "the")
_DIRECTIONS = ("to", "from", "by")
_WAYS = frozenset(("way", "ways", "steps", "step", "process", "procedure"))


@dataclass(frozen=True, slots=True)
class Meaning:
    """What was read in a text. ``words`` are the content words as they are compared, ``spelled``
    all words in lower case, ``names`` the capitalised ones."""

    language: str
    spelled: tuple[str, ...]
    words: tuple[str, ...]
    negations: int
    numbers: tuple[str, ...]
    ids: tuple[str, ...]
    quoted: tuple[str, ...]
    names: tuple[str, ...]
    signs: tuple[tuple[tuple[int, int], int], ...]
    particles: frozenset[str]
    asked: str
    tense: str
    whose: frozenset[str]
    slots: tuple[tuple[str, tuple[str, ...]], ...]


def read(text: str) -> Meaning:
    """What ``text`` says, as far as this module reads."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'").strip()
    is_question = text.endswith("?")
    text = _PHRASE.sub(lambda found: _PHRASES[found[0].lower()], _POLITE.sub("", text))
    quoted = tuple(" ".join(_first(found)).lower() for found in _QUOTED.findall(text))
    numbers: list[str] = []
    ids: list[str] = []
    names: list[str] = []
    words: list[str] = []
    begins = True
    for piece in text.split():
        bare = piece.strip(_EDGES)
        if bare:
            _sort(bare, begins, numbers, ids, names, words)
        begins = piece.endswith((".", "!", "?", ":"))
    spelled = tuple(words)
    content = tuple(_content(spelled))
    return Meaning(
        language=_language(text, spelled),
        spelled=spelled,
        words=content,
        negations=sum(word in NEGATIONS or word.endswith("n't") for word in spelled),
        numbers=tuple(numbers),
        ids=tuple(ids),
        quoted=quoted,
        names=tuple(names),
        signs=tuple(sorted(Counter(filter(None, map(_sign, spelled))).items())),
        particles=frozenset(PARTICLES.intersection(spelled)),
        asked=_asked(spelled, is_question),
        tense=_tense(spelled),
        whose=frozenset(THEIRS[word] for word in spelled if word in THEIRS),
        slots=_slots(spelled),
    )


def difference(one: Meaning, other: Meaning, *, same_words: bool) -> str | None:
    """Why one may not be answered for the other, None if nothing speaks against it. Unless
    ``same_words``, half of the words may be others."""
    if one.language != other.language:
        return "language"
    if one.language != "en" and (one.spelled != other.spelled):
        return "language"  # its opposites are not known here
    if one.negations != other.negations:
        return "negation"
    if one.numbers != other.numbers:
        return "number"
    if one.ids != other.ids or one.quoted != other.quoted or not _same_names(one, other):
        return "entity"
    if one.signs != other.signs or one.particles != other.particles or _turned(one, other):
        return "polarity"
    if _other_asked(one.asked, other.asked) or one.tense != other.tense or one.whose != other.whose:
        return "asked"
    if _other_slots(one, other):
        return "slot"
    if _swapped(one, other):
        return "order"
    return _other_words(one, other, same_words)


def _first(groups: tuple[str, ...]) -> list[str]:
    return next(filter(None, groups)).split()


def _sort(
    bare: str,
    begins: bool,
    numbers: list[str],
    ids: list[str],
    names: list[str],
    words: list[str],
) -> None:
    """Put one piece of a text where it belongs."""
    number = _NUMBER.fullmatch(bare)
    if number is not None:
        sign, value, unit = number.groups()
        value = value.replace(",", "")
        value = value.rstrip("0").rstrip(".") if "." in value else value.lstrip("0") or "0"
        numbers.append(f"{sign}{value}")
        if unit and unit.lower() not in ("st", "nd", "rd", "th"):
            numbers.append(unit.lower())
        return
    if any(letter.isdigit() for letter in bare) or _INSIDE.search(bare.rstrip(".")):
        ids.append(bare.lower())
        return
    for word in _WORD.findall(bare):
        low = word.lower()
        if low in NUMBERS:
            numbers.append(NUMBERS[low])
        elif low in CALENDAR:
            ids.append(low)
        else:
            words.append(low)
            named = word[0].isupper() and (not begins or word.isupper())
            if named and low not in STOP and low.partition("'")[0] not in STOP:
                names.append(low.removesuffix("'s"))


def _content(spelled: tuple[str, ...]) -> list[str]:
    found = []
    for word in spelled:
        bare = word.removesuffix("'s")
        if bare not in STOP and word not in STOP and word not in NEGATIONS:
            root = stem(bare)
            found.append(READ_AS.get(root, root))
    return found


def _sign(word: str) -> tuple[int, int] | None:
    return SIGNS.get(stem(word)) if word not in ("with",) else None


def _other_asked(one: str, other: str) -> bool:
    """Whether two kinds of answer differ; what names none may be an order or a headline."""
    return one != other and not ({one, other} <= {"", "what"} or {one, other} <= {"", "how"})


def _asked(words: tuple[str, ...], is_question: bool) -> str:
    """What kind of answer a text wants; empty if no word says it."""
    for place, word in enumerate(words):
        word = word.partition("'")[0]
        after = words[place + 1 : place + 4]
        if word == "how":
            if after[:1] == ("come",):
                return "why"
            return f"how {after[0]}" if after and after[0] in MEASURES else "how"
        if word in _ASKED:
            return {"whom": "who", "which": "what"}.get(word, word)
        if word == "what":
            if "time" in after[:1] or "date" in after:
                return "when"
            if "reason" in after:
                return "why"
            return "how" if _WAYS.intersection(words[place + 1 : place + 6]) else "what"
    modals = words[:1] if not is_question else words
    modal = next((word for word in modals if word in _MODALS), "")
    return _KINDS.get(modal, modal)


def _tense(spelled: tuple[str, ...]) -> str:
    if PAST.intersection(spelled):
        return "past"
    return "future" if FUTURE.intersection(spelled) else ""


def _slots(spelled: tuple[str, ...]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The first content word after each preposition."""
    found: dict[str, list[str]] = {}
    for place, word in enumerate(spelled):
        if word in SLOTS:
            if word == "to" and place and spelled[place - 1] in BEFORE_VERBS:
                continue
            after = _content(spelled[place + 1 : place + 5])
            found.setdefault(word, []).extend(after[:1])
    return tuple(sorted((word, tuple(sorted(after))) for word, after in found.items() if after))


def _other_slots(one: Meaning, other: Meaning) -> bool:
    mine, theirs = dict(one.slots), dict(other.slots)
    if any(after != theirs.get(word, after) for word, after in mine.items()):
        return True
    return any(
        set(mine.get(here, ())) & set(theirs.get(there, ()))
        for here in _DIRECTIONS
        for there in _DIRECTIONS
        if here != there
    )


def _swapped(one: Meaning, other: Meaning) -> bool:
    """Whether the same words stand in another order, as where who does it and to whom change
    places. A part that only went to the front is none: "on Monday, is it open?"."""
    mine = [word for word in one.spelled if word not in _ARTICLES]
    theirs = [word for word in other.spelled if word not in _ARTICLES]
    if mine == theirs or sorted(mine) != sorted(theirs):
        return False
    return all(mine[cut:] + mine[:cut] != theirs for cut in range(1, len(mine)))


def _same_names(one: Meaning, other: Meaning) -> bool:
    """Whether all names are in both, in the same order, however they are written."""
    names = {*one.names, *other.names}
    if not names:
        return True
    mine = [word for word in _bare(one) if word in names]
    return mine == [word for word in _bare(other) if word in names]


def _bare(meaning: Meaning) -> list[str]:
    return [word.removesuffix("'s") for word in meaning.spelled]


def _turned(one: Meaning, other: Meaning) -> bool:
    """Whether a word of one is the other's with 'un' or the like before it."""
    mine, theirs = set(one.words) - set(other.words), set(other.words) - set(one.words)
    return any(
        prefix + short in long
        for long, short_ones in ((mine, theirs), (theirs, mine))
        for short in short_ones
        for prefix in _TURNED
    )


def _other_words(one: Meaning, other: Meaning, same_words: bool) -> str | None:
    mine, theirs = set(one.words), set(other.words)
    if mine == theirs:
        return None
    if same_words or len(mine & theirs) < LEAST_SHARED * max(len(mine), len(theirs)):
        return "words"
    return None


def _language(text: str, spelled: tuple[str, ...]) -> str:
    """The language, as far as a few words show it. What shows nothing and has plain letters only is
    taken for English."""
    letters = [letter for letter in text if letter.isalpha()]
    foreign = sum(not letter.isascii() for letter in letters)
    if foreign > len(letters) / 2:
        return unicodedata.name(next(c for c in letters if not c.isascii()), "?").split()[0].lower()
    votes = {name: sum(word in words for word in spelled) for name, words in LANGUAGES.items()}
    best = max(votes.values(), default=0)
    if best == 0:
        return "?" if foreign else "en"
    winners = [name for name, count in votes.items() if count == best]
    return winners[0]
