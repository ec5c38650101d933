"""The roll-out's decider: each way step by step, and what holds whatever comes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.control.rollout import Facts, aligned, decide
from cloudlm.control.signals import Signals
from cloudlm.core.deployment import Deployment, DeploymentSpec
from cloudlm.core.rollout import Kind, Order, Outcome, Rollout, Step, Strategy, stages_of

T = 1000.0
STEPS = (Step(10.0, 60.0), Step(50.0, 60.0))
FINE = Signals(100, 0, (0.1,) * 100, (0.5,) * 100)
BAD = Signals(10, 10)


def wish(revision=2, **changes):
    strategy = Strategy(**{"kind": Kind.CANARY, "steps": STEPS, "bake_s": 60.0, **changes})
    return Deployment(DeploymentSpec("bank", "m", rollout=strategy), revision, revision)


def stable(revision=1):
    return Rollout("bank", revision, revision)


def facts(ready=None, wanted=4, **more):
    ready = {1: 4, 2: 1} if ready is None else ready
    return Facts(wanted, ready, ready, {1: Outcome.PROMOTED, 2: Outcome.PENDING}, **more)


def begun(deployment, now=T, ready=None):
    """A roll-out whose first stage has its traffic."""
    decision = decide(deployment, stable(), facts(ready), now)
    assert decision.rollout.since == now
    return decision.rollout


def test_the_time_to_start_does_not_run_while_there_is_no_room():
    deployment = wish(start_timeout_s=100.0)
    none = facts({1: 4})
    before = decide(deployment, stable(), none, T).rollout
    waits = replace(none, no_room=True)
    assert decide(deployment, before, waits, T + 5).rollout == before, "noted now and then"
    waited = decide(deployment, before, waits, T + 500)
    assert (waited.back, waited.rollout.began_at) == ("", T + 500)
    assert "no room in memory" in waited.waits
    assert not decide(deployment, waited.rollout, none, T + 599).back
    assert decide(deployment, waited.rollout, none, T + 600).back
    starts = replace(facts({1: 4, 2: 0}), present={1: 4, 2: 1}, no_room=True)
    assert decide(deployment, waited.rollout, starts, T + 600).back, "it has its replica"
    broken = replace(waits, failing="it ends again and again")
    assert decide(deployment, before, broken, T + 1).back


def test_a_rolling_update_that_waited_long_has_its_whole_time_once_it_can_never_start():
    rolling = wish(kind=Kind.ROLLING, start_timeout_s=100.0)
    waits = facts({1: 4}, no_room=True)
    rollout = decide(rolling, stable(), waits, T).rollout
    for later_s in range(0, 3600, 5):
        decision = decide(rolling, rollout, waits, T + later_s)
        assert (decision.back, decision.size, decision.hold) == ("", None, False)
        rollout = decision.rollout
    never = replace(waits, never="revision 2 can never be in memory")
    first = decide(rolling, rollout, never, T + 3600)
    assert (first.back, first.size) == ("", 0), "an hour of waiting was no start that failed"
    assert not decide(rolling, first.rollout, never, T + 3680).back
    assert decide(rolling, first.rollout, never, T + 3700).back
    room = decide(rolling, first.rollout, facts({1: 4}), T + 3680)
    assert (room.size, room.hold) == (None, False), "room came: it goes on"


def test_what_can_never_start_is_late_in_its_time_and_kept_out_of_a_rolling_update():
    never = "revision 2 can never be in memory"
    none = facts({1: 4}, no_room=True, never=never)
    canary = wish(start_timeout_s=100.0)
    before = decide(canary, stable(), none, T)
    assert (before.back, before.size) == ("", 1)
    assert never in before.note
    assert before.rollout == decide(canary, before.rollout, none, T + 99).rollout, "it runs"
    assert never in decide(canary, before.rollout, none, T + 100).back
    rolling = wish(kind=Kind.ROLLING, start_timeout_s=100.0)
    held = decide(rolling, stable(), none, T)
    assert (held.size, held.hold, held.back) == (0, False, ""), "stable follows its load"
    assert decide(rolling, held.rollout, none, T + 100).back == never
    patient = wish(kind=Kind.ROLLING, start_timeout_s=100.0, auto_rollback=False)
    assert decide(patient, held.rollout, none, T + 100).size == 0
    begun_already = replace(none, present={1: 3, 2: 1})
    assert not decide(rolling, held.rollout, begun_already, T + 100).back
    first = decide(wish(1, kind=Kind.ROLLING), None, replace(none, present={}, ready={}), T)
    assert first.size is None, "nothing runs that could be kept"


# Canary -------------------------------------------------------------------------------------------


def test_the_first_revision_needs_no_canary():
    decision = decide(wish(1), None, Facts(2, {1: 2}, {1: 1}), T + 0.0)
    assert decision.rollout.plain
    assert (decision.size, decision.shares, decision.hold) == (None, {}, False)
    assert (decision.note, decision.waits) == ("revision 1 starts", "1 of 2 replicas ready")
    whole = decide(wish(1), decision.rollout, Facts(2, {1: 2}, {1: 2}), T + 1.0)
    assert whole.rollout == stable()
    assert whole.ended == ((1, Outcome.PROMOTED, ""),)


def test_no_request_before_the_replicas_of_a_step_are_ready():
    decision = decide(wish(), stable(), facts({1: 4, 2: 0}), T + 5.0)
    assert decision.size == 1  # 10 % of four
    assert decision.shares == {1: 1.0, 2: 0.0}
    assert decision.rollout.since == 0.0
    assert decision.waits == "0 of 1 replicas ready"
    decision = decide(wish(), decision.rollout, facts(), T + 7.0)
    assert decision.shares == {1: 0.9, 2: 0.1}
    assert decision.rollout.since == T + 7.0


def test_a_step_needs_its_time_and_its_requests():
    rollout = begun(wish())
    early = decide(wish(), rollout, facts(new=FINE, old=FINE), T + 59.0)
    assert (early.rollout.stage, early.waits) == (0, "1 s more")
    few = decide(wish(), rollout, facts(new=Signals(5), old=FINE), T + 61.0)
    assert (few.rollout.stage, few.waits) == (0, "15 more requests")
    onward = decide(wish(), rollout, facts(new=FINE, old=FINE), T + 61.0)
    assert (onward.rollout.stage, onward.rollout.since) == (1, 0.0)
    assert onward.size == 2
    assert onward.shares == {1: 0.9, 2: 0.1}, "half of the requests before there are two replicas"
    grown = decide(wish(), onward.rollout, facts({1: 4, 2: 2}), T + 70.0)
    assert grown.shares == {1: 0.5, 2: 0.5}


def test_after_its_last_step_it_is_promoted_by_replacing_what_runs():
    rollout = replace(begun(wish()), stage=1, since=T + 100.0)
    decision = decide(wish(), rollout, facts({1: 4, 2: 2}, new=FINE, old=FINE), T + 161.0)
    assert (decision.size, decision.shares, decision.rollout.plain) == (None, {}, True)
    assert decision.ended == ()
    full = decide(wish(), decision.rollout, facts({1: 1, 2: 4}), T + 190.0)
    assert (full.note, full.waits) == (
        "revision 2 replaces what runs, replica by replica",
        "the end of revision 1",
    )
    last = decide(wish(), decision.rollout, facts({2: 4}), T + 200.0)
    assert last.rollout == stable(2)
    assert last.ended == ((2, Outcome.PROMOTED, ""),)


def test_a_bad_canary_goes_back_and_gets_no_further_request():
    rollout = begun(wish())
    decision = decide(wish(), rollout, facts(new=BAD, old=FINE), T + 1.0)
    assert "10 of 10 attempts failed" in decision.back
    assert decision.shares == {2: 0.0}
    returned = wish().returned(wish(1).spec, 1, now=1.0)
    after = decide(returned, decision.rollout, facts(), T + 2.0)
    assert (after.rollout.under_way, after.rollout.rejected) == (False, 2)
    assert after.shares == {2: 0.0}
    assert "revision 2 was rolled back: 10 of 10" in after.note
    gone = decide(returned, after.rollout, facts({1: 4}), T + 3.0)
    assert gone.shares == {}


def test_going_back_gives_nothing_to_one_that_was_given_up_before():
    aborted = replace(begun(wish()), target=3, rejected=2, order=Order.ABORT)
    present = {1: 4, 2: 1, 3: 1}
    decision = decide(wish(3), aborted, Facts(4, present, present), T + 1.0)
    assert decision.back == "aborted"
    assert decision.shares == {2: 0.0, 3: 0.0}


def test_without_automatic_return_it_stays_and_says_so():
    deployment = wish(auto_rollback=False)
    rollout = begun(deployment)
    decision = decide(deployment, rollout, facts(new=BAD, old=FINE), T + 1000.0)
    assert (decision.back, decision.rollout.stage) == ("", 0)
    assert "'abort' goes back" in decision.note


def test_without_automatic_promotion_each_step_waits_for_a_word():
    deployment = wish(auto_promote=False)
    rollout = begun(deployment)
    good = facts(new=FINE, old=FINE)
    decision = decide(deployment, rollout, good, T + 1000.0)
    assert decision.rollout == rollout
    assert "it waits for 'promote'" in decision.note
    told = replace(rollout, order=Order.PROMOTE)
    assert decide(deployment, told, facts(), T + 10.0).rollout.stage == 1
    fully = decide(deployment, replace(rollout, order=Order.PROMOTE_FULLY), facts(), T + 10.0)
    assert (fully.rollout.plain, fully.size) == (True, None)
    aborted = decide(deployment, replace(rollout, order=Order.ABORT), facts(), T + 10.0)
    assert aborted.back == "aborted"


@pytest.mark.parametrize("since", [0.0, T + 5.0])
def test_replicas_that_end_again_and_again_are_reason_enough(since):
    rollout = replace(begun(wish()), since=since)
    told = facts({1: 4, 2: 0}, failing="bank-r2-0: no such tensor")
    assert decide(wish(), rollout, told, T + 6.0).back == "bank-r2-0: no such tensor"


def test_replicas_that_never_come_up_are_given_their_time():
    rollout = aligned(wish(start_timeout_s=100.0), stable(), {}, T)
    waiting = facts({1: 4, 2: 0})
    assert not decide(wish(start_timeout_s=100.0), rollout, waiting, T + 99.0).back
    late = decide(wish(start_timeout_s=100.0), rollout, waiting, T + 100.0)
    assert "not ready within 100 s" in late.back


def test_a_pause_holds_it_where_it_is_whatever_comes():
    rollout = replace(begun(wish()), paused_at=T + 10.0)
    decision = decide(wish(), rollout, facts(new=BAD, old=FINE), T + 1000.0)
    assert (decision.rollout, decision.back) == (rollout, "")
    assert decision.shares == {1: 0.9, 2: 0.1}
    assert decision.size == 1
    aborted = decide(wish(), replace(rollout, order=Order.ABORT), facts(), T + 1000.0)
    assert aborted.back


def test_another_wish_meanwhile_begins_anew_from_the_stable_revision():
    third = wish(3)
    present = {1: 4, 2: 1, 3: 0}
    outcomes = {1: Outcome.PROMOTED, 2: Outcome.PENDING, 3: Outcome.PENDING}
    decision = decide(third, begun(wish()), Facts(4, present, present, outcomes), T + 9.0)
    assert decision.ended == ((2, Outcome.SUPERSEDED, "revision 3 took its place"),)
    assert (decision.rollout.stable, decision.rollout.target) == (1, 3)
    assert decision.shares == {1: 1.0, 2: 0.0, 3: 0.0}


def test_a_revision_that_was_good_before_needs_no_canary():
    outcomes = {1: Outcome.PROMOTED, 2: Outcome.PROMOTED}
    ready = {1: 0, 2: 4}
    decision = decide(wish(1), stable(2), Facts(4, ready, ready, outcomes), T + 0.0)
    assert (decision.rollout.plain, decision.size) == (True, None)


def test_a_strategy_changed_on_the_way_counts_at_once():
    rollout = begun(wish())
    decision = decide(wish(kind=Kind.ROLLING), rollout, facts(), T + 1.0)
    assert (decision.size, decision.shares) == (None, {})


# The other ways -----------------------------------------------------------------------------------


def test_blue_green_switches_all_at_once_and_keeps_the_old_for_a_while():
    deployment = wish(kind=Kind.BLUE_GREEN)
    decision = decide(deployment, stable(), facts({1: 4, 2: 3}), T + 0.0)
    assert (decision.size, decision.shares) == (4, {1: 1.0, 2: 0.0})
    switched = decide(deployment, decision.rollout, facts({1: 4, 2: 4}), T + 5.0)
    assert (switched.size, switched.shares) == (4, {1: 0.0, 2: 1.0})
    assert decide(deployment, switched.rollout, facts({1: 4, 2: 4}), T + 64.0).size == 4
    over = decide(deployment, switched.rollout, facts({1: 4, 2: 4}), T + 66.0)
    assert (over.size, over.rollout.plain) == (None, True)
    back = decide(deployment, switched.rollout, facts({1: 4, 2: 4}, new=BAD, old=FINE), T + 6.0)
    assert back.back
    assert back.shares == {2: 0.0}


def test_blue_green_by_hand_waits_before_the_switch_alone():
    deployment = wish(kind=Kind.BLUE_GREEN, auto_promote=False)
    ready = facts({1: 4, 2: 4})
    waiting = decide(deployment, stable(), ready, T + 0.0)
    assert waiting.shares == {1: 1.0, 2: 0.0}
    told = replace(waiting.rollout, order=Order.PROMOTE)
    switched = decide(deployment, told, ready, T + 5.0)
    assert switched.shares == {1: 0.0, 2: 1.0}
    assert decide(deployment, switched.rollout, ready, T + 70.0).rollout.plain


@pytest.mark.parametrize(
    "changes",
    [{"kind": Kind.BLUE_GREEN}, {"steps": (Step(100.0, 60.0),)}, {"steps": (Step(50.0, 60.0),)}],
)
def test_a_stable_revision_that_answers_takes_over_from_a_target_that_does_not(changes):
    deployment = wish(**changes)
    decision = decide(deployment, stable(), facts({1: 4, 2: 4}), T)
    gone = decide(deployment, decision.rollout, facts({1: 4, 2: 0}), T + 1.0)
    assert gone.shares == {1: 1.0, 2: 0.0}
    assert "revision 2 gets 0 % of the requests" in gone.note
    paused = replace(decision.rollout, paused_at=T + 1.0)
    assert decide(deployment, paused, facts({1: 4, 2: 0}), T + 2.0).shares == gone.shares
    both = decide(deployment, decision.rollout, facts({1: 0, 2: 0}), T + 1.0)
    assert both.shares == decision.shares, "there is nobody who could take over"
    again = decide(deployment, gone.rollout, facts({1: 4, 2: 1}), T + 2.0)
    assert again.shares == decision.shares


def test_a_target_that_does_not_answer_is_not_promoted():
    deployment = wish(kind=Kind.BLUE_GREEN)
    rollout = decide(deployment, stable(), facts({1: 4, 2: 4}), T).rollout
    over = decide(deployment, rollout, facts({1: 4, 2: 0}), T + 61.0)
    assert (over.rollout.plain, over.rollout.stage, over.ended) == (False, 1, ())
    assert over.waits == "a replica of revision 2 that answers"
    assert decide(deployment, over.rollout, facts({1: 4, 2: 4}), T + 62.0).rollout.plain


def test_a_mirror_gets_copies_and_no_request():
    deployment = wish(kind=Kind.MIRROR, mirror_percent=25.0)
    decision = decide(deployment, stable(), facts(), T + 0.0)
    assert decision.size == 1
    assert (decision.shares, decision.mirrors) == ({1: 1.0, 2: 0.0}, {2: 0.25})
    over = decide(deployment, decision.rollout, facts(new=FINE, old=FINE), T + 61.0)
    assert (over.size, over.mirrors) == (None, {})


def test_a_rolling_update_is_over_when_nothing_else_is_left():
    deployment = wish(kind=Kind.ROLLING)
    decision = decide(deployment, stable(), facts({1: 1, 2: 4}), T + 0.0)
    assert (decision.size, decision.shares, decision.ended) == (None, {}, ())
    assert decide(deployment, decision.rollout, facts({2: 3}), T + 0.0).ended == ()
    assert decide(deployment, decision.rollout, facts({2: 4}), T + 0.0).ended
    held = decide(
        deployment, replace(decision.rollout, paused_at=1.0), facts({1: 1, 2: 4}), T + 2.0
    )
    assert held.hold
    back = decide(
        deployment, replace(decision.rollout, order=Order.ABORT), facts({1: 1, 2: 4}), 2.0
    )
    assert back.back == "aborted"
    assert back.shares == {}, "replicas of both are needed"


@pytest.mark.parametrize("kind", [Kind.CANARY, Kind.BLUE_GREEN, Kind.MIRROR])
def test_scaled_to_nothing_a_revision_is_started_before_it_is_judged(kind):
    deployment = wish(kind=kind)
    idle = facts({1: 0, 2: 0}, wanted=0)
    decision = decide(deployment, stable(), idle, T + 0.0)
    assert (decision.size, decision.rollout.since) == (1, 0.0)
    later = decide(deployment, decision.rollout, idle, T + 500.0)
    assert (later.rollout.since, later.rollout.plain, later.ended) == (0.0, False, ())
    assert later.waits == "0 of 1 replicas ready"


def test_scaled_to_nothing_a_rolling_update_has_nothing_to_wait_for():
    assert decide(wish(kind=Kind.ROLLING), stable(), facts({2: 0}, wanted=0), T + 0.0).ended


# Whatever comes -----------------------------------------------------------------------------------

counts = st.dictionaries(st.integers(1, 4), st.integers(0, 6), max_size=4)
signals = st.sampled_from((Signals(), FINE, BAD, Signals(30, 1, (0.1,) * 29, (0.5,) * 29)))
strategies = st.builds(
    Strategy,
    kind=st.sampled_from(Kind),
    steps=st.sampled_from((STEPS, (Step(100.0, 0.0),), (Step(1.0, 5.0), Step(100.0, 5.0)))),
    bake_s=st.sampled_from((0.0, 30.0)),
    min_requests=st.sampled_from((0, 20)),
    auto_promote=st.booleans(),
    auto_rollback=st.booleans(),
)
events = st.lists(
    st.tuples(
        st.sampled_from(("look", "look", "look", "order", "pause", "resume", "wish")),
        counts,
        signals,
        st.integers(0, 6),
        st.floats(0.0, 100.0),
        st.sampled_from(Order),
    ),
    max_size=25,
)


@given(strategies, events)
def test_what_holds_whatever_comes(strategy, events):
    deployment = Deployment(DeploymentSpec("bank", "m", rollout=strategy), 2, 2)
    rollout, now, newest = stable(), T, 2
    outcomes = {1: Outcome.PROMOTED, 2: Outcome.PENDING}
    for what, present, new, wanted, later_s, order in events:
        now += later_s
        if what == "order":
            rollout = replace(rollout, order=order)
        elif what == "pause":
            rollout = replace(rollout, paused_at=rollout.paused_at or now + 1.0)
        elif what == "resume":
            rollout = replace(rollout, paused_at=0.0)
        elif what == "wish":
            newest += 1
            outcomes[newest] = Outcome.PENDING
            deployment = replace(deployment, revision=newest)
        ready = {number: count for number, count in present.items() if count % 2}
        known = Facts(wanted, present, ready, dict(outcomes), new, FINE)
        decision = decide(deployment, rollout, known, now)
        check(strategy, rollout, known, decision, now)
        again = decide(deployment, decision.rollout, replace(known, new=Signals()), now)
        if decision.rollout.paused_at:
            assert again.rollout == decision.rollout
        rollout = decision.rollout
        for number, outcome, _ in decision.ended:
            outcomes[number] = outcome
        if decision.back:
            outcomes[rollout.target] = Outcome.ROLLED_BACK
            deployment = replace(deployment, revision=rollout.stable)


def check(strategy, before, known, decision, now):
    kept = decision.rollout
    assert all(0.0 <= share <= 1.0 for share in decision.shares.values())
    if decision.size is not None:
        limit = stages_of(strategy)[kept.stage]
        assert decision.shares[kept.target] <= limit.share
        if known.ready.get(kept.stable) and not known.ready.get(kept.target):
            assert decision.shares[kept.target] == 0.0
        assert kept.under_way
        assert 1 <= decision.size <= max(known.wanted, 1)
        rest = decision.shares.get(kept.stable)
        assert rest is None or rest + decision.shares[kept.target] == pytest.approx(1.0)
    if kept.rejected in known.present and decision.shares:
        assert decision.shares[kept.rejected] == 0.0
    for number, outcome, _ in decision.ended:
        if outcome is Outcome.PROMOTED:
            assert number == kept.stable == kept.target
            assert known.ready.get(number, 0) >= known.wanted
            assert set(known.present) == {number}
    if decision.back:
        assert kept.stable and kept.under_way
    if before.paused_at and before.target == kept.target and kept.order is not Order.ABORT:
        assert (kept, decision.back) == (before, "")
    if before.target == kept.target and kept.under_way and not before.plain:
        assert kept.stage >= before.stage
