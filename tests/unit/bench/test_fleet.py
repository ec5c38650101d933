"""The fleet benchmark: cases are alike for all policies, each part writes its own section."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).parents[3] / "bench" / "fleet"
MODULES = ("cases", "routing", "run", "reality", "processes", "closed_loop", "stack", "results")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    monkeypatch.syspath_prepend(str(BENCH))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def results(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n")
    monkeypatch.setattr(bench.results, "RESULTS", path)
    return path


def test_parts_are_recorded_each_in_its_place(
    bench: Any, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Namespace(json=False, record=True)
    said = {name: f"old {name}" for name in bench.run.PARTS}
    simulated = {name: lambda _, name=name: said[name] for name in bench.run.SIMULATED}
    monkeypatch.setattr(bench.run, "SIMULATED", simulated)
    for name, module in bench.run.MEASURED.items():
        monkeypatch.setattr(module, "measure", lambda _, name=name: {"name": name})
        monkeypatch.setattr(module, "text", lambda found: said[found["name"]])
    for name in bench.run.PARTS:
        bench.run.run(name, asked)
    results.write_text(results.read_text() + "\n## More\n")
    said["routing"] = "new"
    bench.run.run("routing", asked)
    said["routing"] = "old routing"
    expected = "".join(
        f"\n<!-- bench-fleet {name}: begin -->\n{'new' if name == 'routing' else said[name]}\n"
        f"<!-- bench-fleet {name}: end -->\n"
        for name in bench.run.PARTS
    )
    assert results.read_text() == f"# Results\n{expected}\n## More\n"


def test_what_is_recorded_has_its_markers(bench: Any) -> None:
    """A part whose markers' names are others would be written a second time, at the end."""
    text = bench.results.RESULTS.read_text("utf-8")
    for name in ("routing", "autoscaling", "spot"):
        assert text.count(f"<!-- bench-fleet {name}: begin -->") == 1


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
