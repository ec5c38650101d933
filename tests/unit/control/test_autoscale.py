"""The autoscaler's rules: tolerance, bounds, slow on the way down, nothing without data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.control.autoscale import DOWN_WINDOW_S, ScaleMemory, autoscale
from cloudlm.core.deployment import Demand, DeploymentSpec

SPEC = DeploymentSpec("bank", "models:/bank/1", min_replicas=1, max_replicas=10)


def load(ongoing, queued=0):
    return [Demand("bank", "g1", ongoing, queued, 1.0, 0.0)]


def test_load_over_target_rounded_up():
    assert autoscale(SPEC, load(17), 1, ScaleMemory(), 0.0)[0] == 3


def test_what_queues_in_the_gateway_counts_once():
    assert autoscale(SPEC, load(16, queued=16), 1, ScaleMemory(), 0.0)[0] == 2


def test_all_gateways_count():
    assert autoscale(SPEC, load(8) + load(16), 1, ScaleMemory(), 0.0)[0] == 3


def test_within_a_tenth_of_the_target_nothing_changes():
    assert autoscale(SPEC, load(35), 4, ScaleMemory(), 0.0)[0] == 4  # 4.375 / 4 = 1.09
    assert autoscale(SPEC, load(36), 4, ScaleMemory(), 0.0)[0] == 5


def test_down_only_to_the_highest_of_the_last_five_minutes():
    wanted, memory = autoscale(SPEC, load(40), 1, ScaleMemory(), 0.0)
    assert wanted == 5
    wanted, memory = autoscale(SPEC, load(24), wanted, memory, 100.0)
    assert wanted == 5
    wanted, memory = autoscale(SPEC, load(0), wanted, memory, DOWN_WINDOW_S + 1)
    assert wanted == 3
    wanted, memory = autoscale(SPEC, load(0), wanted, memory, 100 + DOWN_WINDOW_S + 1)
    assert wanted == 1


@pytest.mark.promise(29)
def test_no_data_never_scales_down():
    wanted, memory = autoscale(SPEC, load(40), 1, ScaleMemory(), 0.0)
    for minute in range(60):
        wanted, memory = autoscale(SPEC, [], wanted, memory, 60.0 * minute)
    assert wanted == 5


@pytest.mark.promise(29)
def test_a_restart_without_memory_scales_nothing_down_at_once():
    wanted, memory = autoscale(SPEC, load(0), 6, ScaleMemory(), 1000.0)
    assert wanted == 6
    wanted, _ = autoscale(SPEC, load(0), wanted, memory, 1000.0 + DOWN_WINDOW_S + 1)
    assert wanted == 1


def test_a_new_deployment_begins_with_its_least():
    assert autoscale(SPEC, [], 0, ScaleMemory(), 0.0)[0] == 1


def test_bounds_hold_at_once_and_without_data():
    narrow = DeploymentSpec("bank", "m", min_replicas=2, max_replicas=3)
    assert autoscale(narrow, [], 9, ScaleMemory(), 0.0)[0] == 3
    assert autoscale(narrow, [], 1, ScaleMemory(), 0.0)[0] == 2
    _, memory = autoscale(SPEC, load(80), 1, ScaleMemory(), 0.0)
    assert autoscale(narrow, load(80), 10, memory, 1.0)[0] == 3


@given(
    st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 200)), st.floats(0.1, 120)), max_size=40)
)
def test_always_within_bounds_and_never_below_recent_need(ticks):
    wanted, memory, now = 1, ScaleMemory(), 0.0
    needs = []
    for ongoing, pause_s in ticks:
        now += pause_s
        before = wanted
        demand = [] if ongoing is None else load(ongoing)
        wanted, memory = autoscale(SPEC, demand, wanted, memory, now)
        assert SPEC.min_replicas <= wanted <= SPEC.max_replicas
        if ongoing is None:
            assert wanted >= before
        else:
            needs.append((now, min(10, max(1, -(-ongoing // 8)))))
        recent = [need for at, need in needs if now - at <= DOWN_WINDOW_S]
        # Tolerance may keep one replica less than the ceiling says, never more than 10 %.
        assert wanted * 1.1 + 1e-9 >= max(min(need, 10) - 1 for need in recent or [1])
        assert len(memory.recommendations) <= 11
