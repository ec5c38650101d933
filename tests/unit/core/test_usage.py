"""Usage rows: their spans, their exact money, their CSV."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.usage import (
    UsageRow,
    check_groups,
    csv_of,
    day_of,
    merged,
    month_of,
    span_of,
    usage_body,
    usage_from_body,
)

NOW = 1_769_904_000.0  # 2026-02-01, midnight


# What every store can carry: no lone surrogates, no NUL.
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@given(st.integers(0, 2**60), st.integers(0, 2**50), NAMES)
def test_a_row_comes_back_as_it_was(cost: int, tokens: int, name: str):
    row = UsageRow(tenant=name, key="k", cost=cost, prompt_tokens=tokens, requests=1)
    assert usage_from_body(usage_body(row)) == row


def test_spans():
    assert span_of(None, None, NOW) == (NOW - 29 * 86_400, NOW + 86_400)
    assert span_of("2026-01-31", "2026-01-31", NOW) == (NOW - 86_400, NOW)
    assert (month_of(NOW), month_of(NOW - 1)) == (NOW, NOW - 31 * 86_400)
    assert (day_of(NOW), day_of(NOW - 0.001)) == ("2026-02-01", "2026-01-31")


@pytest.mark.parametrize("since", ["yesterday", "2026-02-30", "0001-01-01", "2026-02-02"])
def test_bad_spans(since: str):
    with pytest.raises(InvalidRequest, match="since"):
        span_of(since, "2026-02-01", NOW)


def test_groups():
    assert check_groups(["model", "day", "day"]) == ("day", "model")
    with pytest.raises(InvalidRequest, match="colour"):
        check_groups(["colour"])


def test_merged_and_written_as_csv():
    rows = [UsageRow(model=name, requests=2, cost=10**9 + 1) for name in ("b", "=1+1", "b")]
    found = merged(("model",), rows)
    assert [(row.model, row.requests) for row in found] == [("=1+1", 2), ("b", 4)]
    lines = list(csv.DictReader(io.StringIO(csv_of(("model",), found))))
    assert [line["model"] for line in lines] == ["'=1+1", "b"]  # no formula for a spreadsheet
    assert [line["cost"] for line in lines] == ["1.000000001", "2.000000002"]
    assert "tenant" not in lines[0]
