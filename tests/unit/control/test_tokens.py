"""The default rule: token work, what starts already, how long a start takes, and prediction."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.control.autoscale import Fleet, ScaleMemory, autoscale
from cloudlm.control.autoscale.facts import Forecast, Stay, TotalDemand
from cloudlm.control.autoscale.forecast import errors_of, observed
from cloudlm.control.autoscale.staffing import late_share, needed
from cloudlm.control.autoscale.stay import answer_s, stayed
from cloudlm.control.autoscale.windows import stabilised
from cloudlm.core.deployment import Demand, DeploymentSpec
from cloudlm.core.pace import Pace
from cloudlm.core.scaling import Scaling

pytestmark = pytest.mark.promise(29)

SPEC = DeploymentSpec("bank", "models:/bank/1", max_replicas=50)
TOKEN_S, PROMPT_S = 0.03, 0.0001


def measured(start_s=30.0, output_tokens=200.0):
    """A pace that was measured: a start, 0.1 ms per prompt token, 30 ms per further one."""
    pace = Pace("bank", "models:/bank/1", start_s=start_s)
    for _ in range(20):
        pace = pace.answered(PROMPT_S, output_tokens, TOKEN_S, 8.0)
    return pace


def demand(rate, prompt=1000.0, answer=200.0, queued=0, at=0.0):
    stay_s = prompt * PROMPT_S + answer * TOKEN_S
    return [
        Demand(
            "bank",
            "g1",
            round(rate * stay_s) + queued,
            queued,
            rate,
            at,
            prompt_tokens_per_s=rate * prompt,
            waiting_prompt_tokens=queued * prompt,
            finished_per_s=rate,
            output_tokens_per_s=rate * answer,
            computed_tokens_per_s=rate * prompt,
            ttft_s=prompt * PROMPT_S,
            tpot_s=TOKEN_S,
        )
    ]


def work(rate, replicas, prompt=1000.0, answer=200.0):
    """The load that arrives when one has a replica for itself: of the stay measured, what remains
    when the share of the replicas' time that prompts have is taken off."""
    prompts = rate * prompt * PROMPT_S / replicas
    return rate * (prompt * PROMPT_S + answer * TOKEN_S) / (1.0 + prompts)


def follow(reports, current=1, memory=None, start=0.0, spec=SPEC, fleet=None):
    memory, found = memory or ScaleMemory(pace=measured()), []
    for number, report in enumerate(reports):
        now = start + number
        report = [replace(one, measured_at=now) for one in report]
        seen = Fleet(current) if fleet is None else fleet
        current, memory = autoscale(spec, report, current, memory, now, seen)
        found.append(current)
    return found, memory


def test_long_prompts_need_replicas_before_they_are_answered():
    few, _ = follow([demand(2.0)] * 120)
    many, _ = follow([demand(2.0, prompt=60_000.0)] * 120)
    assert many[-1] >= few[-1] + 2


def test_the_load_is_the_work_by_littles_law():
    _, memory = follow([demand(4.0)] * 120, current=4, fleet=Fleet(4))
    assert memory.forecast.load == pytest.approx(work(4.0, 4), rel=0.02)


def test_the_work_is_the_same_however_many_replicas_it_was_measured_at():
    """With few replicas prompts take more of each one's time, and everything lasts longer."""
    wanted = []
    for replicas in (10, 20):
        prompts_s, answers_s = 4.0, 32.0  # of work in a second
        free = 1.0 - prompts_s / replicas
        stay_s = (prompts_s + answers_s) / free / 4.0
        report = Demand(
            "bank",
            "g1",
            round(4.0 * stay_s),
            0,
            4.0,
            0.0,
            prompt_tokens_per_s=4.0 * 10_000.0,
            finished_per_s=4.0,
            output_tokens_per_s=4.0 * 200.0,
            computed_tokens_per_s=4.0 * 10_000.0,
            ttft_s=1.0 / free,
            tpot_s=0.04 / free,
        )
        seen = Fleet(replicas)
        found, memory = follow([[report]] * 600, replicas, ScaleMemory(), fleet=seen)
        assert memory.forecast.load == pytest.approx(prompts_s + answers_s, rel=0.03)
        wanted.append(found[-1])
    assert wanted[0] == wanted[1]


def test_a_queue_is_not_taken_for_load():
    four = Fleet(4)
    calm, _ = follow([demand(4.0)] * 120, 4, fleet=four)
    waiting, memory = follow([demand(4.0)] * 119 + [demand(4.0, queued=20)], 4, fleet=four)
    assert memory.forecast.load == pytest.approx(work(4.0, 4), rel=0.02)
    assert waiting[-1] <= calm[-1] + math.ceil(20 * 6.1 / 30 / 8)


def test_what_starts_already_is_subtracted_from_the_backlog():
    base, memory = follow([demand(4.0)] * 120, current=4)
    late = [demand(4.0, queued=200)]
    alone, _ = follow(late, 4, memory, 120.0, fleet=Fleet(4))
    helped, _ = follow(late, 14, memory, 120.0, fleet=Fleet(4, (29.0,) * 10))
    assert alone[-1] > base[-1]
    assert helped[-1] == base[-1]  # those on their way will have served it


def test_a_replica_goes_after_some_starts_in_which_it_was_not_needed():
    small = replace(SPEC, target_ongoing_requests=2.0)
    for start_s, kept_s in ((30.0, 240.0), (120.0, 360.0)):  # eight starts; three of long ones
        memory = ScaleMemory(pace=measured(start_s))
        up, memory = follow([demand(8.0)] * 2400, memory=memory, spec=small)
        # Less, but no less than by chance.
        down, _ = follow([demand(7.3)] * 2000, up[-1], memory, 2400.0, small)
        first = next(second for second, one in enumerate(down) if one < up[-1])
        assert kept_s <= first <= kept_s + 2 * start_s
        assert down[-1] < up[-1]


def test_a_fall_beyond_chance_ends_what_was_recommended_before():
    memory = ScaleMemory(pace=measured())
    up, memory = follow([demand(8.0)] * 4000, memory=memory)
    down, _ = follow([demand(1.0)] * 120, up[-1], memory, 4000.0)
    fewer = next(second for second, one in enumerate(down) if one < up[-1])
    assert fewer <= 60  # not after the 240 s for which chance would keep them
    assert down[-1] * 8 >= work(1.0, 1)
    asked = replace(SPEC, scaling=Scaling(down_window_s=100.0))
    down, _ = follow([demand(1.0)] * 120, up[-1], memory, 4000.0, asked)
    assert next(second for second, one in enumerate(down) if one < up[-1]) >= 99


def test_replicas_asked_for_out_of_seconds_are_not_kept_for_minutes():
    """A forecast made out of little stands for no longer than what it was made of."""
    history = ()
    _, history = stabilised(history, 20, 8, 100.0, 0.0, 240.0, 30.0)
    kept, history = stabilised(history, 9, 20, 129.0, 0.0, 240.0, 30.0)
    assert kept == 20
    gone, _ = stabilised(history, 9, 20, 131.0, 0.0, 240.0)
    assert gone == 9


def test_what_waits_when_new_replicas_come_is_reckoned_with_before_it_waits():
    """More comes than replicas serve: a queue will be there when others are ready."""
    _, memory = follow([demand(4.0)] * 600, 4, fleet=Fleet(4))
    jump = [demand(16.0)] * 20
    few, _ = follow(jump, 4, memory, 600.0, fleet=Fleet(4))
    enough, _ = follow(jump, 20, memory, 600.0, fleet=Fleet(20))
    assert few[-1] * 8 > work(16.0, few[-1]) + 20
    assert few[-1] > enough[-1]


def test_on_a_slope_the_line_counts_and_on_the_level_the_long_averages():
    level, slope = Forecast(), Forecast()
    for second in range(1800):
        noise = 5.0 * (1 if second * 7919 % 13 < 6 else -1)
        level = observed(level, 50.0 + noise, 5.0, 6.0, 30.0, float(second))
        slope = observed(slope, 0.1 * second, 5.0, 6.0, 30.0, float(second))
    assert level.load == pytest.approx(50.0, abs=2.0)
    assert slope.load == pytest.approx(0.1 * (1800 + 30), rel=0.02)  # one start ahead


def test_bursts_that_come_again_find_replicas():
    burst = [demand(0.5)] * 110 + [demand(12.0)] * 10
    first, memory = follow(burst * 8)
    again, _ = follow(burst, first[-1], memory, 960.0)
    assert min(again) * 8 >= 30  # a burst's work, though it is over before a replica starts


IDLE = [Demand("bank", "g1", 0, 0, 0.0, 0.0)]
RESTARTED = st.builds(
    lambda slots, tokens, start_s, least: (
        replace(SPEC, target_ongoing_requests=slots, min_replicas=least),
        ScaleMemory(pace=measured(start_s, tokens)),
    ),
    st.floats(1.0, 64.0),
    st.floats(1.0, 4000.0),
    st.floats(0.5, 600.0),
    st.integers(0, 3),
)


@given(RESTARTED, st.integers(0, 3), st.floats(0.5, 30.0))
def test_idle_it_stays_at_its_least_after_a_restart(restarted, more, step_s):
    """Nobody asked since control began anew: what nobody knows of is no reason for replicas."""
    spec, memory = restarted
    current = before = spec.min_replicas + more
    for number in range(60):
        current, memory = autoscale(spec, IDLE, current, memory, number * step_s, Fleet(current))
        assert spec.min_replicas <= current <= before
        before = current


@pytest.mark.parametrize("slots", [1.0, 8.0])
def test_one_request_after_a_restart_keeps_no_replicas_for_long(slots):
    """What was once asked is foreseen ever less, and so are its errors."""
    spec = replace(SPEC, target_ongoing_requests=slots)
    memory = ScaleMemory(pace=measured(output_tokens=700.0))  # 21 s
    asked, memory = follow([demand(0.1, answer=700.0)] * 10, memory=memory, spec=spec)
    wanted, _ = follow([IDLE] * 900, asked[-1], memory, 10.0, spec=spec)
    assert wanted[-1] == 1


@given(st.floats(0.0, 1.0), st.floats(1.0, 1800.0), st.floats(0.1, 60.0))
def test_of_nothing_nothing_is_feared(load, known_s, request_s):
    errors = errors_of((), known_s, request_s, 30.0, load)
    certain = errors_of((), known_s, request_s, 30.0, 1.0)
    for (weight, error), (same, most) in zip(errors, certain, strict=True):
        assert weight == same
        assert error == pytest.approx(most * math.sqrt(load))


def test_unmeasured_it_goes_by_requests_at_once():
    asked = [Demand("bank", "g1", 24, 0, 9.0, 0.0)]
    assert autoscale(SPEC, asked, 1, ScaleMemory(), 0.0)[0] == 3


def test_answers_slower_than_asked_bring_more_once_those_starting_have_helped():
    spec = replace(SPEC, scaling=Scaling(target_ttft_ms=50.0))
    slow = demand(4.0)  # 100 ms
    _, memory = follow([slow] * 60, 6, spec=spec, fleet=Fleet(6))
    more, memory = follow([slow], 6, memory, 60.0, spec=spec, fleet=Fleet(6))
    assert more[-1] == 12
    assert "2 times what is asked" in memory.why
    same, _ = follow([slow], 12, memory, 61.0, spec=spec, fleet=Fleet(6, (1.0,) * 6))
    assert same[-1] == 12


def test_a_replica_that_never_comes_up_hinders_no_others():
    spec = replace(SPEC, scaling=Scaling(target_ttft_ms=50.0))
    slow, memory = demand(0.2), ScaleMemory(pace=measured(), ttft_s=0.1)
    for ready, lost, wanted in ((1, 0, 2), (1, 1, 3), (6, 2, 14), (1, 5, 6), (0, 3, 3)):
        fleet = Fleet(ready, lost=lost)
        found, _ = follow([slow], ready + lost, memory, spec=spec, fleet=fleet)
        assert found == [wanted]


@given(st.integers(1, 8), st.integers(0, 12))
def test_where_nothing_comes_up_not_all_is_started(ready, steps):
    """Of all that are started besides, none answers."""
    spec = replace(SPEC, max_replicas=1000, scaling=Scaling(target_ttft_ms=50.0))
    memory, current = ScaleMemory(pace=measured(), ttft_s=10.0), ready
    for second in range(steps):
        fleet = Fleet(ready, lost=current - ready)
        slow = [replace(one, ttft_s=1.0, measured_at=float(second)) for one in demand(0.5)]
        current, memory = autoscale(spec, slow, current, memory, float(second), fleet)
    assert current <= 3 * ready + 1


def test_what_never_comes_up_works_nothing_off():
    waiting, memory = demand(4.0, queued=300), follow([demand(4.0)] * 60, 6, fleet=Fleet(6))[1]
    coming, lost = (
        autoscale(SPEC, waiting, 12, memory, 60.0, fleet)[0]
        for fleet in (Fleet(6, (1000.0,) * 6), Fleet(6, lost=6))
    )
    assert lost > coming


def test_answers_about_as_quick_as_asked_keep_what_is_there():
    spec = replace(SPEC, scaling=Scaling(target_tpot_ms=30.0))
    kept, _ = follow([demand(0.2)] * 900, 5, spec=spec)
    assert set(kept) == {5}


@pytest.mark.parametrize(
    ("load", "servers", "expected"),
    [(0.0, 8, 0.0), (8.0, 8, 1.0), (9.0, 8, 1.0), (33.0, 40, 0.1427)],
)
def test_late_share_after_halfin_and_whitt(load, servers, expected):
    assert late_share(load, servers, 6.0, 0.0) == pytest.approx(expected, abs=0.02)


ERRORS = st.lists(st.tuples(st.floats(0.01, 10), st.floats(-3, 8)), min_size=1, max_size=12).map(
    tuple
)


@given(
    st.floats(0, 300),
    st.floats(1, 64),
    st.floats(0.1, 60),
    st.floats(0, 5),
    st.floats(0.01, 0.5),
    ERRORS,
)
def test_needed_is_enough_and_not_more(load, slots, request_s, wait_s, share, errors):
    found = needed(load, slots, request_s, wait_s, 1000, share, errors)
    assert late_share(load, found * slots, request_s, wait_s, errors) <= share
    if found:
        assert late_share(load, (found - 1) * slots, request_s, wait_s, errors) > share


@given(st.floats(1, 300), st.floats(1, 64), st.floats(0, 1), ERRORS)
def test_prompts_that_share_replicas_need_no_fewer_of_them(load, slots, prompts, errors):
    alone = needed(load, slots, 6.0, 1.0, 2000, 0.15, errors)
    shared = needed(load, slots, 6.0, 1.0, 2000, 0.15, errors, prompts)
    assert shared >= alone
    assert late_share(load, shared * slots, 6.0, 1.0, errors, prompts * slots) <= 0.15


@given(st.floats(1, 300), st.floats(0.1, 60), ERRORS, st.floats(0, 3))
def test_more_servers_and_smaller_errors_make_no_more_late(load, request_s, errors, more):
    shares = [late_share(load, servers, request_s, 1.0, errors) for servers in (8, 64, 400)]
    assert shares == sorted(shares, reverse=True)
    larger = tuple((weight, error + more) for weight, error in errors)
    for servers in (8, 64, 400):
        assert 0.0 <= late_share(load, servers, request_s, 1.0, larger) <= 1.0
    one, other = ((1.0, 0.0),), ((1.0, more),)
    assert late_share(load, 64, request_s, 1.0, one) <= late_share(load, 64, request_s, 1.0, other)


def test_a_jump_that_was_seen_once_costs_replicas_by_its_weight():
    usual = tuple((float(at), 5.0 * math.sin(at) / 6.0, 1.0) for at in range(354))
    once = (*usual, *((354.0 + at, 8.0, 1.0) for at in range(6)))
    often = (*usual, *((354.0 + at, 8.0, 1.0) for at in range(120)))
    wanted = [
        needed(36.0, 8, 6.0, 1.0, 99, 0.15, errors_of(misses, 900.0, 6.0, 30.0, 36.0))
        for misses in (usual, once, often)
    ]
    assert wanted[1] <= wanted[0] + 1
    assert wanted[2] >= wanted[0] + 3


def test_what_is_foretold_out_of_little_is_no_record_of_later_forecasts():
    memory = Forecast()
    for second in range(60):  # nobody at first, then all at once
        memory = observed(memory, 0.0 if second < 10 else 40.0, 5.0, 6.0, 30.0, float(second))
    assert not memory.misses
    for second in range(60, 1800):
        memory = observed(memory, 40.0, 5.0, 6.0, 30.0, float(second))
    assert max(error for _, error, _ in memory.misses) < 1.0


def test_bursts_that_are_usual_are_no_jumps():
    usual = Forecast()
    for second in range(1800):  # all requests of 15 s come in one
        usual = observed(usual, 600.0 if second % 15 == 0 else 0.0, 5.0, 6.0, 30.0, float(second))
        if second > 900:
            assert usual.known_s > 600.0


def test_a_jump_is_followed_within_seconds_where_the_load_was_steady():
    memory = Forecast()
    for second in range(900):
        memory = observed(memory, 10.0 + second % 3, 2.0, 6.0, 30.0, float(second))
    for second in range(900, 912):
        memory = observed(memory, 60.0, 10.0, 6.0, 30.0, float(second))
    assert memory.load > 45.0


def test_the_length_of_answers_is_known_before_the_long_ones_end():
    # Answers of 1 and of 19 s, as many of each: after 10 s only short ones have ended.
    pace = measured()
    stay, inside = Stay(), 0.0
    for second in range(10):
        ended = 2.0 if second else 0.0
        inside += 4.0 - ended
        stay = stayed(stay, TotalDemand(ongoing=inside, finished_per_s=ended), Pace(), 1)
    assert 5.0 < answer_s(stay, pace, 8.0) < 15.0  # those that ended say 1 s


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 20)), min_size=1, max_size=100))
def test_requests_that_hang_do_not_make_answers_endless(reports):
    pace, stay = measured(), Stay()
    for ongoing, ended in reports:
        stay = stayed(stay, TotalDemand(ongoing=ongoing, finished_per_s=ended), pace, 1)
    assert 0.0 <= answer_s(stay, pace, 8.0) <= 4.0 * 200.0 * TOKEN_S * 1.001


@given(st.lists(st.floats(0, 200), min_size=1, max_size=200), st.floats(1, 600))
def test_a_forecast_is_never_below_nothing_nor_far_above_the_most_that_came(loads, start_s):
    memory = Forecast()
    for number, load in enumerate(loads):
        memory = observed(memory, load, load / 6, 6.0, start_s, float(number * 3))
        if memory.count:
            assert -1e-6 <= memory.load <= max(loads) * 2.001 + 1e-6
            assert all(weight >= 0 and math.isfinite(at) for weight, at in memory.errors)


def test_a_slow_start_counts_at_once_and_a_quick_one_little():
    pace = Pace().started(30.0)
    assert pace.start_s == 30.0
    assert pace.started(60.0).start_s == 60.0
    assert 20.0 < pace.started(10.0).start_s < 30.0


def test_the_time_per_token_is_read_off_at_the_load_that_is_asked_for():
    pace = Pace()
    for _ in range(50):
        for ongoing in (1.0, 4.0, 12.0):
            pace = pace.answered(0.0, 100.0, 0.01 + 0.002 * ongoing, ongoing)
    assert pace.token_s(8.0) == pytest.approx(0.026, rel=0.01)
    assert pace.token_s(1.0) == pytest.approx(0.012, rel=0.05)
