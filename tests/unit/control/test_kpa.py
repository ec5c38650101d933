"""Knative's rule: stable and panic windows, with worked examples after its autoscaler.go."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from cloudlm.control.autoscale import Fleet, ScaleMemory, autoscale
from cloudlm.core.deployment import Demand, DeploymentSpec
from cloudlm.core.scaling import Algorithm, Scaling

pytestmark = pytest.mark.promise(29)

SPEC = DeploymentSpec(
    "bank",
    "models:/bank/1",
    max_replicas=100,
    target_ongoing_requests=10.0,
    scaling=Scaling(Algorithm.KPA),
)


def follow(ongoings, current=1, memory=None, start=0, spec=SPEC, ready=None):
    memory, found = memory or ScaleMemory(), []
    for second, ongoing in enumerate(ongoings, start):
        demand = [Demand("bank", "g1", ongoing, 0, 1.0, float(second))]
        fleet = Fleet(ready)
        current, memory = autoscale(spec, demand, current, memory, float(second), fleet)
        found.append(current)
    return found, memory


def test_seven_tenths_of_the_target_are_aimed_at():
    wanted, _ = follow([14] * 120)
    assert wanted[-1] == 2
    wanted, _ = follow([15] * 120)
    assert wanted[-1] == 3


def test_twice_the_replicas_wanted_by_six_seconds_is_a_panic():
    calm, memory = follow([7] * 120)
    assert calm[-1] == 1 and memory.panic_at is None
    wanted, memory = follow([70] * 7, 1, memory, 120, ready=1)
    assert memory.panic_at is not None
    assert wanted[-1] == 10  # by the panic window; the stable one says 2
    assert "panics" in memory.why


@pytest.mark.promise(29)
def test_in_panic_it_never_goes_down_and_it_ends_a_stable_window_after_the_last_cause():
    _, memory = follow([7] * 120)
    up, memory = follow([70] * 10, 1, memory, 120)
    down, memory = follow([7] * 50, up[-1], memory, 130)
    assert set(down) == {up[-1]}
    later, memory = follow([7] * 120, up[-1], memory, 180)
    assert memory.panic_at is None
    assert later[-1] == 1


@pytest.mark.promise(29)
def test_a_restart_with_several_replicas_begins_in_panic():
    wanted, memory = follow([0] * 50, 6)
    assert set(wanted) == {6}
    assert memory.panic_at == 0.0
    wanted, _ = follow([0] * 120, 6, memory, 50)
    assert wanted[-1] == 1


def test_one_decision_halves_at_most():
    wanted, memory = follow([56] * 200, 8)
    assert wanted[-1] == 8
    wanted, _ = follow([0] * 120, 8, memory, 200)
    steps = [one for one, next_ in itertools.pairwise(wanted) if one != next_]
    assert all(after >= before // 2 for before, after in itertools.pairwise(wanted))
    assert steps


def test_the_windows_and_the_share_can_be_set():
    spec = replace(SPEC, scaling=Scaling(Algorithm.KPA, utilization=1.0, stable_window_s=20.0))
    wanted, _ = follow([30] * 60, spec=spec)
    assert wanted[-1] == 3
    wanted, _ = follow([30] * 60 + [10] * 60, spec=spec)
    assert wanted[-1] == 1
