"""The HPA's rule, with worked examples after Kubernetes' replica_calculator and its behaviours."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.control.autoscale import Fleet, ScaleMemory, autoscale
from cloudlm.control.autoscale.hpa import replicas
from cloudlm.core.deployment import Demand, DeploymentSpec
from cloudlm.core.scaling import Algorithm, Scaling

pytestmark = pytest.mark.promise(29)

SPEC = DeploymentSpec("bank", "models:/bank/1", max_replicas=100, scaling=Scaling(Algorithm.HPA))


def load(ongoing, **more):
    return [Demand("bank", "g1", ongoing, 0, 1.0, 0.0, **more)]


def test_load_over_target_rounded_up():
    assert autoscale(SPEC, load(17), 1, ScaleMemory(), 0.0)[0] == 3


def test_what_queues_in_the_gateway_counts_once():
    assert autoscale(SPEC, [Demand("bank", "g1", 16, 16, 1.0, 0.0)], 1, ScaleMemory(), 0.0)[0] == 2


@pytest.mark.promise(29)
def test_within_a_tenth_of_the_target_nothing_changes():
    assert autoscale(SPEC, load(35), 4, ScaleMemory(), 0.0)[0] == 4  # 4.375 / 4 = 1.09
    assert autoscale(SPEC, load(36), 4, ScaleMemory(), 0.0)[0] == 5


@pytest.mark.parametrize(
    ("load_", "current", "fleet", "expected"),
    [
        (16, 0, Fleet(0), 2),  # from nothing: the ratio rounded up
        (48, 3, Fleet(3), 6),
        (48, 3, Fleet(2, starting_s=(1.0,)), 6),  # unready ones count nothing
        (20, 3, Fleet(2, starting_s=(1.0,)), 3),  # 1.25 turns into 0.83: do nothing
        (26, 3, Fleet(2, starting_s=(1.0,)), 3),  # 1.08 is within tolerance
        (8, 4, Fleet(4, missing=1), 2),  # down: the missing one counts as at its target
        (40, 4, Fleet(4, missing=2), 5),  # up: missing ones count nothing
        (18, 3, Fleet(3, missing=1), 3),  # 1.125 turns into 0.75: do nothing
        (16, 4, Fleet(4, missing=2), 4),  # known ones are at target
        (4, 2, Fleet(2, missing=1), 2),  # 0.5 of one, the other at its target: 0.75 of two
    ],
)
def test_worked_examples(load_, current, fleet, expected):
    assert replicas(load_, 8.0, current, fleet) == expected


def test_at_most_four_more_or_twice_as_many_in_fifteen_seconds():
    wanted, memory = autoscale(SPEC, load(800), 1, ScaleMemory(), 0.0)
    assert wanted == 5
    wanted, memory = autoscale(SPEC, load(800), wanted, memory, 10.0)
    assert wanted == 5
    wanted, memory = autoscale(SPEC, load(800), wanted, memory, 15.0)
    assert wanted == 10
    wanted, memory = autoscale(SPEC, load(800), wanted, memory, 30.0)
    assert wanted == 20


def test_from_nothing_there_is_no_limit():
    spec = replace(SPEC, min_replicas=0)
    assert autoscale(spec, load(800), 0, ScaleMemory(), 0.0)[0] == 100


def test_it_looks_every_fifteen_seconds_at_the_mean_since():
    wanted, memory = autoscale(SPEC, load(8), 1, ScaleMemory(), 0.0)
    for second in range(1, 15):
        wanted, memory = autoscale(SPEC, load(80), wanted, memory, float(second))
        assert wanted == 1
    wanted, memory = autoscale(SPEC, load(80), wanted, memory, 15.0)
    assert wanted == 5


@pytest.mark.promise(29)
def test_down_only_to_the_highest_of_the_last_five_minutes():
    wanted, memory = autoscale(SPEC, load(40), 1, ScaleMemory(), 0.0)
    assert wanted == 5
    wanted, memory = autoscale(SPEC, load(24), wanted, memory, 100.0)
    assert wanted == 5
    wanted, memory = autoscale(SPEC, load(0), wanted, memory, 301.0)
    assert wanted == 3
    wanted, memory = autoscale(SPEC, load(0), wanted, memory, 401.0)
    assert wanted == 1


def test_of_several_metrics_the_highest_answer_holds():
    slow = replace(SPEC, scaling=Scaling(Algorithm.HPA, target_ttft_ms=500.0, target_tpot_ms=50.0))
    measured = {"finished_per_s": 1.0, "output_tokens_per_s": 100.0}
    asked = load(16, ttft_s=1.5, tpot_s=0.05, **measured)
    assert autoscale(slow, asked, 2, ScaleMemory(), 0.0)[0] == 6
    asked = load(16, ttft_s=0.1, tpot_s=0.05, **measured)
    assert autoscale(slow, asked, 2, ScaleMemory(), 0.0)[0] == 2


@pytest.mark.promise(29)
@given(st.integers(0, 500), st.integers(1, 20), st.integers(0, 5), st.integers(0, 5))
def test_unready_and_missing_ones_only_dampen(ongoing, ready, unready, missing):
    missing, current = min(missing, ready - 1), ready + unready
    damped = replicas(ongoing, 8.0, current, Fleet(ready, (0.0,) * unready, missing))
    known = ready - missing
    ratio = ongoing / known / 8.0
    if ratio > 1.0:
        assert damped >= min(current, ready)
    if missing and ratio < 1.0:
        assert damped >= replicas(ongoing, 8.0, ready, Fleet(ready))
