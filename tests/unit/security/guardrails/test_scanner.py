"""Scanning: streams equal whole texts, whatever the expressions, texts and cuts."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.core.errors import BadSetting
from cloudlm.security.guardrails.detectors import ORDER, Kind, rules_of
from cloudlm.security.guardrails.patterns import checked, parse, phrase
from cloudlm.security.guardrails.scanner import Match, Rule, Scanner, Stream, scan

_SOURCES = (
    "foo",
    r"\bbar\b",
    "a+b",
    "(?:ab|abc|b)c?",
    "[a-c]{2,4}?x",
    "ö.ü",
    "(?i)FoO ba",
    r"\d{2,3}-\d",
    "f(o|ö)*x",
)
_TEXTS = st.text(alphabet="abcfoxrö.ü -12\n🙂@", max_size=60)


def _named(match: Match) -> str:
    return f"[{match.rule.name}]"


def _reference(sources: list[str], text: str) -> str:
    """By Python's own engine over the whole text: leftmost, then the first rule."""
    compiled = [re.compile(source, re.ASCII) for source in sources]
    out, at = "", 0
    while True:
        found = [(m.start(), n, m) for n, c in enumerate(compiled) if (m := c.search(text, at))]
        if not found:
            return out + text[at:]
        _, number, match = min(found, key=lambda one: one[:2])
        out += text[at : match.start()] + f"[{number}]"
        at = match.end()


def _cut(text: str, cuts: list[int]) -> list[str]:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(places)]


def _streamed(scanner: Scanner, pieces: list[str], act=_named) -> str:  # type: ignore[no-untyped-def]
    stream = Stream(scanner, act)
    return "".join(stream.feed(piece) for piece in pieces) + stream.finish()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(_SOURCES), min_size=1, max_size=4, unique=True),
    _TEXTS,
    st.lists(st.integers(0, 60), max_size=12),
)
def test_a_stream_is_the_whole_text(sources: list[str], text: str, cuts: list[int]) -> None:
    scanner = Scanner([Rule(str(n), parse(source)) for n, source in enumerate(sources)])
    wanted = _reference(sources, text)
    assert scan(scanner, text, _named) == wanted
    assert _streamed(scanner, _cut(text, cuts)) == wanted
    assert _streamed(scanner, list(text)) == wanted


_PERSONAL = Scanner([rule for kind in ORDER for rule in rules_of(kind)])
_PIECES = st.sampled_from(
    [
        "4111 1111 1111 1111",
        "4111111111111112",
        "12 ",
        "a.b@example.com",
        "@example.com.",
        "DE89 3704 0044 0532 0130 00",
        "DE89370400440532013001",
        "192.168.1.17",
        ".5",
        "2001:db8::ff00:42:8329",
        "+49 151 2345678",
        "123-45-6789",
        "sk-abcdefghijklmnopqrstuvwxyz",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n",
        "-----END RSA PRIVATE KEY-----",
        "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSMeKKF2QT4",
        " ",
        "x",
        "ä",
        "\n",
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_PIECES, max_size=8), st.lists(st.integers(0, 200), max_size=10))
def test_detectors_in_a_stream_are_those_of_the_whole_text(
    parts: list[str], cuts: list[int]
) -> None:
    text = "".join(parts)
    wanted = scan(_PERSONAL, text, _named)
    assert _streamed(_PERSONAL, _cut(text, cuts)) == wanted
    assert _streamed(_PERSONAL, list(text)) == wanted


_SLOWLY = Scanner([replace(rule, stands_apart=False) for rule in _PERSONAL.rules])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(_PIECES, max_size=8).map("".join)
    | st.text(alphabet="0123456789 -+.:_aAXé@", max_size=120)
)
def test_passing_over_a_row_of_letters_and_digits_misses_nothing(text: str) -> None:
    assert scan(_PERSONAL, text, _named) == scan(_SLOWLY, text, _named)


@pytest.mark.parametrize("row", ["1234567890", "a1", "4111111111111111", "DE89370400440532013000"])
def test_a_long_row_of_digits_is_looked_at_once(row: str) -> None:
    checked_at: list[int] = []

    def counted(rule: Rule) -> Rule:
        check = rule.check
        if check is None:
            return rule

        def counting(data: bytes, start: int, end: int) -> int:
            checked_at.append(start)
            return check(data, start, end)

        return replace(rule, check=counting)

    scanner = Scanner([counted(rule) for rule in _PERSONAL.rules])
    scan(scanner, row * 2_000, _named)
    assert len(checked_at) <= 2 * len(scanner.rules)


@settings(max_examples=100, deadline=None)
@given(_TEXTS, st.lists(st.integers(0, 60), max_size=8))
def test_a_stream_stops_where_the_whole_text_does(text: str, cuts: list[int]) -> None:
    scanner = Scanner([Rule("r", parse("ab+|fo+x"))])
    found = re.search("ab+|fo+x", text)
    stream = Stream(scanner, lambda _: None)
    out = "".join(stream.feed(piece) for piece in _cut(text, cuts)) + stream.finish()
    assert out == (text if found is None else text[: found.start()])
    assert stream.stopped == (found is not None)


def test_no_more_is_held_back_than_what_is_undecided() -> None:
    stream = Stream(Scanner([Rule("r", parse("secret plan"))]), _named)
    assert stream.feed("the s") == "the "
    assert stream.feed("ecre") == ""
    assert stream.feed("cy") == "secrecy"
    assert stream.feed(" of a secret plan!") == " of a [r]!"
    assert stream.held_bytes == 0


def test_words_end_where_letters_do() -> None:
    from cloudlm.security.guardrails.policy import _whole_word

    scanner = Scanner(
        [Rule("w", phrase("größe zwei"), _whole_word), Rule("w", phrase("坏"), _whole_word)]
    )
    assert scan(scanner, "Größe  ZWEI, größe zweit, 很坏的", _named) == "[w], größe zweit, 很[w]的"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("a*", "empty text"),
        ("(a", "missing"),
        ("a)", "closes nothing"),
        ("[a", "missing"),
        ("^a", "searched everywhere"),
        ("(?=a)b", "only (…)"),
        (r"(a)\1", "not known here"),
        ("(?:a+ )+", "characters"),
        ("a{3,2}", "no count"),
        ("*a", "repeats nothing"),
        ("a**", "repeated"),
        (r"\b*a", "no length"),
        ("[z-a]", "RE2"),
        ("(" * 30 + "a" + ")" * 30, "deeper"),
    ],
)
def test_what_cannot_be_an_expression(source: str, why: str) -> None:
    with pytest.raises(BadSetting, match=re.escape(why)):
        checked(source)


def test_no_text_takes_long() -> None:
    """What makes a backtracking engine take for ever is linear: a megabyte in well under a second
    on any machine."""
    import time

    scanner = Scanner([Rule("r", checked("(?:a|a){1,60}(?:a|aa){0,60}c"))])
    started = time.perf_counter()
    scan(scanner, "a" * 1_000_000, _named)
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Kind.EMAIL, ["a@b.co", "é x.y+z@sub.example.org."], ["a@b", "@b.co", "a@.co", "a@b.c1"]),
        (
            Kind.CREDIT_CARD,
            ["4111111111111111", "3782 822463 10005", "5500-0000-0000-0004", "6011111111111117"],
            ["4111111111111112", "1234567812345678", "0000000000000000", "x4111111111111111"],
        ),
        (
            Kind.IBAN,
            [
                "DE89370400440532013000",
                "GB82 WEST 1234 5698 7654 32",
                "fr1420041010050500013m02606",
            ],
            ["DE88370400440532013000", "XX89370400440532013000", "DE8937040044053201300"],
        ),
        (
            Kind.IP_ADDRESS,
            ["10.1.2.3", "2001:db8::1", "fe80::1"],
            ["256.1.1.1", "1.2.3.4.5", "a::b", "12:30:45", "127.0.0.1"],
        ),
        (
            Kind.PHONE,
            ["+49 151 23456789", "(415) 555-2671", "030/1234567", "0044 20 7946 0958"],
            ["12345", "2024-01-15", "+1", "1,234,567"],
        ),
        (
            Kind.API_KEY,
            [
                "clm_live_" + "a" * 12 + "_" + "b" * 32 + "_01234567",
                "sk-" + "aB3" * 16,
                "AKIAIOSFODNN7EXAMPLE",
                "ghp_" + "a1" * 18,
                "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3.SflKxwRJSMeKKF2QT4fw",
            ],
            ["sk-short", "eyJhbGciOiJIUzI1NiJ9 alone", "task-abcdefghijklmnopqrstuvwxyz", "AKIA1"],
        ),
        (
            Kind.PRIVATE_KEY,
            [
                "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----",
                "-----BEGIN EC PRIVATE KEY-----\nAA",
            ],
            ["-----BEGIN PUBLIC KEY-----"],
        ),
        (
            Kind.NATIONAL_ID,
            [
                "123-45-6789",
                "943 476 5919",
                "130 692 544",
                "12345678Z",
                "X1234567L",
                "1 84 12 76 451 089 46",
                "RSSMRA85T10A562S",
                "111.444.777-35",
                "11010519491231002X",
                "2341 2341 2346",
                "811218-9876",
                "131052-308T",
                "85.07.30-033.28",
                "86095742719",
                "44051401359",
            ],
            [
                "000-45-6789",
                "943 476 5918",
                "130 692 545",
                "12345678A",
                "X1234567M",
                "1 84 12 76 451 089 47",
                "RSSMRA85T10A562T",
                "111.444.777-36",
                "110105194912310021",
                "2341 2341 2347",
                "811218-9875",
                "131052-308U",
                "85.07.30-033.29",
                "86095742718",
                "44051401358",
            ],
        ),
    ],
)
def test_what_is_found_and_what_is_not(kind: Kind, good: list[str], bad: list[str]) -> None:
    scanner = Scanner(rules_of(kind))
    for text in good:
        assert f"[{kind}]" in str(scan(scanner, f"so: {text} and", _named)), text
    for text in bad:
        assert scan(scanner, f"so: {text} and", _named) == f"so: {text} and", text
