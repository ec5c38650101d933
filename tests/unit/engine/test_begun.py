"""Prompts that have begun: higher priorities do not leave one standing for ever, nor hang on it."""

from __future__ import annotations

import pytest
from engine_crowd import Crowd, crowd
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.engine.fairness import PROMOTION_STEPS
from cloudlm.engine.sequence import Sequence, Status

BUDGET = 16  # tokens in a step


def begun(one: Crowd, prompt: int = 160, common: int = 0, priority: int = -1) -> Sequence:
    """A prompt of low priority of which one step is computed."""
    low = one.add("low", prompt, 1, common=common, priority=priority)
    one.step()
    assert low.computed == BUDGET
    return low


@pytest.mark.parametrize("tenant", ["low", "other"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_begun_prompt_goes_on_whatever_comes_before_it(tenant: str, resumed: bool) -> None:
    one = crowd(max_batch_tokens=BUDGET)
    low = begun(one, priority=0 if resumed else -1)
    while low.status is not Status.FINISHED:
        one.add(tenant, BUDGET - resumed, 2, outputs=[7] * resumed)
        one.step()
        assert one.steps < 3 * PROMOTION_STEPS, "stands still"


def test_a_higher_priority_does_not_hang_on_a_prompt_that_others_keep_waiting() -> None:
    one = crowd(max_batch_tokens=BUDGET)
    low = begun(one, common=64)
    for _ in range(4):
        one.add("other", BUDGET, 1)
        one.step()
    assert low.computed == BUDGET
    high = one.add("low", 80, 1, common=64, priority=5)
    for _ in range(5):  # 64 tokens of its own, for the first 16 are in the cache
        one.add("other", BUDGET, 1)
        one.step()
    assert high.status is Status.FINISHED
    assert high.cached_tokens == BUDGET
    one.finish(within=200)


def test_a_prefix_is_still_waited_for_if_its_owner_is_no_lower() -> None:
    one = crowd(max_batch_tokens=BUDGET)
    begun(one, common=64, priority=0)
    same = one.add("low", 80, 1, common=64)
    lower = one.add("low", 80, 1, common=64, priority=-1)
    one.step()
    assert same.status is lower.status is Status.WAITING
    one.finish(within=100)
    assert same.cached_tokens == lower.cached_tokens == 64


@given(
    low=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 60), st.integers(-3, 0), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    stream=st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(1, 40), st.integers(0, 2), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    places=st.integers(2, 8),
    ahead=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_nobody_gets_nothing_for_long(
    low: list[tuple[str, int, int, bool]],
    stream: list[tuple[str, int, int, bool]],
    places: int,
    ahead: int,
) -> None:
    """Whatever enters with every step: those of old, begun or not, are lifted one after another,
    and have ended after so many steps and those of their own work."""
    one = crowd(max_batch_tokens=BUDGET, max_batch_sequences=places)

    def add(asked: tuple[str, int, int, bool]) -> Sequence:
        tenant, prompt, priority, resumed = asked
        outputs = [7] if resumed else []
        return one.add(tenant, prompt, 2, priority=priority, outputs=outputs)

    old = []
    for asked in low:
        old.append(add(asked))
        for _ in range(ahead):
            one.step() if one.scheduler.has_work else None
    while any(each.status is not Status.FINISHED for each in old):
        if len(one.scheduler.waiting) < 30:
            add(stream[one.steps % len(stream)])
        one.step()
        one.scheduler.check_integrity()
        work = sum(len(each.prompt) // BUDGET + 3 for each in old)
        assert one.steps <= (len(old) + 2) * 3 * PROMOTION_STEPS + work
