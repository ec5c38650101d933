"""The words that turn a meaning around, and those that change nothing. English, but for negations.

Only lists, so that they can be read and grown; ``meaning`` says what they are for. A word stands in
one place of a list at most.
"""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NEGATIONS = _words(
    "no not never without none nobody nothing nowhere neither nor cannot cant dont doesnt didnt "
    "isnt arent wasnt werent wont wouldnt shouldnt couldnt havent hasnt hadnt mustnt aint unless "
    "except excluding hardly barely lack lacking instead avoid prevent stop fail failed refuse "
    "nicht kein keine keinen nie niemals ohne pas jamais sans aucun sin nunca jamas ningun non mai "
    "senza nao sem niet geen zonder"
)
"""Counted: as many in one as in the other."""

OPPOSITES = (
    "enable activate | disable deactivate",
    "allow permit grant | forbid deny block ban prohibit",
    "include with | exclude omit skip",
    "accept approve agree confirm | reject decline disapprove disagree dismiss",
    "add insert create attach append install make build | "
    "remove delete erase detach drop uninstall destroy wipe clear",
    "start begin launch resume continue | end finish halt pause quit terminate abort cancel",
    "open unlock | close shut lock",
    "increase raise grow rise boost extend expand gain upward | "
    "decrease reduce lower shrink fall cut shorten shrinking loss downward",
    "upgrade promote | downgrade demote",
    "buy purchase receive import download borrow | sell return send export upload lend refund",
    "more most maximum max larger largest bigger biggest longer longest higher highest above over "
    "exceed | less least minimum min smaller smallest shorter shortest lowest below under fewer",
    "before earlier earliest previous prior past | after later latest next following future since",
    "first oldest | last newest",
    "left | right",
    "top upper | bottom",
    "inside internal inner | outside external outer",
    "public | private secret",
    "good better best pro advantage benefit strength positive | "
    "bad worse worst con disadvantage drawback weakness negative",
    "cheap cheaper cheapest free | expensive costly paid",
    "fast faster fastest quick quicker | slow slower slowest",
    "hot hotter warm | cold colder cool",
    "safe secure legal valid true correct right-hand | "
    "dangerous unsafe illegal invalid false wrong incorrect",
    "easy easier simple | hard harder difficult complex",
    "win pass succeed success | lose failure",
    "connect join merge link subscribe register enroll | "
    "disconnect leave split separate unlink unsubscribe unregister",
    "encrypt encode compress hide mute | decrypt decode decompress show unmute reveal",
    "credit deposit lend-out income asset profit | debit withdraw withdrawal expense liability",
    "male man men boy father husband king brother son | "
    "female woman women girl mother wife queen sister daughter",
    "always every all everyone everything both | sometimes some any someone either half",
    "inbound incoming arrival arrive | outbound outgoing departure depart",
    "new young | old",
    "full | empty",
    "day daily morning | night nightly evening",
    "winter | summer",
    "domestic | international abroad foreign",
    "gross | net",
    "front | back",
    "online remote | offline onsite",
    "employer | employee",
    "buyer customer client | seller vendor server",
    "input | output",
    "read readable | write writable",
    "absorb | emit",
    "ascending | descending",
    "horizontal | vertical",
    "major | minor",
    "push | pull",
    "lossy | lossless",
    "heat | chill",
    "source | destination target",
    "optional | required mandatory",
    "parent | child",
    "temporary | permanent",
    "manual manually | automatic automatically",
)
"""Those before the bar against those after it."""

PARTICLES = _words("off out down away back only just-only alone too")
"""What turns the verb before it around, or narrows it: in both or in neither."""

SAME = (
    "reset change update modify edit alter",
    "enable activate",
    "disable deactivate",
    "delete remove erase",
    "buy purchase",
    "cancel terminate",
    "begin start",
    "password passcode passwd",
    "picture photo image",
    "email e-mail mail",
    "phone telephone",
    "fix repair solve resolve",
    "show display",
    "find locate",
    "fast quick",
    "big large",
    "cost price fee charge",
    "job position",
    "error fault",
    "explain describe",
    "writer author",
    "film movie",
    "city town",
    "doctor physician",
    "car automobile",
    "bill invoice",
    "error mistake",
    "company firm",
    "holiday vacation",
    "laptop notebook",
    "shop store",
    "make create build",
    "increase raise",
    "decrease reduce lower",
    "send ship deliver",
    "keep retain",
    "info information detail",
    "app application",
    "photo picture",
    "kid child",
    "meaning definition define",
    "difference distinction",
    "compute calculate",
    "verify validate",
)
"""Words that may stand for each other; the first is the one that they are read as."""

STOP = _words(
    "a about actually again also am an and anybody anyone anything are as at be because been "
    "being best but by can could currently d dear did do does doing done exactly for from give "
    "had has have having he hello help her here hey hi him his how how's i i'd i'll i'm i've "
    "if in into is it it's its just kindly know let let's like ll looking m may me might mine "
    "must my myself need needed now of ok okay on one's onto or our please possible procedure "
    "process quite re really s shall she should simply so somebody someone something step "
    "steps t tell than thank thanks that that's the their theirs them then there there's these "
    "they this those to today try trying until up us ve very want wanted was way ways we were "
    "what what's when where where's which while who who's whom whose why will with would "
    "would'd you your yourself"
)
"""What is left out where words are compared; some of them count elsewhere."""

NUMBERS = {
    word: str(value)
    for value, words in {
        0: "zero nil", 1: "one once single first 1st", 2: "two twice double second pair couple",
        3: "three thrice triple third", 4: "four fourth quarter", 5: "five fifth", 6: "six sixth",
        7: "seven seventh", 8: "eight eighth", 9: "nine ninth", 10: "ten tenth", 11: "eleven",
        12: "twelve dozen", 13: "thirteen", 14: "fourteen", 15: "fifteen", 16: "sixteen",
        17: "seventeen", 18: "eighteen", 19: "nineteen", 20: "twenty", 30: "thirty", 40: "forty",
        50: "fifty", 60: "sixty", 70: "seventy", 80: "eighty", 90: "ninety", 100: "hundred",
        1000: "thousand", 1000000: "million", 1000000000: "billion",
    }.items()
    for word in words.split()
}  # fmt: skip
CALENDAR = _words(
    "monday tuesday wednesday thursday friday saturday sunday january february march april june "
    "july august september october november december tomorrow yesterday tonight weekend weekday"
)

MEASURES = _words("many much long often far old big tall large heavy fast deep high soon wide")
"""What follows 'how' and makes another question of it."""

SLOTS = _words("to from in into at for by between than of on with about through via as per")
"""What follows one of these must be the same where both texts have it."""

PHRASES = (
    ("turn on", "enable"),
    ("switch on", "enable"),
    ("turn off", "disable"),
    ("switch off", "disable"),
    ("shut off", "disable"),
    ("get rid of", "delete"),
    ("sign up for", "subscribe to"),
    ("opt in to", "subscribe to"),
    ("opt out of", "unsubscribe from"),
    ("sign in", "login"),
    ("log in", "login"),
    ("log on", "login"),
    ("sign out", "logout"),
    ("log out", "logout"),
    ("log off", "logout"),
)
"""Verbs of two words, and the one that they are read as."""

BEFORE_VERBS = _words(
    "want wants need needs like how trying try way ways steps possible able going easy safe have "
    "has order take takes used supposed allowed"
)
"""After these 'to' says nothing of where."""

PAST = _words("was were did had")
FUTURE = _words("will shall going")
THEIRS = {
    "your": "2", "yours": "2", "he": "he", "him": "he", "his": "he", "she": "she", "her": "she",
    "hers": "she", "they": "they", "them": "they", "their": "they", "theirs": "they",
}  # fmt: skip

LANGUAGES = {
    "en": _words(
        "the is are do does how what where when who why which can i my you your of to in for and "
        "with a an not it this that have has will would should please"
    ),
    "de": _words(
        "der die das ist sind wie was wo wann wer warum kann ich mein meine du ein eine und mit "
        "nicht zu für von auf es den dem im bitte wird"
    ),
    "fr": _words(
        "le la les est sont comment quoi où quand qui pourquoi je mon ma mes vous un une et avec "
        "pas de du des pour dans que ce puis quel quelle"
    ),
    "es": _words(
        "el la los las es son cómo como qué dónde cuándo quién puedo mi mis usted un una y con no "
        "de del para en que por cuál"
    ),
    "it": _words(
        "il lo la gli è sono come cosa dove quando chi perché posso mio mia un una e con non di "
        "del per in che qual"
    ),
    "pt": _words(
        "o a os as é são como que onde quando quem posso meu minha um uma e com não de do da para "
        "em por qual"
    ),
    "nl": _words(
        "de het een is zijn hoe wat waar wanneer wie waarom kan ik mijn jij en met niet van voor "
        "op te dat"
    ),
}


def _stem(word: str) -> str:
    for ending, put in (("ies", "y"), ("sses", "ss"), ("ing", ""), ("ed", "")):
        if word.endswith(ending) and len(word) - len(ending) + len(put) >= 3:
            word = word[: -len(ending)] + put
            if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz":
                word = word[:-1]
            break
    else:
        if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
            word = word[:-1]
    if len(word) > 3 and word.endswith("e"):
        word = word[:-1]
    return re.sub(r"([a-z])\1$", r"\1", word) if word.endswith("ll") else word


def stem(word: str) -> str:
    """A word without its ending, as good as a few rules make it."""
    return _stem(word)


def _read_same() -> dict[str, str]:
    found: dict[str, str] = {}
    for line in SAME:
        first, *others = map(_stem, line.split())
        for word in others:
            found.setdefault(word, found.get(first, first))
    return found


def _read_opposites() -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for axis, line in enumerate(OPPOSITES):
        for sign, side in zip((1, -1), line.split("|"), strict=True):
            for word in side.split():
                found.setdefault(_stem(word), (axis, sign))
    return found


READ_AS = _read_same()
SIGNS = _read_opposites()
"""The pair that a stem belongs to, and its side."""
