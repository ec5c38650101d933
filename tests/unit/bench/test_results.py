"""Each benchmark writes its own part of RESULTS.md and leaves the rest alone."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[3] / "bench"


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    results = importlib.import_module("results")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "RESULTS.md")
    yield results
    sys.modules.pop("results", None)


def test_only_the_part_between_the_markers_is_replaced(results: Any) -> None:
    begin, end = "<!-- bench-it: begin -->", "<!-- bench-it: end -->"
    results.RESULTS.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    results.record("bench-it", "new\n")
    assert results.RESULTS.read_text() == f"before\n{begin}\nnew\n{end}\nafter\n"
