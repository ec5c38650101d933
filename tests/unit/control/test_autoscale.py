"""What holds for every rule: bounds, nothing down without data, the last replica, no flapping."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.control.autoscale import Fleet, ScaleMemory, autoscale
from cloudlm.core.deployment import Demand, DeploymentSpec
from cloudlm.core.pace import Pace
from cloudlm.core.scaling import Algorithm, Scaling
from cloudlm.core.schedule import Schedule

pytestmark = pytest.mark.promise(29)

SPEC = DeploymentSpec("bank", "models:/bank/1", min_replicas=1, max_replicas=10)
EVERY = pytest.mark.parametrize("algorithm", list(Algorithm))
FAR_S = 1000.0


def by(algorithm, spec=SPEC, **changes):
    return replace(spec, scaling=Scaling(algorithm, **changes))


def load(ongoing, queued=0, gateway="g1", at=0.0, rate=1.0):
    return [Demand("bank", gateway, ongoing, queued, rate if ongoing else 0.0, at)]


def follow(spec, ongoings, current=1, memory=None, start=0.0, step_s=1.0):
    """The numbers wanted, one for each demand; None is no data."""
    memory, found = memory or ScaleMemory(), []
    for number, ongoing in enumerate(ongoings):
        now = start + number * step_s
        demand = [] if ongoing is None else load(ongoing, at=now)
        current, memory = autoscale(spec, demand, current, memory, now)
        found.append(current)
    return found, memory


@pytest.mark.promise(29)
@EVERY
def test_no_data_never_scales_down(algorithm):
    ups, memory = follow(by(algorithm), [40] * 60)
    silent, _ = follow(by(algorithm), [None] * 60, ups[-1], memory, 60.0, 60.0)
    assert ups[-1] >= 5
    assert set(silent) == {ups[-1]}


@pytest.mark.promise(29)
@EVERY
def test_a_restart_without_memory_scales_nothing_down_at_once(algorithm):
    wanted, _ = autoscale(by(algorithm), load(0), 6, ScaleMemory(), FAR_S)
    assert wanted == 6
    wanted, _ = follow(by(algorithm), [0] * 400, 6, start=FAR_S)
    assert wanted[30] == 6
    assert wanted[-1] == 1


@pytest.mark.promise(29)
@EVERY
def test_a_silent_gateway_is_not_an_idle_one(algorithm):
    spec, memory, current = by(algorithm, down_window_s=0.0), ScaleMemory(), 4
    both = [*load(16, gateway="g1"), *load(16, gateway="g2")]
    for second in range(120):
        current, memory = autoscale(spec, both, current, memory, float(second))
    before = current
    for second in range(120, 150):
        current, memory = autoscale(spec, load(1, gateway="g1"), current, memory, float(second))
        assert current == before
    assert "silent" in memory.why
    for second in range(150, 400):  # it is gone for good
        current, memory = autoscale(spec, load(1, gateway="g1"), current, memory, float(second))
    assert current < before


@pytest.mark.promise(29)
@pytest.mark.parametrize("silent_s", [25, 45])
def test_a_gateway_that_speaks_again_cost_no_replica(silent_s):
    """What it went on serving unseen is no fall of the load, so it is not remembered as one."""
    spec = by(Algorithm.TOKENS)
    both = [*load(30, gateway="g1"), *load(30, gateway="g2")]
    memory, current, now = ScaleMemory(pace=Pace(start_s=20.0)), 1, 0
    for now in range(600):
        current, memory = autoscale(spec, both, current, memory, float(now))
    before, first = current, now + 1
    for now in range(first, first + silent_s):
        current, memory = autoscale(spec, load(30, gateway="g1"), current, memory, float(now))
        assert current == before
    first = now + 1
    for now in range(first, first + 30):
        current, memory = autoscale(spec, both, current, memory, float(now))
        assert current >= before


@EVERY
def test_all_gateways_count(algorithm):
    both = [*load(24, gateway="g1"), *load(24, gateway="g2")]
    assert autoscale(by(algorithm), both, 1, ScaleMemory(), 0.0)[0] >= 5


@EVERY
def test_a_new_deployment_begins_with_its_least(algorithm):
    assert autoscale(by(algorithm), [], 0, ScaleMemory(), 0.0)[0] == 1


@EVERY
def test_bounds_hold_at_once_and_without_data(algorithm):
    narrow = by(algorithm, replace(SPEC, min_replicas=2, max_replicas=3))
    assert autoscale(narrow, [], 9, ScaleMemory(), 0.0)[0] == 3
    assert autoscale(narrow, [], 1, ScaleMemory(), 0.0)[0] == 2
    _, memory = follow(by(algorithm), [80] * 30)
    assert autoscale(narrow, load(80), 10, memory, 31.0)[0] == 3


@EVERY
def test_it_says_why(algorithm):
    _, memory = autoscale(by(algorithm), load(40), 1, ScaleMemory(), 0.0)
    assert algorithm.value in memory.why
    _, memory = autoscale(by(algorithm), [], 1, memory, 1.0)
    assert "no gateway reports" in memory.why


@EVERY
@pytest.mark.parametrize("ongoing", [None, 0, 4])
@pytest.mark.parametrize(("current", "low", "high"), [(1, 3, 3), (1, 3, 9), (6, 1, 2), (6, 0, 2)])
def test_it_says_who_moved_the_number_where_the_load_did_not(
    algorithm, ongoing, current, low, high
):
    spec = by(algorithm, replace(SPEC, min_replicas=low, max_replicas=high), down_window_s=0.0)
    demand = [] if ongoing is None else load(ongoing)
    wanted, memory = autoscale(spec, demand, current, ScaleMemory(), 0.0)
    bound = low if current < low else high
    by_bounds = wanted == bound
    assert by_bounds or wanted < bound  # of too many the load may leave fewer
    assert (memory.why == f"a person set the bounds to {low}:{high}") == by_bounds
    _, memory = autoscale(spec, demand, wanted, memory, 100.0)
    assert "a person" not in memory.why


@EVERY
def test_what_more_than_the_least_is_wanted_for_is_the_load(algorithm):
    spec = by(algorithm, replace(SPEC, min_replicas=2))
    wanted, memory = autoscale(spec, load(200), 1, ScaleMemory(), 0.0)
    assert wanted > 2
    assert algorithm.value in memory.why


def test_it_says_that_a_schedule_moved_the_number():
    spec = by(Algorithm.TOKENS, schedules=(OFFICE,))
    wanted, memory = autoscale(spec, [], 1, ScaleMemory(), 0.0, Fleet(wall_s=NOON))
    assert (wanted, memory.why) == (3, "a schedule sets the bounds to 3:20")
    narrow = by(Algorithm.TOKENS, replace(SPEC, max_replicas=2), schedules=(OFFICE,))
    night = Fleet(wall_s=NOON + 9 * 3600.0)
    wanted, memory = autoscale(narrow, [], 3, memory, 1.0, night)
    assert (wanted, memory.why) == (2, "the bounds are 1:2")


# Zero ---------------------------------------------------------------------------------------------

ZERO = replace(SPEC, min_replicas=0)


@EVERY
def test_the_last_replica_goes_after_a_whole_idle_time_and_a_request_brings_it_back(algorithm):
    spec = by(algorithm, ZERO, idle_s=60.0, down_window_s=0.0)
    wanted, memory = follow(spec, [4] * 200, 1)
    assert wanted[-1] == 1
    wanted, memory = follow(spec, [0] * 120, 1, memory, 200.0)
    assert wanted[59] == 1 and wanted[60] == 0 and wanted[-1] == 0
    wanted, _ = follow(spec, [1], 0, memory, 400.0)
    assert wanted == [1]


@EVERY
def test_one_request_begins_the_idle_time_anew(algorithm):
    spec = by(algorithm, ZERO, idle_s=60.0)
    wanted, _ = follow(spec, [0] * 59 + [1] + [0] * 59, 1)
    assert set(wanted) == {1}


@EVERY
def test_a_restart_waits_a_whole_idle_time(algorithm):
    spec = by(algorithm, ZERO, idle_s=60.0)
    wanted, _ = follow(spec, [0] * 60, 1, ScaleMemory(), FAR_S)
    assert set(wanted) == {1}


@EVERY
def test_at_zero_it_stays_there_without_data_and_without_requests(algorithm):
    spec = by(algorithm, ZERO)
    assert autoscale(spec, [], 0, ScaleMemory(), 0.0)[0] == 0
    wanted, memory = autoscale(spec, load(0), 0, ScaleMemory(), 0.0)
    assert wanted == 0
    assert "starts a replica" in memory.why


@EVERY
def test_a_request_that_was_refused_counts_too(algorithm):
    asked = [Demand("bank", "g1", 0, 0, 1.0, 0.0)]
    assert autoscale(by(algorithm, ZERO), asked, 0, ScaleMemory(), 0.0)[0] == 1


# Schedules ----------------------------------------------------------------------------------------

NOON = 1_700_049_600.0  # 2023-11-15, 12:00 UTC, a Wednesday
OFFICE = Schedule("0 8 * * mon-fri", 10 * 3600.0, min_replicas=3, max_replicas=20)


@EVERY
def test_a_schedule_sets_the_bounds_while_it_holds(algorithm):
    spec = by(algorithm, schedules=(OFFICE,), down_window_s=0.0)
    assert autoscale(spec, [], 1, ScaleMemory(), 0.0, Fleet(wall_s=NOON))[0] == 3
    night = Fleet(wall_s=NOON + 9 * 3600.0)
    assert autoscale(spec, [], 1, ScaleMemory(), 0.0, night)[0] == 1
    many, memory, now = 3, ScaleMemory(), 0.0
    for now in range(120):
        many, memory = autoscale(spec, load(150), many, memory, now, Fleet(many, wall_s=NOON))
    assert many > 10


def test_a_schedule_begins_one_start_early():
    spec = by(Algorithm.TOKENS, schedules=(OFFICE,))
    memory = ScaleMemory(pace=Pace(start_s=120.0))
    eight = NOON - 4 * 3600.0
    assert autoscale(spec, [], 1, memory, 0.0, Fleet(wall_s=eight - 121.0))[0] == 1
    assert autoscale(spec, [], 1, memory, 0.0, Fleet(wall_s=eight - 119.0))[0] == 3


# Properties ---------------------------------------------------------------------------------------

traffic = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(0, 200)), st.floats(0.1, 120)), max_size=40
)
algorithms = st.sampled_from(Algorithm)


@pytest.mark.promise(29)
@given(algorithms, traffic, st.integers(0, 3), st.integers(1, 12))
def test_always_within_bounds_and_never_down_without_data(algorithm, ticks, low, high):
    spec = by(algorithm, replace(SPEC, min_replicas=min(low, high), max_replicas=high))
    wanted, memory, now = spec.min_replicas, ScaleMemory(), 0.0
    for ongoing, pause_s in ticks:
        now += pause_s
        before = wanted
        demand = [] if ongoing is None else load(ongoing, at=now)
        wanted, memory = autoscale(spec, demand, wanted, memory, now)
        assert spec.min_replicas <= wanted <= spec.max_replicas
        if ongoing is None:
            assert wanted >= before
        elif ongoing:
            assert wanted >= 1


@pytest.mark.promise(29)
@given(algorithms, st.integers(0, 70))
def test_constant_load_settles_and_stays(algorithm, ongoing):
    wanted, _ = follow(by(algorithm), [ongoing] * 500)
    assert len(set(wanted[-100:])) == 1


@given(algorithms, st.integers(0, 70), st.integers(0, 70))
def test_more_load_never_means_fewer_replicas(algorithm, one, other):
    low, high = sorted((one, other))
    fewer, _ = follow(by(algorithm), [low] * 60)
    more, _ = follow(by(algorithm), [high] * 60)
    assert more[-1] >= fewer[-1]


@pytest.mark.promise(29)
@given(algorithms, st.integers(2, 10), st.lists(st.integers(0, 100), min_size=1, max_size=20))
def test_after_a_restart_nothing_goes_down_for_a_while(algorithm, current, ongoings):
    wanted, _ = follow(by(algorithm), ongoings, current, ScaleMemory(), FAR_S)
    assert min(wanted) >= current


@given(algorithms, traffic)
def test_the_memory_stays_small(algorithm, ticks):
    spec, wanted, memory, now = by(algorithm), 1, ScaleMemory(), 0.0
    for ongoing, pause_s in ticks * 10:
        now += pause_s
        wanted, memory = autoscale(spec, load(ongoing or 0, at=now), wanted, memory, now)
    assert len(memory.buckets) <= 62
    assert len(memory.recommendations) <= 11
    assert len(memory.forecast.misses) <= 361
    assert len(memory.forecast.pending) <= 120


@pytest.mark.promise(29)
@EVERY
def test_a_gateway_that_falls_silent_keeps_the_last_replica(algorithm):
    spec = replace(by(algorithm, idle_s=20.0), min_replicas=0)
    memory, current = ScaleMemory(), 1
    for second in range(10):
        both = [*load(1, gateway="g1"), *load(0, gateway="g2")]
        current, memory = autoscale(spec, both, current, memory, float(second))
    for second in range(10, 60):
        current, memory = autoscale(spec, load(0, gateway="g2"), current, memory, float(second))
        assert current == 1


@EVERY
@pytest.mark.parametrize("others", [[], ["g2"]])
def test_idleness_is_measured_and_not_merely_silent(algorithm, others):
    """What came and ended while a gateway was not heard is not known: idle time begins anew."""
    spec = by(algorithm, ZERO, idle_s=60.0)
    memory, current = ScaleMemory(), 1
    for second in range(300):
        is_heard = second < 30 or second >= 50
        gateways = ["g1", *others] if is_heard else others
        reports = [one for gateway in gateways for one in load(0, gateway=gateway)]
        current, memory = autoscale(spec, reports, current, memory, float(second))
        assert current == (second < 50 + 60)
