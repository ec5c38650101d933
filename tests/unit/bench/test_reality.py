"""The fleet benchmark's parts with real processes: what is compared, and what the texts say."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from cloudlm.sim.figures import Figures
from cloudlm.sim.fit import StepTime
from cloudlm.sim.traffic import Arrival

BENCH = Path(__file__).parents[3] / "bench" / "fleet"
MODULES = ("small_model", "stack", "asking", "reality", "processes", "closed_loop")
FIGURES = Figures("t", StepTime(0.005, 0.0002, 0.001, 0.0, 0.003))
STEP = FIGURES.step._asdict()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    monkeypatch.syspath_prepend(str(BENCH))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name, None)


def answers_of(bench: Any, result: Any, arrivals: list[Arrival], slower: float) -> list[Any]:
    """What clients would see of exactly this simulation, everything taking ``slower`` times."""
    rows = {int(row.request_id): row for row in result.rows}
    origin = min(row.started_at for row in result.rows)
    return [
        bench.asking.Answer(
            (rows[number].started_at - origin) * slower,
            first_s=rows[number].first_token_s * slower,
            whole_s=rows[number].duration_s * slower,
            tokens=arrival.output_tokens,
        )
        for number, arrival in enumerate(arrivals)
    ]


@pytest.mark.parametrize("slower", [1.0, 1.25])
def test_errors_are_those_of_the_prediction(bench: Any, slower: float) -> None:
    reality = bench.reality
    arrivals = reality.traffic(FIGURES, 0.5, 30.0, seed=1)
    result = reality.predict(FIGURES, arrivals)
    assert result.open == 0
    found = reality.compared(result, answers_of(bench, result, arrivals, slower))
    names = {one.name: one for one in found}
    assert {"TTFT mean", "TTFT p50", "TTFT p90", "throughput"} <= set(names)
    for one in found:
        expected = slower if one.unit == "tokens/s" else 1 / slower
        assert one.error == pytest.approx(expected - 1.0, abs=1e-6)


def test_a_load_is_a_share_of_the_time_of_both_workers(bench: Any) -> None:
    reality = bench.reality
    for load in reality.LOADS:
        arrivals = reality.traffic(FIGURES, load, 600.0, seed=2)
        step = FIGURES.step
        alone_s = sum(
            step.request_s
            + step.prefill_token_s * one.prompt_tokens
            + (step.base_s + step.sequence_s) * one.output_tokens
            for one in arrivals
        )
        assert alone_s / 600.0 / reality.WORKERS == pytest.approx(load, rel=0.15)
        assert max(one.prompt_tokens + one.output_tokens for one in arrivals) <= 2048


@pytest.mark.parametrize(("predicted", "verdict"), [(110.0, "): met."), (120.0, "): not met.")])
def test_the_text_says_whether_the_goal_is_met(bench: Any, predicted: float, verdict: str) -> None:
    reality = bench.reality
    figures = (
        reality.Figure("TTFT mean", "ms", predicted, 100.0),
        reality.Figure("TPOT mean", "ms", 500.0, 100.0),  # shown, and no part of the goal
    )
    case = reality.Case("load 0.3", 77, figures, 0.001, 0.25)
    body = {**asdict(case), "worst": case.worst}
    body["figures"] = [{**asdict(one), "error": one.error} for one in figures]
    found = {"step": STEP, "worst_fit": 0.04, "rows": [], "others_cpus": 0.1, "cases": [body]}
    text = reality.text(found)
    assert text.rstrip().endswith(verdict)
    assert f"{predicted:.1f} / 100.0 ({predicted - 100:+.0f} %)" in text
    assert "| 77 |" in text and "| 0.25 |" in text


@pytest.mark.parametrize(
    ("tail", "fault"),
    [
        (b'data: {"usage":{"completion_tokens":5,"prompt_tokens":3}}\n\ndata: [DONE]\n\n', ""),
        (b'data: {"usage":{"completion_tokens":5,"prompt_tokens":3}}\n\n', "without [DONE]"),
        (b'data: {"error":{"message":"lost"}}\n\ndata: [DONE]\n\n', "lost"),
        (b"", "without [DONE]"),
    ],
)
def test_an_answer_that_is_not_whole_is_a_fault(bench: Any, tail: bytes, fault: str) -> None:
    answer = bench.asking.Answer(0.0)
    bench.asking._account(tail, answer)
    assert fault in answer.fault and bool(fault) == bool(answer.fault)
    assert answer.tokens == (0 if fault else 5)


def test_prompts_have_the_length_that_was_asked_for(bench: Any) -> None:
    text = bench.small_model.words(Random(1), 50)
    assert len(text.split()) == 50
    assert set(map(len, text.split())) == {3}
    assert bench.small_model.words(Random(2), 50) != text


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("sleep 600 & echo '{'; wait", "said nothing whole within 0.5 s"),
        ("sleep 600 & echo 'oh:'; echo '}'; wait", "oh:"),
        ("sleep 600 & echo '{'; echo '}'; wait", "admin_key"),
        ("sleep 600 >&- & echo 'no room' >&2; exit 3", "ended with 3: no room"),
    ],
)
def test_what_does_not_come_up_is_told_and_leaves_nothing_behind(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: str
) -> None:
    up = tmp_path / "up"
    up.write_text(f"#!/bin/sh\n{script}\n")
    up.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(up))
    home = tmp_path / "home"
    limit_s = 0.5 if "within" in told else 600.0
    with pytest.raises(bench.stack.BenchFailed, match=re.escape(told)):
        bench.stack.begin(home, (), {**os.environ}, within_s=limit_s)
    bench.stack.until("the end", lambda: not bench.stack.processes_of(home))


def test_what_our_children_took_that_have_ended_is_ours(bench: Any, tmp_path: Path) -> None:
    """A worker that was stopped between two looks is none of the others."""
    stack = bench.stack.Stack(tmp_path, None, {}, {})
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    _, before_s, _ = stack._cpu_s()
    subprocess.run([sys.executable, "-c", busy], check=True)
    _, after_s, _ = stack._cpu_s()
    assert after_s - before_s > 0.45


def test_what_a_wake_takes_beyond_the_start(bench: Any) -> None:
    processes = bench.processes
    wake = processes.Wake(3.4, until_begun=0.2, start=3.0, after_ready=0.2, warm=0.05)
    assert wake.beyond == pytest.approx(0.35)
    crowd = processes.Herd(10, {"200": 9, "502": 1}, 4.0)
    changed = processes.Changes(10, 10, 500, 1, 3, 200.0, ["bank-helper-r1-0: 502 gone"])
    found = {
        "changes": asdict(changed),
        "wakes": [{**asdict(wake), "beyond": wake.beyond}],
        "others_cpus": 0.0,
        "herd": asdict(crowd),
    }
    text = processes.text(found)
    assert "| 500 | **1** | 3 |" in text
    assert "Dropped: bank-helper-r1-0: 502 gone" in text
    assert "350 ms in the median: not met" in text
    assert "not answered: 1" in text
