"""One request that does not fit: it holds nobody up for long, and nobody passes it for ever."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_crowd import Crowd, crowd
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.engine.fairness import HOLD_STEPS, MAX_BYPASSES
from cloudlm.engine.sequence import Sequence, Status

LONGEST_WAIT = HOLD_STEPS + 4  # steps: to be held up, and to be admitted


def blocked(one: Crowd, answer: int = 900) -> tuple[Sequence, Sequence]:
    """A long answer, and a large prompt of the same tenant that does not fit beside it."""
    long = one.add("mine", 8, answer)
    for _ in range(140):
        one.step()
    large = one.add("mine", 900, 4)
    return long, large


def room() -> Crowd:
    """A cache of 1,024 tokens."""
    return crowd(max_model_len=1024, blocks_total=256)


def waits(one: Crowd, steps: int, come: Callable[[int], list[Sequence]]) -> list[int]:
    """For so many steps new ones come; how many steps each waited until it began."""
    waited: dict[int, int] = {}
    pending: dict[Sequence, int] = {}
    for step in range(steps):
        for new in come(step):
            waited[new.sequence_id] = steps - step
            pending[new] = step
        one.step()
        for new in [new for new in pending if new.status is not Status.WAITING]:
            waited[new.sequence_id] = step - pending.pop(new)
    return list(waited.values())


@pytest.mark.parametrize(("tenant", "priority"), [("mine", 0), ("other", 0), ("other", 100)])
def test_who_fits_is_not_held_up_until_a_long_answer_ends(tenant: str, priority: int) -> None:
    one = room()
    long, large = blocked(one)
    waited = waits(one, 400, lambda _: [one.add(tenant, 8, 4, priority=priority)])
    assert long.status is Status.RUNNING
    assert large.overtaken > MAX_BYPASSES or priority > 0
    assert max(waited) <= LONGEST_WAIT


def test_a_higher_priority_is_not_held_up_at_all() -> None:
    one = room()
    blocked(one)
    waits(one, 20, lambda _: [one.add("other", 8, 4)])  # the large one is overdue now
    assert waits(one, 20, lambda _: [one.add("third", 8, 4, priority=1)]) == [0] * 20


def test_to_come_again_and_again_holds_nobody_up_again() -> None:
    """Who blocks, gives up and comes anew has no more steps to hold others up."""
    one = room()
    _, large = blocked(one)
    for turn in range(8):
        waited = waits(one, 45, lambda _: [one.add("other", 8, 4)])
        assert turn < 5 or max(waited) <= 4
        one.scheduler.cancel(large.sequence_id)
        large = one.add("mine", 900, 4)


def test_a_place_is_still_taken_for_others_while_one_is_blocked() -> None:
    """Priorities and shares are asked behind the blocked one too."""
    one = crowd(max_model_len=1024, blocks_total=256, max_batch_sequences=4)
    blocked(one)
    waits(one, 200, lambda step: [one.add("other", 8, 2)] if step % 2 else [])
    for _ in range(3):
        one.add("other", 8, 200, priority=-1)
    for _ in range(10):
        one.step()
    assert len(one.scheduler.running) == 4
    assert waits(one, 10, lambda step: [one.add("mine", 8, 4)] if step == 0 else []) == [0]


@pytest.mark.parametrize("shared", [0, 8], ids=["apart", "shared prefix"])
@pytest.mark.parametrize("prompt", [900, 1010])
def test_those_that_passed_it_give_way_in_the_end(shared: int, prompt: int) -> None:
    """Answers that run for long and follow upon each other would keep it out for ever."""
    one = room()
    first = one.add("other", 8, 100)
    large = one.add("mine", prompt, 4)

    def come(step: int) -> list[Sequence]:
        return [] if step % 16 else [one.add("other", 8, 100, common=shared)]

    waited = waits(one, 12 * HOLD_STEPS, come)
    assert first.status is large.status is Status.FINISHED
    assert max(waited) < 6 * HOLD_STEPS
    one.finish(within=20_000)


@given(
    large=st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(800, 1000)), min_size=1, max_size=3
    ),
    small=st.lists(
        st.tuples(
            st.sampled_from("abcd"), st.integers(-1, 1), st.integers(1, 12), st.integers(1, 9)
        ),
        min_size=1,
        max_size=4,
    ),
    every=st.integers(2, 5),
)
@settings(max_examples=15, deadline=None)
def test_no_one_that_does_not_fit_puts_anybody_off_for_long(
    large: list[tuple[str, int]], small: list[tuple[str, int, int, int]], every: int
) -> None:
    """However small ones come that all fit: so many steps for each tenant whose request is blocked,
    and the blocked ones themselves begin when the long answer has ended."""
    one = room()
    long, _ = blocked(one, answer=700)
    stuck = [one.add(tenant, prompt, 2) for tenant, prompt in large]
    tenants = {"mine", *(tenant for tenant, _ in large)}

    def come(step: int) -> list[Sequence]:
        if step % every:
            return []
        tenant, priority, prompt, answer = small[step // every % len(small)]
        return [one.add(tenant, prompt, answer, priority=priority)]

    waited = waits(one, 500, come)
    assert long.status is Status.RUNNING
    assert max(waited) <= len(tenants) * LONGEST_WAIT
    while any(each.status is not Status.FINISHED for each in stuck):
        come(one.steps)
        one.step()
        one.scheduler.check_integrity()
        assert one.steps < 6000, "passed for ever"
    one.finish(within=9000)
