"""The fleet benchmark: cases are alike for all policies, only a part's own section is replaced."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).parents[3] / "bench" / "fleet"
MODULES = ("cases", "routing", "run")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name, None)


def test_only_a_parts_own_section_is_replaced(bench: Any) -> None:
    first = bench.run.recorded("# Results\n", "routing", "old")
    second = bench.run.recorded(first + "\n## Other\n", "spot", "more")
    third = bench.run.recorded(second, "routing", "new")
    assert "old" not in third
    assert third.index("new") < third.index("## Other") < third.index("more")
    assert third.startswith("# Results\n")


def test_the_patterns_are_the_same_for_every_policy(bench: Any) -> None:
    for drawing in bench.cases.patterns(5).values():
        assert list(drawing(3)()) == list(drawing(3)())
        assert list(drawing(3)()) != list(drawing(4)())


@pytest.mark.parametrize("name", ["hot 32k", "conversations", "nothing in common"])
def test_least_cost_is_never_worse_than_the_better_of_the_others(bench: Any, name: str) -> None:
    drawing = bench.cases.patterns(250)[name]
    case = bench.cases.Case(name, drawing(0), 0.8, slots=8, useful=True)
    assert bench.routing.measure(case).against_better <= 1.02


def test_the_recorded_conversations_are_there_whole(bench: Any) -> None:
    arrivals = list(bench.cases.mooncake(BENCH / "traces")())
    assert len(arrivals) == 12_031
    assert arrivals[0].blocks[0] == arrivals[1].blocks[0]
