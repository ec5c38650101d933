"""Redaction: what is taken out comes back, and nothing else does."""

from __future__ import annotations

import copy
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.security.guardrails.detectors import ORDER, rules_of
from cloudlm.security.guardrails.redaction import PLACEHOLDERS, Mapping
from cloudlm.security.guardrails.scanner import Scanner, Stream, scan

_PERSONAL = Scanner([rule for kind in ORDER for rule in rules_of(kind)])
_PARTS = st.sampled_from(
    [
        "a@b.de",
        "c.d@e.org",
        "4111111111111111",
        "<EMAIL_1>",
        "<EMAIL_",
        "<EMAIL_2",
        ">",
        "1>",
        "<",
        " ",
        "x",
        "+4915123456789",
        "ß",
    ]
) | st.text(max_size=5)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(_PARTS, max_size=8).map("".join), max_size=3), st.data())
def test_restoring_undoes_redaction(texts: list[str], data: st.DataObject) -> None:
    mapping = Mapping(texts)
    hidden = [scan(_PERSONAL, text, mapping.hide) or "" for text in texts]
    for text, sent in zip(texts, hidden, strict=True):
        cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=6)))
        places = [0, *cuts, len(sent)]
        stream = Stream(PLACEHOLDERS, mapping.restore)
        out = "".join(stream.feed(sent[a:b]) for a, b in itertools.pairwise(places))
        assert out + stream.finish() == text


def test_the_same_value_has_the_same_placeholder() -> None:
    mapping = Mapping(["a@b.de c@d.de a@b.de <EMAIL_2>"])
    hidden = scan(_PERSONAL, "a@b.de c@d.de a@b.de <EMAIL_2>", mapping.hide)
    assert hidden == "<EMAIL_1> <EMAIL_3> <EMAIL_1> <EMAIL_2>"
    assert mapping.original("<EMAIL_2>") == "<EMAIL_2>"


def test_a_mapping_says_nothing_and_goes_nowhere() -> None:
    mapping = Mapping([])
    mapping.placeholder("email", "a@b.de")
    assert "a@b.de" not in f"{mapping!r} {mapping}"
    for move in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            move(mapping)
