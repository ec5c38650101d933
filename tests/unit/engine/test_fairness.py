"""Tenants and priorities: whoever asks for how much, each gets its share, and nothing starves."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from engine_crowd import Crowd, crowd
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cloudlm.core.chat import FinishReason, Sampling
from cloudlm.core.errors import ContextLengthExceeded
from cloudlm.engine.fairness import ANSWER_TOKEN_COST, MAX_BYPASSES, PROMOTION_STEPS, Lines
from cloudlm.engine.limits import Limits
from cloudlm.engine.sequence import Sequence, Status

# Shares


@given(
    st.sampled_from([(1.0, 1.0), (1.0, 2.0), (3.0, 1.0), (0.5, 2.5)]),
    st.integers(0, 2**32),
    st.sampled_from([512, 120]),
)
@settings(max_examples=12, deadline=None)
def test_a_hundredfold_load_gets_no_more_than_its_share(
    weights: tuple[float, float], seed: int, blocks: int
) -> None:
    c = crowd(blocks_total=blocks)
    chance = random.Random(seed)

    def one(tenant: str) -> None:
        weight = dict(zip("ab", weights, strict=True))[tenant]
        c.add(tenant, chance.randint(1, 40), chance.randint(1, 30), weight=weight)

    for step in range(500):
        if step == 100:  # both have begun; from here on it is measured
            c.served.clear()
        while c.live["b"] < 12:  # a little more than can run at once
            one("b")
        while c.live["a"] < 1200:
            one("a")
        c.step()
    share = c.served["b"] / (c.served["a"] + c.served["b"])
    assert share == pytest.approx(weights[1] / sum(weights), rel=0.1)


def test_who_is_alone_gets_everything() -> None:
    c = crowd()
    for _ in range(20):
        c.add("a", 10, 10)
    for _ in range(3):
        assert c.step().tokens == 64 or len(c.scheduler.running) == 8


@pytest.mark.parametrize("answer", [20, 400])
def test_a_quiet_tenant_waits_little_whatever_runs(answer: int) -> None:
    c = crowd(max_batch_sequences=4)
    for _ in range(300):
        c.add("loud", 30, answer)
    for _ in range(50):
        c.step()
    waits = []
    for _ in range(10):
        quiet = c.add("quiet", 20, 2)
        began = c.steps
        while quiet.status is not Status.FINISHED:
            c.step()
        waits.append(c.steps - began)
    # A full step, its own tokens and the victim's, at four answer tokens of cost 2 per step.
    assert max(waits) <= (64 + 20 + 430) / (4 * ANSWER_TOKEN_COST) + 3, waits


def test_a_long_prompt_of_one_tenant_does_not_hold_up_another() -> None:
    c = crowd(max_model_len=4096, blocks_total=2048)
    c.add("long", 4000, 1)
    c.step()
    short = c.add("short", 10, 1)
    c.step()
    c.step()
    assert short.status is Status.FINISHED


def test_absence_saves_nothing_up() -> None:
    c = crowd(max_batch_sequences=2)
    for _ in range(40):
        c.add("a", 10, 10)
    first = c.add("b", 10, 1)
    while first.status is not Status.FINISHED:
        c.step()
    for _ in range(60):
        c.step()
    for _ in range(40):
        c.add("b", 10, 10)
    c.served.clear()
    for _ in range(100):
        c.step()
    assert c.served["b"] / c.served.total() == pytest.approx(0.5, rel=0.15)


def test_what_is_computed_again_is_not_charged_again() -> None:
    c = crowd(blocks_total=16, max_batch_sequences=4)
    for number in range(4):
        c.add("a" if number % 2 else "b", 8, 40)
    c.finish(within=2000)
    assert c.scheduler.preemptions > 0
    assert c.served == {"a": 2 * (8 + 2 * 40), "b": 2 * (8 + 2 * 40)}


def test_the_counters_of_many_tenants_are_forgotten() -> None:
    lines = Lines()
    keep = Sequence(0, "0", (1,), Sampling(), 2, tenant="steady")
    lines.enter(keep)
    for number in range(1, 5000):
        one = Sequence(number, str(number), (1,), Sampling(), 2, tenant=str(number))
        one.arrival = number
        lines.enter(one)
        lines.leave(one, waiting=True)
    assert len(lines._tenants) < 1100
    assert [s.tenant for s in lines] == ["steady"]


# Priorities


def test_a_higher_priority_goes_first_and_takes_a_place() -> None:
    c = crowd(max_batch_sequences=2)
    low = [c.add("a", 10, 20) for _ in range(4)]
    c.step()
    high = c.add("b", 10, 5, priority=3)
    c.step()
    assert high.status is Status.RUNNING
    assert [one.status for one in low] == [
        Status.RUNNING,
        Status.WAITING,
        Status.WAITING,
        Status.WAITING,
    ]
    c.finish(within=500)
    assert c.finished[0] is high
    assert [len(one.outputs) for one in low] == [20] * 4


def test_a_higher_priority_takes_the_cache_it_needs_but_no_more() -> None:
    c = crowd(blocks_total=40, max_model_len=200)
    low = [c.add("a", 30, 30) for _ in range(4)]
    for _ in range(4):
        c.step()
    high = c.add("b", 60, 4, priority=1)
    c.step()
    assert high.status is Status.RUNNING
    assert 0 < sum(one.status is Status.WAITING for one in low) < 4
    c.finish(within=500)


def begun_elsewhere(one: Crowd, tenant: str) -> Sequence:
    """An answer of which another engine made five tokens."""
    return one.add(tenant, 20, 10, outputs=[7] * 5)


@pytest.mark.parametrize("tenant", ["mine", "other"])
def test_an_answer_begun_elsewhere_goes_before_those_that_nobody_began(tenant: str) -> None:
    """Its client waits for the next token, others for their first."""
    one = crowd(max_batch_sequences=4)
    for _ in range(40):
        one.add("mine", 64, 8)
    for _ in range(3):
        one.step()
    resumed = begun_elsewhere(one, tenant)
    one.finish(within=2000)
    before = one.finished.index(resumed)
    assert before <= 2 * 4  # those that ran when it came, and who ran beside it


def test_an_answer_begun_elsewhere_does_not_wait_for_a_long_prompt() -> None:
    one = crowd(max_batch_sequences=4, max_batch_tokens=16)
    one.add("mine", 160, 1)
    one.step()
    resumed = begun_elsewhere(one, "mine")
    one.step()
    one.step()
    assert resumed.remaining == 1  # decodes


def test_who_gave_way_goes_before_nobody() -> None:
    one = crowd(max_batch_sequences=4)
    resumed = begun_elsewhere(one, "mine")
    one.step()
    assert resumed.status is Status.RUNNING
    one.scheduler.waiting.wait(resumed)
    assert not resumed.resumed
    one.scheduler.waiting.start(resumed)
    one.finish(within=100)


@given(
    places=st.integers(1, 4),
    tenants=st.lists(st.sampled_from("abc"), min_size=1, max_size=4),
    answers=st.lists(st.integers(6, 40), min_size=1, max_size=4),
    pause=st.sampled_from([0, 0, 2, 16, PROMOTION_STEPS]),
    alone=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_answers_begun_elsewhere_hold_up_nobody_for_ever(
    places: int, tenants: list[str], answers: list[int], pause: int, alone: int
) -> None:
    """One of them enters with every step; with ``pause`` none does whenever so many have passed."""
    one = crowd(max_batch_sequences=places)

    def another() -> None:
        if pause == 0 or one.steps % pause:
            tenant, answer = (of[one.made % len(of)] for of in (tenants, answers))
            one.add(tenant, 8, answer, outputs=[7] * 5)

    for _ in range(10 + alone):
        another()
        if one.scheduler.has_work:
            one.step()
    plain = one.add("a", 8, 4)
    began = one.steps
    while plain.status is Status.WAITING:
        another()
        one.step()
        assert one.steps - began <= 4 * PROMOTION_STEPS


def test_equals_take_nothing_from_each_other() -> None:
    c = crowd(max_batch_sequences=2)
    running = [c.add("a", 5, 20, priority=5) for _ in range(2)]
    c.step()
    c.add("b", 5, 5, priority=5)
    for _ in range(10):
        c.step()
    assert all(one.status is Status.RUNNING for one in running)


def test_the_lowest_priority_does_not_starve() -> None:
    c = crowd(max_batch_sequences=2)
    low = c.add("a", 10, 5, priority=-50)
    while low.status is not Status.FINISHED:
        while len(c.scheduler.waiting) < 5:
            c.add("b", 10, 8, priority=50)
        c.step()
        assert c.steps < 4 * PROMOTION_STEPS
    assert c.steps > PROMOTION_STEPS / 2


def test_a_backlog_of_low_priority_leaves_the_high_one_most_of_the_machine() -> None:
    c = crowd(max_batch_sequences=2)
    for _ in range(200):
        c.add("a", 10, 10, priority=-1)
    waits = []
    for _ in range(60):
        high = c.add("a", 10, 5, priority=1)
        began = c.steps
        while high.status is not Status.FINISHED:
            c.step()
        waits.append(c.steps - began)
    assert sorted(waits)[50] <= 8, waits
    assert any(one.priority < 0 for one in c.finished)


# Sizes


def test_a_large_one_is_passed_by_no_tenant_for_ever() -> None:
    c = crowd(blocks_total=32, max_model_len=128, max_batch_sequences=6)
    for _ in range(6):
        c.add("small", 8, 8)
    c.step()
    large = c.add("large", 110, 4)
    passed = 0
    while large.status is not Status.FINISHED:
        c.add("small", 8, 8)
        c.step()
        passed += large.status is Status.WAITING
        assert c.steps < 400
    assert large.overtaken <= MAX_BYPASSES + 6


def test_a_tenant_of_large_ones_does_not_shut_another_out() -> None:
    c = crowd(blocks_total=32, max_model_len=128, max_batch_sequences=6)
    for _ in range(30):
        c.add("large", 100, 20)
    for _ in range(20):
        c.step()
    c.served.clear()
    for _ in range(600):
        while c.live["small"] < 6:
            c.add("small", 4, 8)
        while c.live["large"] < 30:
            c.add("large", 100, 20)
        c.step()
    assert c.served["small"] > 0.3 * c.served.total()
    assert c.served["large"] > 0.3 * c.served.total()


@dataclass(frozen=True)
class Arrival:
    tenant: str
    prompt: int
    answer: int
    step: int
    priority: int
    weight: float


arrivals = st.builds(
    Arrival,
    tenant=st.sampled_from("abc"),
    prompt=st.one_of(st.integers(1, 8), st.integers(20, 90)),
    answer=st.one_of(st.integers(1, 8), st.integers(20, 90)),
    step=st.integers(0, 30),
    priority=st.sampled_from([0, 0, 0, -1, 2]),
    weight=st.sampled_from([0.001, 1.0, 1.0, 7.5, 1000.0]),
)
bounds = st.builds(
    Limits,
    max_model_len=st.integers(16, 128),
    block_size=st.integers(1, 5),
    blocks_total=st.integers(4, 40),
    max_batch_tokens=st.integers(1, 24),
    max_batch_sequences=st.integers(1, 6),
)


@given(bounds, st.lists(arrivals, min_size=3, max_size=14))
@settings(max_examples=150, deadline=None)
def test_everybody_is_served_in_any_crowd(limits: Limits, coming: list[Arrival]) -> None:
    c = Crowd(limits)
    work = 0
    for now in range(31):
        for one in (one for one in coming if one.step == now):
            try:
                c.add(one.tenant, one.prompt, one.answer, priority=one.priority, weight=one.weight)
            except ContextLengthExceeded:
                continue
            work += one.prompt + one.answer
        if c.scheduler.has_work:
            c.step()
            c.scheduler.check_integrity()
    assume(c.made)
    c.finish(within=50 + 10 * work)
    done = {one.sequence_id: one for one in c.finished}
    assert len(done) == len(c.finished)
    for one in done.values():
        assert one.finish_reason is FinishReason.LENGTH
        assert len(one.tokens) == one.token_limit
