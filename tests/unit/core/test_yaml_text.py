"""YAML texts: whatever is wrong with one ends in one error that says where, without its values."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.yaml_text import NotYaml, parse_documents, parse_yaml

_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.dates() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nnote: 2024-02-30", "line 2, column 7: no valid timestamp"),
        ("a: [2024-13-01]", "line 1, column 5: no valid timestamp"),
        ("a: 2024-01-01 10:00:00 +99:00", "no valid timestamp"),
        ("a: !!timestamp soon", "no valid timestamp"),
        ("a: !!int hush", "no valid int"),
        ("a: !!int ''", "no valid int"),
        ("a: !!float hush", "no valid float"),
        ("a: !!bool hush", "no valid bool"),
        ("2024-02-30: a", "no valid timestamp"),
        ("a: " + "9" * 10_000, "no valid int"),
        ("a: [", "line 1"),
        ("a: 1\n---\nb: 2", "several documents"),
        ("[" * 5000, "nested"),
        ("\x01", "not allowed"),
        (b"a: b\xff", "byte 5 is not UTF-8"),
    ],
)
def test_a_fault_has_a_place_and_quotes_no_value(text: str | bytes, says: str) -> None:
    with pytest.raises(NotYaml) as caught:
        parse_yaml(text)
    told = str(caught.value)
    assert says in told
    assert "\n" not in told
    assert "hush" not in told


@given(st.text(alphabet="0123456789-:.+_eExobTZ!tnil \n[]{}#&*'\"", max_size=24))
def test_any_text_is_read_as_ever_or_refused(text: str) -> None:
    """As the parser's own safe loader has it, whatever that raises."""
    try:
        expected = list(yaml.safe_load_all(text))
    except Exception:
        with pytest.raises(NotYaml):
            parse_documents(text)
    else:
        assert repr(parse_documents(text)) == repr(expected)


@given(_PLAIN)
def test_what_is_written_is_read(value: Any) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    assert parse_yaml(text) == parse_yaml(text.encode()) == yaml.safe_load(text)


def test_nothing_is_none() -> None:
    assert parse_yaml("") is None
    assert parse_documents("") == []
