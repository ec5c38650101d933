"""Kinds of personal and secret data that are found without a model: by their form and, where there
is one, their checksum.

What has no fixed form (names, addresses of houses) is not found here; see ``presidio``. Sources:
ISO/IEC 7812 (Luhn), ISO 13616 (IBAN, modulo 97), E.164 (phone numbers), RFC 5952 and 791
(addresses); ``national_ids`` names its own.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from enum import StrEnum

from cloudlm.security.guardrails.national_ids import NATIONAL_IDS
from cloudlm.security.guardrails.patterns import parse
from cloudlm.security.guardrails.places import after, apart, before, digits_of, luhn_sums
from cloudlm.security.guardrails.scanner import NO_MATCH, Check, Rule, Tail

_KEY_BYTES = 16_384
_IBAN_LENGTHS = {
    country: int(length)
    for length, countries in {
        "15": "NO",
        "16": "BE",
        "18": "DK FI FO GL NL",
        "19": "MK SI",
        "20": "AT BA EE KZ LT LU XK",
        "21": "CH HR LI LV",
        "22": "BG BH CR DE GB GE IE ME RS VA",
        "23": "AE GI IL IQ TL",
        "24": "AD CZ ES MD PK RO SA SE SK TN VG",
        "25": "LY PT ST",
        "26": "IS TR",
        "27": "FR GR IT MC SM",
        "28": "AL AZ BY CY DO GT HU LB PL SV",
        "29": "BR EG PS QA UA",
        "30": "JO KW MU",
        "31": "MT SC",
        "32": "LC",
    }.items()
    for country in countries.split()
}


class Kind(StrEnum):
    """What can be found; the value is its name in settings."""

    EMAIL = "email"
    PHONE = "phone"
    CREDIT_CARD = "credit_card"
    IBAN = "iban"
    IP_ADDRESS = "ip_address"
    NATIONAL_ID = "national_id"
    API_KEY = "api_key"
    PRIVATE_KEY = "private_key"


def _email(data: bytes, start: int, end: int) -> int:
    """Without the dots and hyphens that belong to the sentence."""
    whole = data[start:end].rstrip(b".-")
    domain = whole.rpartition(b"@")[2]
    labels = domain.split(b".")
    good = len(labels) > 1 and all(label and label[0] != 0x2D for label in labels)
    good = good and len(labels[-1]) > 1 and labels[-1].isalpha()
    return start + len(whole) if good and apart(before(data, start)) else NO_MATCH


def _card(data: bytes, start: int, end: int) -> int:
    """The longest number from here that is one of a known scheme and has its check digit."""
    if not apart(before(data, start)):
        return NO_MATCH
    places = [at for at in range(start, end) if 0x30 <= data[at] <= 0x39]
    number = data[start:end].translate(None, b" -").decode()
    sums = luhn_sums(number)
    for size in range(len(number), 12, -1):
        end = places[size - 1] + 1
        if sums[size] % 10 == 0 and _is_card(number[:size]) and apart(after(data, end)):
            return end
    return NO_MATCH


def _is_card(number: str) -> bool:
    if len(set(number)) == 1:
        return False
    size, six = len(number), int(number[:6])
    four, two = six // 100, six // 10_000
    if number[0] == "4":
        return size in (13, 16, 19)
    if two in (34, 37):
        return size == 15
    if 51 <= two <= 55 or 2221 <= four <= 2720:
        return size == 16
    if two in (36, 38, 39) or 300 <= six // 1000 <= 305:
        return 14 <= size <= 19
    schemes = four == 6011 or two in (62, 64, 65) or 3528 <= four <= 3589
    return schemes and 16 <= size <= 19


def _iban(data: bytes, start: int, end: int) -> int:
    if not apart(before(data, start)):
        return NO_MATCH
    length = _IBAN_LENGTHS.get(data[start : start + 2].decode().upper())
    if length is None:
        return NO_MATCH
    characters = bytearray()
    at = start
    while at < end and len(characters) < length:
        if data[at] != 0x20:
            characters.append(data[at])
        at += 1
    if len(characters) < length or not apart(after(data, at)):
        return NO_MATCH
    text = characters.decode().upper()
    turned = text[4:] + text[:4]
    number = "".join(str(int(character, 36)) for character in turned)
    return at if int(number) % 97 == 1 else NO_MATCH


def _phone(low: int, high: int) -> Check:
    def check(data: bytes, start: int, end: int) -> int:
        left = before(data, start)
        if not apart(left) or left in ("+", ".", "-", "/") or not apart(after(data, end)):
            return NO_MATCH
        number = digits_of(data, start, end).removeprefix("00")
        return end if low <= len(number) <= high and len(set(number)) > 2 else NO_MATCH

    return check


def _ip(data: bytes, start: int, end: int) -> int:
    left = before(data, start)
    if not apart(left) or left in (".", ":") or not apart(after(data, end)):
        return NO_MATCH
    text = data[start:end].decode()
    if ":" in text and not (any(c.isdigit() for c in text) and len(text.replace(":", "")) >= 4):
        return NO_MATCH  # a::b is more often a name in a program
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return NO_MATCH
    return NO_MATCH if address.is_loopback or address.is_unspecified else end


def _secret(data: bytes, start: int, end: int) -> int:
    free = apart(before(data, start)) and before(data, start) != "_"
    return end if free and apart(after(data, end)) else NO_MATCH


def _web_token(data: bytes, start: int, end: int) -> int:
    """A signed JSON Web Token (RFC 7519): two objects and a signature."""
    whole = data[start:end].rstrip(b".-")
    parts = whole.split(b".")
    good = len(parts) == 3 and parts[1].startswith(b"eyJ") and len(parts[2]) >= 16
    return start + len(whole) if good and apart(before(data, start)) else NO_MATCH


def _secret_rule(source: str, more: str) -> Rule:
    tail = Tail(more, _LONGEST_TOKEN) if more else None
    return Rule(Kind.API_KEY, parse(source), _secret, tail, stands_apart=True)


_PHONES = (
    (r"(?:\+|00)[1-9](?:[ ./-]?\(?[0-9]\)?){6,14}", _phone(8, 15)),
    (r"\(?[2-9][0-9]{2}\)?[-. ] ?[2-9][0-9]{2}[-. ][0-9]{4}", _phone(10, 10)),
    (r"\(?0[1-9][0-9]{1,4}\)?[ /-][0-9](?:[ -]?[0-9]){4,9}", _phone(9, 12)),
)
_GOES_ON = r"[A-Za-z0-9_-]*"
_SECRETS = (
    (r"clm_[a-z]{2,8}_[0-9a-z]{12}_[0-9a-z]{32}_[0-9a-f]{8}", ""),
    (r"sk-[A-Za-z0-9_-]{20}", _GOES_ON),
    (r"[rs]k_(?:live|test)_[A-Za-z0-9]{16}", _GOES_ON),
    (r"gh[pousr]_[A-Za-z0-9]{36}", _GOES_ON),
    (r"github_pat_[A-Za-z0-9_]{22}", _GOES_ON),
    (r"glpat-[A-Za-z0-9_-]{20}", _GOES_ON),
    (r"A[KS]IA[0-9A-Z]{16}", ""),
    (r"AIza[0-9A-Za-z_-]{35}", ""),
    (r"xox[abeoprs]-[A-Za-z0-9-]{10}", _GOES_ON),
    (r"hf_[A-Za-z0-9]{30}", _GOES_ON),
    (r"npm_[A-Za-z0-9]{36}", ""),
    (r"pypi-[A-Za-z0-9_-]{50}", _GOES_ON),
)
"""The beginnings of keys as their makers write them, and what goes on."""
_SIGNED = r"eyJ[A-Za-z0-9_-]{8}"
_LONGEST_TOKEN = 2048
_EMAIL = r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9.-]{3,190}"
_PRIVATE_KEY = r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
_KEY_TAIL = Tail(
    r"[A-Za-z0-9+/=\s]*", _KEY_BYTES, r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
)


def _apart(kind: Kind, forms: Iterable[tuple[str, Check]]) -> tuple[Rule, ...]:
    """Rules whose checks all refuse what has a letter or digit to its left."""
    return tuple(Rule(kind, parse(source), check, stands_apart=True) for source, check in forms)


def rules_of(kind: Kind) -> tuple[Rule, ...]:
    """What finds a kind."""
    if kind is Kind.EMAIL:
        return _apart(kind, [(_EMAIL, _email)])
    if kind is Kind.PHONE:
        return _apart(kind, _PHONES)
    if kind is Kind.CREDIT_CARD:
        return _apart(kind, [(r"\b[2-6](?:[ -]?[0-9]){12,18}", _card)])
    if kind is Kind.IBAN:
        return _apart(kind, [(r"[A-Za-z]{2}[0-9]{2}(?: ?[A-Za-z0-9]){11,28}", _iban)])
    if kind is Kind.IP_ADDRESS:
        four = r"[0-9]{1,3}(?:\.[0-9]{1,3}){3,8}"
        six = r"[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,8}"
        return _apart(kind, [(four, _ip), (six, _ip)])
    if kind is Kind.NATIONAL_ID:
        return _apart(kind, NATIONAL_IDS)
    if kind is Kind.API_KEY:
        tail = Tail(r"[A-Za-z0-9_.-]*", 2 * _LONGEST_TOKEN)
        token = Rule(kind, parse(_SIGNED), _web_token, tail, stands_apart=True)
        return (*(_secret_rule(source, more) for source, more in _SECRETS), token)
    return (Rule(kind, parse(_PRIVATE_KEY), tail=_KEY_TAIL),)


ORDER = (
    Kind.PRIVATE_KEY,
    Kind.API_KEY,
    Kind.EMAIL,
    Kind.IBAN,
    Kind.CREDIT_CARD,
    Kind.NATIONAL_ID,
    Kind.PHONE,
    Kind.IP_ADDRESS,
)
"""Where two kinds begin at the same place, the first of these is meant."""
