"""The fleet benchmark's parts on autoscaling and spot: traces, policies, markets and verdicts."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from cloudlm.control.spot import SpotTarget
from cloudlm.core.scaling import Algorithm
from cloudlm.sim.simulation import World

BENCH = Path(__file__).parents[3] / "bench" / "fleet"
MODULES = ("scaling_cases", "autoscaling", "spot")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name, None)


def test_traces_keep_their_rate_and_their_spread(bench: Any) -> None:
    calm = list(bench.scaling_cases.drawn(lambda _: 5.0, 2000.0, seed=1)())
    wild = list(bench.scaling_cases.drawn(lambda _: 5.0, 2000.0, seed=1, spread=4.0)())
    for trace in (calm, wild):
        assert len(trace) == pytest.approx(10_000, rel=0.25)
        assert all(one.at <= other.at for one, other in itertools.pairwise(trace))

    def largest(trace: list[Any]) -> int:
        counts = [0] * 201
        for one in trace:
            counts[int(one.at // 10)] += 1
        return max(counts)

    assert largest(wild) > 1.5 * largest(calm)


def test_a_part_of_the_recorded_trace_begins_at_nothing(bench: Any) -> None:
    part = list(bench.scaling_cases.azure(BENCH / "traces", begin_s=600.0, end_s=660.0)())
    assert part
    assert all(0.0 <= one.at < 60.0 for one in part)


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_changes_are_few_under_steady_traffic(bench: Any, algorithm: Algorithm) -> None:
    """Promise 29: chance alone, of which there is much in traffic, makes nothing flap."""
    cases = bench.scaling_cases
    trace = cases.drawn(lambda _: 5.4, 900.0, seed=5)
    usual = {"tokens": "tokens", "hpa": "hpa 80 %", "kpa": "kpa 70 %"}[algorithm.value]
    policy = next(one for one in cases.policies() if one.name == usual)
    world = World(policy, cases.setting_of(trace))
    world.warm_up()
    world.begin(trace(), 10.0)
    wanted = []
    for second in range(300, 900):
        world.timeline.run(float(second))
        wanted.append(world.control.wanted)
    turns = sum(one != other for one, other in pairwise(wanted))
    # Of 600 looks. Knative has no tolerance and no delay: it follows the mean of a minute.
    assert turns <= (30 if algorithm is Algorithm.KPA else 4)
    assert max(wanted) - min(wanted) <= 4


def test_hours_are_compared_at_equal_lateness(bench: Any) -> None:
    kind, hours_at = bench.autoscaling.Outcome, bench.autoscaling.hours_at
    points = [kind(8.0, 0.002), kind(7.0, 0.006), kind(6.0, 0.026), kind(9.0, 0.3)]
    assert hours_at(points, 0.006) == pytest.approx(7.0, abs=0.05)
    assert hours_at(points, 0.016) == pytest.approx(6.5, abs=0.05)
    assert hours_at(points, 0.5) == 6.0  # none is late so often
    assert hours_at(points, 0.001) is None
    assert hours_at(points[::-1], 0.016) == hours_at(points, 0.016)
    # What cannot be told from 1 % of so many requests counts as 1 %.
    assert hours_at([kind(7.6, 0.0101), kind(7.0, 0.02)], 0.01) == pytest.approx(7.58, abs=0.01)


def test_verdicts_are_of_each_family_at_its_best(bench: Any) -> None:
    kind = bench.autoscaling.Outcome
    line = bench.autoscaling.Line(
        "t",
        {
            "tokens": kind(5.0, 0.005),
            "tokens 35 %": kind(4.0, 0.015),
            "hpa 80 %": kind(6.0, 0.009),
            "kpa 70 %": kind(4.0, 0.2),
        },
    )
    assert line.best() == ("hpa", 6.0)
    text = "\n".join(bench.autoscaling._verdict([line], {"t"}))
    assert "| t, held out | 1.00 % | 4.45 h | 6.00 h | never | 0.74 | met |" in text
    late = bench.autoscaling.Line(
        "u", {"tokens": kind(5.9, 0.02), "hpa 80 %": kind(6.0, 0.02), "kpa 70 %": kind(7.0, 0.0)}
    )
    assert "| u | 2.00 % | 5.90 h | 6.00 h | 7.00 h | 0.98 | not met |" in "\n".join(
        bench.autoscaling._verdict([late], set())
    )


# Spot ---------------------------------------------------------------------------------------------


def test_what_is_always_on_demand_costs_as_much(bench: Any) -> None:
    account = bench.spot.run(lambda facts, now: SpotTarget({}, facts.needed), 1, steps=2000)
    assert account.cost == pytest.approx(1.0)
    assert account.whole == pytest.approx(1.0 - bench.spot.START_STEPS / 2000)


def test_a_zone_that_is_full_loses_all_and_refuses(bench: Any) -> None:
    zone = bench.spot.Zone("z", 1.0, ready=3)
    chance = Random(1)
    now = 0.0
    while zone.room:
        now += 60.0
        zone.step(3, now, chance)
    assert (zone.ready, zone.losses, zone.refusals) == (0, [now], [now])
    while not zone.room:
        now += 60.0
        zone.step(3, now, chance)
    assert len(zone.starting) == 3
    for _ in range(bench.spot.START_STEPS):
        zone.step(2, now, chance)
    assert zone.ready == 2


def test_the_market_is_the_same_for_every_rule(bench: Any) -> None:
    one, other = (bench.spot.run(bench.spot.ours(2), 3, steps=500) for _ in range(2))
    assert one == other
    spread = bench.spot.run(
        lambda facts, now: bench.spot.plain_spread(facts, 2, backed=True), 3, steps=500
    )
    assert spread.cost > one.cost
