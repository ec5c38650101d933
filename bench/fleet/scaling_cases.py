"""The traffic and the policies that the autoscaling benchmark compares.

Nothing was set by looking at the traces of ``held_out``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from random import Random

from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.scaling import Algorithm, Scaling
from cloudlm.core.settings import GatewaySettings
from cloudlm.sim.figures import Figures
from cloudlm.sim.fit import StepTime
from cloudlm.sim.simulation import Policy, Setting
from cloudlm.sim.traces import READERS
from cloudlm.sim.traffic import Arrival

SLOTS = 8
START_S = 30.0
FIGURES = Figures(
    "8 slots",
    StepTime(0.028, 0.000125, 0.0, 0.0),
    slots=SLOTS,
    batch_tokens=2048,
    start_s=START_S,
    prefix_cache=False,
)
"""28 ms for each further token and 8,000 tokens of prompts a second: assumed, not measured."""
SPEC = DeploymentSpec("bench", "models:/bench/1", max_replicas=200, target_ongoing_requests=SLOTS)
PROMPT, ANSWER, LONGEST_ANSWER = (6.6, 0.9), (5.1, 0.75), 1000
"""Of the logarithms of tokens: mean and deviation."""
FULL_AT_FIRST = 0.55

Trace = Callable[[], Iterator[Arrival]]


def azure(folder: Path, *, begin_s: float = 0.0, end_s: float = math.inf) -> Trace:
    """The recorded conversations, or a part of them."""

    def arrivals() -> Iterator[Arrival]:
        found = READERS["azure"](folder / "AzureLLMInferenceTrace_conv.csv.gz")
        for one in takewhile(lambda one: one.at < end_s, found):
            if one.at >= begin_s:
                yield replace(one, at=one.at - begin_s)

    return arrivals


def mooncake(folder: Path) -> Trace:
    """The recorded conversations with prompts of 12,000 tokens in the mean; no cache helps."""
    return lambda: iter(READERS["mooncake"](folder / "mooncake_conversation_trace.jsonl.gz"))


def drawn(rate: Callable[[float], float], length_s: float, seed: int, spread: float = 1.0) -> Trace:
    """Requests at ``rate`` a second, with gamma-distributed gaps of that coefficient of variation
    (1: Poisson), and log-normal prompts and answers."""

    def arrivals() -> Iterator[Arrival]:
        draw = Random(seed)
        shape = 1.0 / spread**2
        step_s, now, passed = 0.25, 0.0, 0.0
        due = draw.gammavariate(shape, 1.0 / shape)
        while now < length_s:
            passed += rate(now) * step_s
            moments = []
            while due <= passed:
                moments.append(now + draw.random() * step_s)
                due += draw.gammavariate(shape, 1.0 / shape)
            for at in sorted(moments):
                prompt = max(1, int(draw.lognormvariate(*PROMPT)))
                answer = max(1, min(LONGEST_ANSWER, int(draw.lognormvariate(*ANSWER))))
                yield Arrival(at, prompt, answer)
            now += step_s

    return arrivals


def wave(mean: float, swing: float, period_s: float) -> Callable[[float], float]:
    """A rate that swings by a share about its mean."""
    return lambda at: mean * (1 + swing * math.sin(at * math.tau / period_s))


def known(folder: Path) -> Mapping[str, Trace]:
    """Traces that were at hand while the algorithms were written."""
    return {
        "Azure conversation": azure(folder),
        "Poisson": drawn(lambda _: 5.4, 3600.0, 1),
        "bursts (cv 4)": drawn(lambda _: 5.4, 3600.0, 2, spread=4.0),
        "waves (± 80 % an hour)": drawn(wave(5.4, 0.8, 3600.0), 7200.0, 3),
        "ramp (13-fold in 10 min)": drawn(_ramp, 3600.0, 4, spread=1.5),
        "steps (3-fold every 10 min)": drawn(_steps(3.0, 9.0, 600.0), 3600.0, 5),
        "quiet (0.6 a second)": drawn(lambda _: 0.6, 3600.0, 6),
    }


def held_out(folder: Path) -> Mapping[str, Trace]:
    """Traces that nothing was set by."""
    return {
        "Mooncake conversation": mooncake(folder),
        "slow wave, cv 2": drawn(wave(7.0, 0.6, 5400.0), 5400.0, 101, spread=2.0),
        "fast waves (10 min)": drawn(wave(5.0, 0.5, 600.0), 3600.0, 102),
        "bursts (cv 2.5)": drawn(lambda _: 8.0, 3600.0, 103, spread=2.5),
        "a spike of 5 min": drawn(_spike, 3600.0, 104),
    }


def _ramp(at: float) -> float:
    up = min(max((at - 900.0) / 600.0, 0.0), 1.0)
    down = min(max((at - 2400.0) / 300.0, 0.0), 1.0)
    return 1.0 + 12.0 * up - 10.0 * down


def _steps(low: float, high: float, each_s: float) -> Callable[[float], float]:
    return lambda at: low if at // each_s % 2 == 0 else high


def _spike(at: float) -> float:
    return 12.0 if 1500.0 <= at < 1800.0 else 4.0


def policies() -> tuple[Policy, ...]:
    """Each family at several targets, their usual ones among them; ``tokens`` is ours as it is."""
    found = [Policy("tokens", SPEC, "tokens")]
    for share in (0.04, 0.12, 0.4):
        spec = replace(SPEC, scaling=Scaling(late_share=share))
        found.append(Policy(f"tokens {100 * share:g} %", spec, "tokens"))
    for algorithm, shares in (
        (Algorithm.HPA, (0.6, 0.7, 0.8, 0.9, 1.0)),
        (Algorithm.KPA, (0.5, 0.6, 0.7, 0.8)),
    ):
        for share in shares:
            spec = replace(SPEC, scaling=Scaling(algorithm, utilization=share))
            found.append(Policy(f"{algorithm.value} {100 * share:.0f} %", spec, algorithm.value))
    return tuple(found)


def setting_of(trace: Trace) -> Setting:
    """The fleet of a trace: it begins with what its first minute asks for."""
    step = FIGURES.step
    first = takewhile(lambda one: one.at < 60.0, trace())
    work_s = sum(
        one.prompt_tokens * step.prefill_token_s + one.output_tokens * step.base_s for one in first
    )
    return Setting(
        FIGURES,
        gateway=GatewaySettings(
            replica_capacity=SLOTS,
            max_queued_requests=100_000,
            max_ongoing_requests=100_000,
            queue_timeout_s=600.0,
        ),
        begin_with=max(1, math.ceil(work_s / 60.0 / SLOTS / FULL_AT_FIRST)),
        seed=1,
    )
