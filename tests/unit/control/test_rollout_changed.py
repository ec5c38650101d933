"""A strategy that changes in the middle of a roll-out: it goes on by the new one from where it
stands."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rolling_world import STRATEGIES, Answers, takes

from cloudlm.control.rollout import Facts, decide
from cloudlm.control.signals import Signals
from cloudlm.core.deployment import Deployment, DeploymentSpec
from cloudlm.core.rollout import Kind, Order, Outcome, Rollout, Step, Strategy, stages_of
from cloudlm.state.documents import dump, load_rollout
from cloudlm.state.rows import rollout_values

T = 1000.0
FINE = Signals(100, 0, (0.1,) * 100, (0.5,) * 100)
BAD = Signals(10, 10)


def canary(*percents, seconds=60.0):
    return Strategy(Kind.CANARY, steps=tuple(Step(one, seconds) for one in percents))


CANARY = canary(10.0, 25.0, 50.0)
BLUE_GREEN = Strategy(Kind.BLUE_GREEN, bake_s=60.0)
MIRROR = Strategy(Kind.MIRROR, bake_s=60.0)
ROLLING = Strategy(Kind.ROLLING)


def wish(strategy, revision=2):
    return Deployment(DeploymentSpec("bank", "m", rollout=strategy), revision, revision)


def facts(target=0, **more):
    ready = {1: 4, 2: target}
    return Facts(4, ready, ready, {1: Outcome.PROMOTED, 2: Outcome.PENDING}, **more)


def at(stage, strategy=CANARY, since=T):
    return Rollout(
        "bank", 1, 2, stage=stage, began_at=T - 5, since=since, stages=stages_of(strategy)
    )


def test_a_canary_becomes_blue_green_and_is_whole_before_it_gets_everything():
    early = decide(wish(BLUE_GREEN), at(1), facts(1), T + 1)
    assert (early.size, early.shares) == (4, {1: 1.0, 2: 0.0})
    whole = decide(wish(BLUE_GREEN), early.rollout, facts(4), T + 9)
    assert whole.shares == {1: 0.0, 2: 1.0}
    assert not whole.ended, "it bakes"


def test_the_last_step_of_a_canary_is_no_baked_blue_green():
    decision = decide(wish(BLUE_GREEN), at(2), facts(2), T + 1)
    assert not decision.rollout.plain
    assert decision.size == 4


def test_a_canary_goes_on_at_the_first_step_that_sends_no_less():
    decision = decide(wish(canary(5.0, 20.0, 40.0, 80.0)), at(1), facts(4), T + 1)
    assert decision.rollout.stage == 2
    assert decision.shares[2] == 0.4


def test_where_every_step_sends_less_the_last_one_is_measured_again():
    decision = decide(wish(canary(5.0, 20.0)), at(2), facts(4, new=FINE), T + 900)
    assert (decision.rollout.stage, decision.rollout.plain) == (1, False)
    assert (decision.shares[2], decision.rollout.since) == (0.2, T + 900)


def test_a_step_that_waits_counts_as_the_one_before():
    decision = decide(wish(canary(12.0, 30.0)), at(1, since=0.0), facts(1), T + 1)
    assert decision.rollout.stage == 0, "10 % of the requests went there, not 25 %"


def test_what_was_seen_before_the_change_is_not_held_against_it():
    decision = decide(wish(BLUE_GREEN), at(1), facts(4, new=BAD, old=FINE), T + 1)
    assert decision.back == ""


def test_other_times_alone_change_nothing_of_where_it_stands():
    shorter = canary(10.0, 25.0, 50.0, seconds=5.0)
    decision = decide(wish(shorter), at(1), facts(4, new=FINE, old=FINE), T + 6)
    assert decision.rollout.stage == 2, "its five seconds are over"


def test_a_canary_becomes_a_rolling_update():
    decision = decide(wish(ROLLING), replace(at(1), order=Order.PROMOTE), facts(1), T + 1)
    assert (decision.rollout.plain, decision.size, decision.back) == (True, None, "")
    assert decision.rollout.order is Order.NONE


@pytest.mark.parametrize("strategy", [CANARY, BLUE_GREEN, MIRROR])
def test_a_rolling_update_stays_one_for_the_stable_revision_is_whole_no_more(strategy):
    begun = decide(wish(ROLLING), Rollout("bank", 1, 1), facts(), T).rollout
    decision = decide(wish(strategy), begun, facts(1), T + 1)
    assert (decision.rollout, decision.size) == (begun, None)


def test_what_an_earlier_control_kept_goes_on_where_it_was():
    decision = decide(wish(CANARY), replace(at(1), stages=()), facts(1), T + 1)
    assert (decision.rollout.stage, decision.rollout.since) == (1, T)
    assert decision.rollout.stages == stages_of(CANARY)


def test_a_canary_given_up_for_a_rolling_update_gets_no_further_request():
    present = {1: 4, 2: 1, 3: 0}
    decision = decide(wish(ROLLING, 3), at(1), Facts(4, present, present), T + 1)
    assert decision.rollout.rejected == 2
    assert decision.shares == {2: 0.0}


def test_the_stages_are_kept_with_it():
    assert load_rollout(rollout_values(at(1))["document"]) == at(1)
    assert load_rollout(dump({"name": "bank"})).stages == ()


strategies = st.sampled_from([CANARY, BLUE_GREEN, MIRROR, ROLLING, canary(3.0), canary(70.0, 90.0)])


@given(st.lists(st.tuples(strategies, st.integers(0, 4), st.floats(0.0, 200.0)), max_size=30))
def test_however_often_it_changes_no_stage_sends_before_its_replicas_are_ready(changes):
    rollout, now = Rollout("bank", 1, 1), T
    for strategy, ready, later_s in changes:
        now += later_s
        decision = decide(wish(strategy), rollout, facts(ready, new=FINE, old=FINE), now)
        rollout = decision.rollout
        if rollout.plain or not rollout.under_way:
            continue
        assert rollout.stages == stages_of(strategy)
        stage = rollout.stages[rollout.stage]
        if ready < (decision.size or 0) and rollout.since == now:
            assert decision.shares.get(2, 0.0) <= stage.share
        if not rollout.since and stage.share == 1.0:
            assert decision.shares.get(2, 0.0) < 1.0


@pytest.mark.parametrize("first", [Kind.CANARY, Kind.BLUE_GREEN, Kind.MIRROR])
@pytest.mark.parametrize("then", list(Kind))
async def test_through_the_loop_it_ends_with_somebody_answering_all_the_time(plane, first, then):
    answers = Answers(plane)

    async def ask(version, kind):
        await plane.ask(
            model=f"models:/bank/{version}",
            min_replicas=2,
            max_replicas=2,
            rollout=STRATEGIES[kind],
        )

    await ask(1, first)
    await plane.steps(3)
    await ask(2, first)
    for turn in range(60):
        if turn == 6:
            await ask(2, then)
        await answers.give()
        await plane.steps(1)
        assert any(takes(one) for one in await plane.state.list_endpoints())
    assert plane.running() == ["bank-r2-0", "bank-r2-1"]
