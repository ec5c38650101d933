"""The simulator against reality: what it predicts for two real workers, and what they then did.

Part of ``make bench-fleet``, with real processes: an installation with its gateway and control, the
small model, one CPU thread in each worker. In this order:

1. One worker, alone, answers so many equal requests at once, of several sizes and several times;
   ``sim.fit`` makes a replica's figures of the medians.
2. Two workers answer drawn traffic through the gateway, at several loads.
3. The simulator is given the figures of 1 and the arrivals of 2, and nothing else that was
   measured.

A load is the share of time for which both workers would compute if no two requests ever shared a
step: what is drawn of 0.6 leaves the gateway, control and this client some of two CPUs.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from asking import Answer, ask_all
from small_model import save_small_model
from stack import Stack, running, until

from cloudlm.core.deployment import DeploymentSpec
from cloudlm.sim.figures import Figures, fitted
from cloudlm.sim.fit import Measurement, predicted_s, worst_error
from cloudlm.sim.measure import Spread, spread_of
from cloudlm.sim.simulation import Policy, Result, Setting, simulate
from cloudlm.sim.traffic import Arrival, Lengths, drawn, poisson

MODEL = "small"
GOAL = 0.15
WORKERS = 2
RUNS = (
    (1, 16, 1), (1, 256, 1), (1, 1000, 1), (4, 300, 1),
    (1, 16, 64), (1, 600, 48), (2, 200, 48), (4, 100, 48), (8, 200, 32),
)  # fmt: skip
"""Requests at once, tokens of each prompt and of each answer."""
ROUNDS, SHORT_ROUNDS = 5, 2
LOADS = (0.3, 0.6)
DURATION_S, SHORT_DURATION_S = 150.0, 20.0
"""Long enough that more than a handful are beyond the 90th percentile of the lowest load."""
PROMPT, OUTPUT = Lengths(200.0, 0.7), Lengths(48.0, 0.5)
LONGEST_PROMPT, LONGEST_OUTPUT = 1500, 300
CROWD = 48
"""Requests at one moment in the last case: as much as two workers can do."""
CACHE_TOKENS = 65_536
"""What 512 MiB hold of a model of 8 layers with 4 heads for keys and values of 64 each."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity as predicted and as measured."""

    name: str
    unit: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative to what was measured; above 0 the simulator said more."""
        return self.predicted / self.measured - 1.0


@dataclass(frozen=True, slots=True)
class Case:
    """One load: how many requests, its figures, how busy the simulated workers were, how late this
    client was at worst, and how many CPUs others used meanwhile."""

    name: str
    requests: int
    figures: tuple[Figure, ...]
    late_s: float
    others_cpus: float

    @property
    def worst(self) -> float:
        """The largest error of what the goal is about."""
        return max(abs(one.error) for one in self.figures if not one.name.startswith("TPOT"))


# One worker alone --------------------------------------------------------------------------------


def calibrate(stack: Stack, rounds: int) -> Figures:
    """Figures of one worker, measured as any of its users could."""
    chance = Random(11)
    took: dict[tuple[int, int, int], list[float]] = {run: [] for run in RUNS}
    for number in range(rounds + 1):
        for run in RUNS:
            requests, prompt, output = run
            at_once = [Arrival(0.0, prompt, output)] * requests
            answers = asyncio.run(ask_all(stack, MODEL, at_once, chance))
            if number:  # the first round warms up
                took[run].append(max(one.ended_s for one in answers))
    rows = tuple(Measurement(n, p, 0, o, statistics.median(took[n, p, o])) for n, p, o in RUNS)
    today = time.strftime("%Y-%m-%d")
    return fitted(MODEL, rows, measured=today, source="reality.py", cache_tokens=CACHE_TOKENS)


# Two workers, and what was predicted for them ----------------------------------------------------


def traffic(figures: Figures, load: float, duration_s: float, seed: int) -> list[Arrival]:
    """Requests that would keep both workers computing for this share of the time, one by one."""
    alone = Measurement(1, round(PROMPT.mean), 0, round(OUTPUT.mean), 1.0)
    rate = load * WORKERS / predicted_s(figures.step, alone, figures.batch_tokens)
    moments = poisson(Random(f"{seed} moments"), rate, duration_s)
    return [
        Arrival(
            one.at, min(one.prompt_tokens, LONGEST_PROMPT), min(one.output_tokens, LONGEST_OUTPUT)
        )
        for one in drawn(moments, Random(f"{seed} sizes"), PROMPT, OUTPUT)
    ]


def predict(figures: Figures, arrivals: Sequence[Arrival]) -> Result:
    """What the simulator says of two such replicas under these arrivals."""
    spec = DeploymentSpec(MODEL, f"models:/{MODEL}/1", min_replicas=WORKERS, max_replicas=WORKERS)
    setting = Setting(figures, keep_rows=True)
    return simulate(Policy("two workers", spec, "fixed"), setting, arrivals)


def compared(result: Result, answers: Sequence[Answer]) -> tuple[Figure, ...]:
    """The figures that the goal is about, and the time per token."""
    first = spread_of([one.first_s for one in answers])
    each = spread_of([one.token_s for one in answers if one.tokens > 1])
    tokens = sum(one.tokens for one in answers)
    began = min(one.began_s for one in answers)
    wall_s = max(one.ended_s for one in answers) - began
    starts = [row.started_at for row in result.rows]
    ends = [row.started_at + row.duration_s for row in result.rows]
    return (
        *_spreads("TTFT", result.ttft, first),
        Figure("throughput", "tokens/s", tokens / (max(ends) - min(starts)), tokens / wall_s),
        *_spreads("TPOT", result.tpot, each),
    )


def _spreads(name: str, said: Spread, was: Spread) -> Iterator[Figure]:
    yield Figure(f"{name} mean", "ms", 1000 * said.mean, 1000 * was.mean)
    for percent in (50, 90):
        yield Figure(f"{name} p{percent}", "ms", 1000 * said[percent], 1000 * was[percent])


def run_case(name: str, stack: Stack, figures: Figures, arrivals: Sequence[Arrival]) -> Case:
    """One load on both workers, and its prediction."""
    with stack.others() as others:
        answers = asyncio.run(ask_all(stack, MODEL, arrivals, Random(name)))
    late_s = max(one.late_s for one in answers)
    result = predict(figures, arrivals)
    case = Case(name, len(arrivals), compared(result, answers), late_s, others())
    print(f"reality, {name}: worst error {100 * case.worst:.0f} %", file=sys.stderr, flush=True)
    return case


# All of it ---------------------------------------------------------------------------------------


def measure(asked: Namespace) -> dict[str, Any]:
    """Calibrate, run and compare; plain data."""
    rounds, duration_s = ROUNDS, DURATION_S
    if asked.short:
        rounds, duration_s = SHORT_ROUNDS, SHORT_DURATION_S
    with (
        tempfile.TemporaryDirectory(prefix="cloudlm-model-") as folder,
        running("--no-starter") as stack,
    ):
        save_small_model(Path(folder) / MODEL)
        stack.cli("models", "import", f"{folder}/{MODEL}", "--name", MODEL)
        spec = {"name": MODEL, "model": f"models:/{MODEL}/1", "min_replicas": 1, "max_replicas": 1}
        stack.deploy(spec)
        with stack.others() as others:
            figures = calibrate(stack, rounds)
        calm = others()
        stack.deploy({**spec, "min_replicas": WORKERS, "max_replicas": WORKERS})
        until("both workers", lambda: all_ready(stack))
        asyncio.run(ask_all(stack, MODEL, [Arrival(0.0, 64, 8)] * 8, Random(3)))  # warms both
        cases = [
            run_case(f"load {load:g}", stack, figures, traffic(figures, load, duration_s, seed))
            for seed, load in enumerate(LOADS)
        ]
        cases.append(run_case(f"{CROWD} at once", stack, figures, crowd()))
    return {
        "step": figures.step._asdict(),
        "worst_fit": worst_error(figures.step, figures.rows, figures.batch_tokens),
        "rows": [list(row) for row in figures.rows],
        "others_cpus": calm,
        "cases": [
            {
                **asdict(case),
                "worst": case.worst,
                "figures": [{**asdict(one), "error": one.error} for one in case.figures],
            }
            for case in cases
        ],
    }


def all_ready(stack: Stack) -> bool:
    states = [one["state"] for one in stack.replicas(MODEL)]
    return states == ["ready"] * WORKERS


def crowd() -> list[Arrival]:
    """Everybody at one moment."""
    sizes = Random("crowd")
    moments = iter([0.0] * CROWD)
    return list(drawn(moments, sizes, Lengths(PROMPT.mean, 0.3), Lengths(OUTPUT.mean, 0.3)))


def text(found: dict[str, Any]) -> str:
    """What was measured, as a section of RESULTS.md."""
    step = found["step"]
    names = [f"{one['name']} {one['unit']}" for one in found["cases"][0]["figures"]]
    worst = max(case["worst"] for case in found["cases"])
    met = "met" if worst <= GOAL else "not met"
    return "\n".join(
        [
            "## Simulator against reality: `make bench-fleet` (real processes)\n",
            f"{WORKERS} real workers (a random model of 27 million weights in 16 bits, one thread "
            "each) behind the real gateway; control and the client on the same CPUs. The replica's "
            "figures were fitted to runs of one worker alone (worst run "
            f"{100 * found['worst_fit']:.0f} % off): {1000 * step['base_s']:.2f} ms a step, "
            f"{1000 * step['prefill_token_s']:.3f} ms a prompt token, "
            f"{1000 * step['sequence_s']:.3f} ms a decoding sequence, "
            f"{1e6 * step['context_token_s']:.3f} µs a token of context, and "
            f"{1000 * step['request_s']:.1f} ms for a request outside of steps. Then both answered "
            f"drawn traffic (Poisson; prompts of {PROMPT.mean:g} and answers of {OUTPUT.mean:g} "
            "tokens in the mean), and the simulator, given these figures and the moments and sizes "
            "of the requests alone, said beforehand what is in front of each slash. *Load* is the "
            "share of time both would compute if no two requests shared a step. CPUs of others: "
            "what else used this machine meanwhile (calibration: "
            f"{found['others_cpus']:.2f}).\n",
            f"| case | requests | {' | '.join(names)} | CPUs of others |",
            f"|---|--:|{'--:|' * len(names)}--:|",
            *(_row(case) for case in found["cases"]),
            f"\nPredicted / measured (error). Worst of TTFT and throughput: {100 * worst:.0f} % "
            f"(goal: at most {100 * GOAL:.0f} %): {met}.",
        ]
    )


def _row(case: dict[str, Any]) -> str:
    cells = " | ".join(
        f"{one['predicted']:.1f} / {one['measured']:.1f} ({100 * one['error']:+.0f} %)"
        for one in case["figures"]
    )
    return f"| {case['name']} | {case['requests']} | {cells} | {case['others_cpus']:.2f} |"
