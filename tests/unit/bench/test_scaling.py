"""The scaling benchmark's simulation: places, lines and paid hours as one reckons them by hand."""

from __future__ import annotations

import importlib
import itertools
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cloudlm.control.autoscale import ScaleMemory
from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.scaling import Algorithm, Scaling

BENCH = Path(__file__).parents[3] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("scaling")


def fixed(replicas: int) -> DeploymentSpec:
    return DeploymentSpec("b", "models:/b/1", min_replicas=replicas, max_replicas=replicas)


def test_one_place_serves_one_after_the_other(bench: Any) -> None:
    trace = [bench.Request(0.0, 0, 500), bench.Request(0.5, 0, 500), bench.Request(40.0, 0, 500)]
    hours, late = bench.Simulation(fixed(1), trace, places=1).run()
    assert late == pytest.approx(100.0 / 3.0)  # the second waits 13.5 s
    assert hours == pytest.approx(40.0 / 3600.0, rel=0.01)


def test_paid_are_all_replicas_and_nobody_waits_where_there_is_place(bench: Any) -> None:
    trace = bench.drawn(lambda _: 2.0, 300.0, seed=1)
    hours, late = bench.Simulation(fixed(20), trace).run()
    assert late == 0.0
    assert hours == pytest.approx(20 * 300.0 / 3600.0, rel=0.15)


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_changes_are_few_under_steady_traffic(bench: Any, algorithm: Algorithm) -> None:
    """Promise 29: chance alone, of which there is much in traffic, makes nothing flap."""
    trace = bench.drawn(lambda _: 5.4, 900.0, seed=5)
    spec = DeploymentSpec("b", "models:/b/1", max_replicas=50, scaling=Scaling(algorithm))
    wanted: list[int] = []

    class Noted(bench.Simulation):  # type: ignore[misc, name-defined]
        def _look(self, memory: ScaleMemory) -> ScaleMemory:
            memory = super()._look(memory)
            wanted.append(len(self.ready) + len(self.starting))
            return memory

    Noted(spec, trace).run()
    settled = wanted[300:900]
    turns = sum(one != other for one, other in pairwise(settled))
    assert turns <= (12 if algorithm is Algorithm.KPA else 4)  # of 600 looks
    assert max(settled) - min(settled) <= 4


def test_tokens_pays_less_than_the_others_for_no_more_late_requests(bench: Any) -> None:
    trace = bench.drawn(lambda at: 5.4 * (1 + 0.5 * math.sin(at / 200)), 1500.0, seed=11)

    def run(scaling: Scaling) -> tuple[float, float]:
        spec = DeploymentSpec("b", "models:/b/1", max_replicas=50, scaling=scaling)
        hours, late = bench.Simulation(spec, trace).run()
        return float(hours), float(late)

    hours, late = run(Scaling())
    assert late <= 1.0
    for other in (Scaling(Algorithm.HPA, utilization=0.8), Scaling(Algorithm.KPA)):
        paid, waited = run(other)
        assert hours < paid or late < waited


def test_traces_keep_their_rate_and_their_spread(bench: Any) -> None:
    calm = bench.drawn(lambda _: 5.0, 2000.0, seed=1)
    wild = bench.drawn(lambda _: 5.0, 2000.0, seed=1, spread=4.0)
    for trace in (calm, wild):
        assert len(trace) == pytest.approx(10_000, rel=0.25)
        assert all(one.at <= other.at for one, other in itertools.pairwise(trace))

    def largest(trace: list[Any]) -> int:
        counts = [0] * 201
        for one in trace:
            counts[int(one.at // 10)] += 1
        return max(counts)

    assert largest(wild) > 1.5 * largest(calm)
