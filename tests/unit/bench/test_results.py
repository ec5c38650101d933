"""RESULTS.md: a benchmark replaces its own part and leaves the rest alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[3] / "bench"
BEGIN, END = "<!-- one: begin -->", "<!-- one: end -->"


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("results")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "RESULTS.md")
    yield module
    sys.modules.pop("results", None)


def test_only_the_part_between_the_markers_is_replaced(results: Any) -> None:
    results.RESULTS.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    results.record("one", "new\n")
    assert results.RESULTS.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"


def test_what_is_new_comes_at_the_end(results: Any) -> None:
    results.RESULTS.write_text("before\n")
    results.record("one", "new")
    assert results.RESULTS.read_text() == f"before\n\n{BEGIN}\nnew\n{END}\n"
    results.record("one", "newer")
    assert results.RESULTS.read_text() == f"before\n\n{BEGIN}\nnewer\n{END}\n"


@pytest.mark.parametrize("left", [BEGIN, END, f"{END}\n{BEGIN}"])
def test_half_a_pair_of_markers_is_a_fault(results: Any, left: str) -> None:
    results.RESULTS.write_text(f"before\n{left}\nafter\n")
    with pytest.raises(SystemExit, match="markers"):
        results.record("one", "new")
    assert results.RESULTS.read_text() == f"before\n{left}\nafter\n"
