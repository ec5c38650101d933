"""Numbers that states give to people, where the form is well defined: each with its form and check.

Australia and others whose numbers are bare digits with a weak check are left out: they would be
found in every second order number. Sources are the definitions of each state; the checks by name:
Verhoeff (IN), ISO 7064 MOD 11,10 (DE) and MOD 11-2 (CN), Luhn (CA, SE), modulo 97 (FR, BE),
modulo 11 (GB, BR, PL by 10), modulo 23 (ES), modulo 31 (FI), the odd and even table (IT). The
United States' number has no check digit, only numbers that are never given.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable

from cloudlm.security.guardrails.places import after, apart, before, digits_of, luhn, weighted
from cloudlm.security.guardrails.scanner import NO_MATCH, Check

_VERHOEFF_TIMES = (
    "0123456789",
    "1234067895",
    "2340178956",
    "3401289567",
    "4012395678",
    "5987604321",
    "6598710432",
    "7659821043",
    "8765932104",
    "9876543210",
)
_VERHOEFF_TURN = (
    "0123456789",
    "1576283094",
    "5803796142",
    "8916043527",
    "9453126870",
    "4286573901",
    "2793806415",
    "7046913258",
)
_ITALIAN_ODD = dict(zip("0123456789", (1, 0, 5, 7, 9, 13, 15, 17, 19, 21), strict=True)) | dict(
    zip(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        (
            1,
            0,
            5,
            7,
            9,
            13,
            15,
            17,
            19,
            21,
            2,
            4,
            18,
            20,
            11,
            3,
            6,
            8,
            12,
            14,
            16,
            10,
            22,
            25,
            24,
            23,
        ),
        strict=True,
    )
)
_FINNISH = "0123456789ABCDEFHJKLMNPRSTUVWXY"
_SPANISH = "TRWAGMYFPDXBNJZSQVHLCKE"
_CHINESE_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def _checked(good: Callable[[str], bool]) -> Check:
    """A check of a text that stands apart and is good without blanks and in capitals."""

    def check(data: bytes, start: int, end: int) -> int:
        left, right = before(data, start), after(data, end)
        if not (apart(left) and apart(right)) or left in ("-", ".", "+"):
            return NO_MATCH
        return end if good(data[start:end].decode().replace(" ", "").upper()) else NO_MATCH

    return check


def _digits(text: str) -> str:
    return digits_of(text.encode(), 0, len(text))


def _is_date(year: int, month: int, day: int) -> bool:
    try:
        datetime.date(year, month, day)
    except ValueError:
        return False
    return True


def _short_date(text: str) -> bool:
    """YYMMDD in either century."""
    year, month, day = int(text[:2]), int(text[2:4]), int(text[4:6])
    return _is_date(1900 + year, month, day) or _is_date(2000 + year, month, day)


def _united_states(text: str) -> bool:
    area, group, serial = text.split("-")
    return area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"


def _germany(text: str) -> bool:
    counts = [text[:10].count(digit) for digit in set(text[:10])]
    if text[0] == "0" or sorted(counts)[-1] not in (2, 3) or counts.count(max(counts)) != 1:
        return False
    if sum(count > 1 for count in counts) != 1:
        return False
    product = 10
    for digit in text[:10]:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == int(text[10])


def _spain(text: str) -> bool:
    number = text[:-1].replace("-", "").translate(str.maketrans("XYZ", "012"))
    return _SPANISH[int(number) % 23] == text[-1]


def _france(text: str) -> bool:
    number = text[:13].replace("2A", "19").replace("2B", "18")
    month = int(text[3:5])
    if not number.isdigit() or not (1 <= month <= 12 or 20 <= month <= 42 or month >= 50):
        return False
    return 97 - int(number) % 97 == int(text[13:])


def _italy(text: str) -> bool:
    total = 0
    for place, character in enumerate(text[:15]):
        even = int(character) if character.isdigit() else ord(character) - 65
        total += even if place % 2 else _ITALIAN_ODD[character]
    return chr(65 + total % 26) == text[15]


def _britain(text: str) -> bool:
    """The National Health Service's number."""
    number = _digits(text)
    rest = 11 - weighted(number, (10, 9, 8, 7, 6, 5, 4, 3, 2)) % 11
    return len(set(number)) > 1 and rest % 11 == int(number[9])


def _brazil(text: str) -> bool:
    number = _digits(text)
    if len(set(number)) == 1:
        return False
    first = weighted(number[:9], tuple(range(10, 1, -1))) * 10 % 11 % 10
    second = weighted(number[:10], tuple(range(11, 1, -1))) * 10 % 11 % 10
    return number[9:] == f"{first}{second}"


def _china(text: str) -> bool:
    if not _is_date(int(text[6:10]), int(text[10:12]), int(text[12:14])):
        return False
    return "10X98765432"[weighted(text[:17], _CHINESE_WEIGHTS) % 11] == text[17]


def _india(text: str) -> bool:
    state = 0
    for place, digit in enumerate(reversed(_digits(text))):
        state = int(_VERHOEFF_TIMES[state][int(_VERHOEFF_TURN[place % 8][int(digit)])])
    return state == 0


def _poland(text: str) -> bool:
    century = {0: 1900, 1: 2000, 2: 2100, 3: 2200, 4: 1800}
    part, month = divmod(int(text[2:4]), 20)
    if not _is_date(century[part] + int(text[:2]), month, int(text[4:6])):
        return False
    return (10 - weighted(text, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3)) % 10) % 10 == int(text[10])


def _sweden(text: str) -> bool:
    number = _digits(text)[-10:]
    return _short_date(number) and luhn(number)


def _finland(text: str) -> bool:
    if not _short_date(text[4:6] + text[2:4] + text[:2]):
        return False
    return _FINNISH[int(text[:6] + text[7:10]) % 31] == text[10]


def _belgium(text: str) -> bool:
    number = _digits(text)
    base, rest = number[:9], int(number[9:])
    return rest in (97 - int(base) % 97, 97 - int("2" + base) % 97)


def _canada(text: str) -> bool:
    number = _digits(text)
    return number[0] not in "08" and luhn(number)


NATIONAL_IDS: tuple[tuple[str, Check], ...] = (
    (r"[0-9]{3}-[0-9]{2}-[0-9]{4}", _checked(_united_states)),
    (r"[0-9]{3}[ -][0-9]{3}[ -][0-9]{4}", _checked(_britain)),
    (r"[0-9]{3}[ -][0-9]{3}[ -][0-9]{3}", _checked(_canada)),
    (r"(?i)[0-9]{8}-?[A-Z]", _checked(_spain)),
    (r"(?i)[XYZ]-?[0-9]{7}-?[A-Z]", _checked(_spain)),
    (
        r"[12] ?[0-9]{2} ?[0-9]{2} ?(?:[0-9]{2}|2[AB]) ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}",
        _checked(_france),
    ),
    (
        r"(?i)[A-Z]{6}[0-9L-NP-V]{2}[A-EHLMPR-T][0-9L-NP-V]{2}[A-Z][0-9L-NP-V]{3}[A-Z]",
        _checked(_italy),
    ),
    (r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}", _checked(_brazil)),
    (r"[1-9][0-9]{16}[0-9Xx]", _checked(_china)),
    (r"[2-9][0-9]{3} ?[0-9]{4} ?[0-9]{4}", _checked(_india)),
    (r"(?:[0-9]{2})?[0-9]{6}[-+][0-9]{4}", _checked(_sweden)),
    (r"(?i)[0-9]{6}[-+A-FU-Y][0-9]{3}[0-9A-FHJ-NPR-Y]", _checked(_finland)),
    (r"[0-9]{2}\.[0-9]{2}\.[0-9]{2}-[0-9]{3}\.[0-9]{2}", _checked(_belgium)),
    (r"[0-9]{2} ?[0-9]{3} ?[0-9]{3} ?[0-9]{3}", _checked(_germany)),
    (r"[0-9]{11}", _checked(_poland)),
)
"""Forms and checks. One form may be tried after another at the same place."""
