"""The engine benchmark's limits: what cannot be measured in time costs no other figure."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[3] / "bench" / "engine"
OVER = {"over_s": 300.0}


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("watch")
    sys.modules.pop("watch", None)


class Engine:
    """A script's attempts: ``stops`` are the workloads at which one ends, with the reason."""

    def __init__(self, stops: dict[str, dict[str, Any]], starts: int = 99) -> None:
        self.stops, self.starts = stops, starts
        self.asked: list[list[str]] = []

    def __call__(self, workloads: Sequence[str]) -> tuple[dict[str, Any], Any]:
        self.asked.append(list(workloads))
        if len(self.asked) > self.starts:
            return {}, {"error": "exit 1"}
        told: dict[str, Any] = {"load_s": len(self.asked), "peak_rss_gib": len(self.asked)}
        for name in [*workloads, "check"]:
            if name in self.stops:
                return told, self.stops[name]
            told[name] = "measured"
        return told, None


def test_an_engine_without_faults_is_started_once(watch: Any) -> None:
    engine = Engine({})
    line = watch.measure(engine, ["W1", "W2"])
    assert line == {
        "load_s": 1,
        "peak_rss_gib": 1,
        "W1": "measured",
        "W2": "measured",
        "check": "measured",
    }
    assert engine.asked == [["W1", "W2"]]


@pytest.mark.parametrize("reason", [OVER, {"error": "exit -9"}])
def test_a_workload_that_does_not_end_is_marked_and_the_others_measured(
    watch: Any, reason: dict[str, Any]
) -> None:
    engine = Engine({"W2": reason, "W4": reason})
    line = watch.measure(engine, ["W1", "W2", "W3", "W4"])
    assert line["W2"] == line["W4"] == reason
    assert line["W1"] == line["W3"] == line["check"] == "measured"
    assert engine.asked == [["W1", "W2", "W3", "W4"], ["W3", "W4"], []]
    assert line["load_s"] == 1, "the first start counts"
    assert line["peak_rss_gib"] == 3, "the highest peak counts"


def test_what_never_loads_has_failed(watch: Any) -> None:
    line = watch.measure(lambda workloads: ({}, OVER), ["W1", "W2"])
    assert line == {"failed": "over 300 s"}


def test_what_loads_no_second_time_keeps_its_first_figures(watch: Any) -> None:
    line = watch.measure(Engine({"W2": OVER}, starts=1), ["W1", "W2", "W3"])
    assert line["W1"] == "measured" and line["W2"] == OVER and line["W3"] == {"error": "exit 1"}
    assert "failed" not in line


def test_a_script_that_hangs_behind_its_end_has_all_its_figures(watch: Any) -> None:
    line = watch.measure(lambda workloads: ({"W1": 1, "check": 2}, OVER), ["W1"])
    assert line == {"W1": 1, "check": 2}


def test_a_check_that_does_not_end_costs_no_figure(watch: Any) -> None:
    line = watch.measure(Engine({"check": OVER}), ["W1"])
    assert line["W1"] == "measured" and line["check_error"] == "over 300 s"


TELLS = "import json, sys\nprint('no result')\nprint(json.dumps({'load_s': 1}), flush=True)\n"


@pytest.fixture
def run(watch: Any) -> Callable[..., Any]:
    def run(code: str, load_s: float = 600.0, workload_s: float = 600.0) -> Any:
        limits = watch.Limits(load_s, workload_s)
        return watch.run([sys.executable, "-c", code], limits, os.environ)

    return run


def test_the_last_line_of_a_script_is_its_answer(run: Callable[..., Any]) -> None:
    assert run(TELLS + "print(json.dumps({'load_s': 1, 'W1': 2}))") == (
        {"load_s": 1, "W1": 2},
        None,
    )


def test_a_script_that_fails_says_so_and_keeps_what_it_told(run: Callable[..., Any]) -> None:
    assert run(TELLS + "sys.exit(3)") == ({"load_s": 1}, {"error": "exit 3"})


def test_a_script_that_is_killed_says_by_which_signal(run: Callable[..., Any]) -> None:
    code = TELLS + "import os\nos.kill(os.getpid(), 9)"
    assert run(code) == ({"load_s": 1}, {"error": "exit -9"})


def test_a_script_over_its_limit_ends_with_its_children(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """Both hold the write end of a pipe: its end tells that both are gone."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    hold = f"import os, signal\nheld = open({str(pipe)!r}, 'w')\nos.fork()\n"
    told, ended = run(hold + TELLS + "signal.pause()", workload_s=0.01)
    assert (told, ended) == ({"load_s": 1}, {"over_s": 0.01})
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b""
    os.close(reader)
