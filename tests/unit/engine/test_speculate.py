"""Guessing ahead: what is looked up, when it pauses, and how a step carries it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paged_fake_runner import PagedFakeRunner

from cloudlm.core.chat import Sampling
from cloudlm.core.errors import BadSetting
from cloudlm.engine.limits import Limits
from cloudlm.engine.scheduler import Scheduler
from cloudlm.engine.sequence import Sequence
from cloudlm.engine.speculate import (
    LONGEST_PAUSE_STEPS,
    Drafter,
    Lookup,
    agreed,
    find_continuation,
)
from cloudlm.engine.step import Step

LIMITS = Limits(
    max_model_len=256, block_size=4, blocks_total=64, max_batch_tokens=32, max_batch_sequences=8
)


def naive(tokens: list[int], shortest: int, longest: int) -> int | None:
    """The rule, word for word."""
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for begin in range(len(tokens) - size - 1, -1, -1):
            if tokens[begin : begin + size] == tokens[-size:]:
                return begin + size
    return None


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 4), st.integers(0, 5))
def test_the_longest_then_latest_match_is_found(
    tokens: list[int], shortest: int, more: int
) -> None:
    found = find_continuation(np.array(tokens, dtype=np.int64), shortest, shortest + more)
    assert found == naive(tokens, shortest, shortest + more)


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ([1, 2, 3, 4, 5, 9, 1, 2], (3, 4, 5, 9)),
        ([1, 2, 7, 5, 2, 8, 1, 2], (7, 5, 2, 8)),  # more in common beats later
        ([1, 2, 3, 9, 1, 2, 4, 8, 1, 2], (4, 8, 1, 2)),  # later beats earlier
        ([4, 7, 7, 7], (7, 7, 7, 7)),  # copied from the copy
        ([5, 1, 2, 1, 2], (1, 2, 1, 2)),
        ([1, 2, 3, 9, 2], ()),  # one token in common is too few
        ([1], ()),
        ([], ()),
    ],
)
def test_a_draft_is_what_followed_before(text: list[int], draft: tuple[int, ...]) -> None:
    assert Drafter(Lookup(4, 2, 3)).propose(text, 10) == draft
    assert Drafter(Lookup(4, 2, 3)).propose(text, 2) == draft[:2]


def test_the_text_may_grow_beyond_any_buffer() -> None:
    drafter, text = Drafter(Lookup(3, 2, 2)), [1, 2, 3, 4]
    for at in range(5, 2000):
        text.append(at)
        assert drafter.propose(text, 9) == ()
    assert drafter.propose([*text, 1, 2], 9) == (3, 4, 5)


def test_drafts_grow_while_right_and_shrink_to_what_was_right() -> None:
    drafter, text = Drafter(Lookup(8, 1, 1)), [7, 7]
    lengths = []
    for accepted in [8, 3, 4, 8, 1, 2, 4]:
        lengths.append(len(drafter.propose(text, 99)))
        drafter.judge(lengths[-1], min(accepted, lengths[-1]))
    assert lengths == [8, 8, 4, 8, 8, 2, 4]


def test_who_is_never_right_hardly_ever_guesses() -> None:
    drafter, text, guessed = Drafter(Lookup(8, 1, 1)), [7, 7], 0
    for _ in range(1000):
        draft = drafter.propose(text, 8)
        if draft:
            guessed += len(draft)
            drafter.judge(len(draft), 0)
    assert 0 < guessed <= 8 + 1000 / LONGEST_PAUSE_STEPS + 8
    while not drafter.propose(text, 8):
        pass
    drafter.judge(1, 1)  # right once: it goes on at once
    assert drafter.propose(text, 8)


def test_agreement_ends_at_the_first_difference() -> None:
    assert agreed((1, 2, 3), [1, 2, 3, 4]) == 3
    assert agreed((1, 2, 3), [1, 9, 3, 4]) == 1
    assert agreed((), [5]) == 0


@pytest.mark.parametrize(
    ("values", "name"),
    [((0, 1, 1), "num_speculative_tokens"), ((1, 0, 1), "lookup_min"), ((1, 3, 2), "lookup_min")],
)
def test_lookups_that_cannot_be_are_refused(values: tuple[int, int, int], name: str) -> None:
    with pytest.raises(BadSetting, match=name):
        Lookup(*values)


# In the scheduler


def ask(number: int, prompt: tuple[int, ...], count: int, **more: Any) -> Sequence:
    limit = LIMITS.total_tokens(len(prompt), count)
    return Sequence(number, f"r{number}", prompt, Sampling(max_tokens=count), limit, **more)


class Parrot(PagedFakeRunner):
    """Says one period again and again, wherever it is in it."""

    period = (3, 1, 4, 1, 5)

    def _next(self, tokens: list[int], index: int) -> int:
        return self.period[len(tokens) % len(self.period)]


def run(scheduler: Scheduler, runner: PagedFakeRunner) -> list[Step]:
    steps = []
    while scheduler.has_work:
        steps.append(scheduler.schedule())
        assert steps[-1].tokens <= scheduler.limits.max_batch_tokens
        scheduler.apply(runner.run(steps[-1]))
        scheduler.check_integrity()
    assert scheduler.pool.free_blocks == scheduler.pool.blocks_total
    return steps


def test_right_guesses_save_steps_and_are_counted() -> None:
    scheduler, runner = Scheduler(LIMITS, Lookup(4, 2, 3)), Parrot(max_model_len=256)
    one = ask(1, Parrot.period * 2, 40)
    scheduler.add(one)
    steps = run(scheduler, runner)
    assert one.outputs == list(Parrot.period * 8)
    assert len(steps) == 1 + 8  # five tokens a step, behind the prompt's
    drafts = scheduler.drafts
    assert drafts.drafted_tokens == drafts.accepted_tokens == 40 - len(steps)
    assert drafts.drafts == 8


def test_a_draft_never_passes_the_end_of_the_answer() -> None:
    for count in range(1, 12):
        scheduler, runner = Scheduler(LIMITS, Lookup(9, 2, 3)), Parrot(max_model_len=256)
        one = ask(1, Parrot.period * 2, count)
        scheduler.add(one)
        for step in run(scheduler, runner):
            assert all(c.start + len(c.token_ids) < one.token_limit for c in step.chunks)
        assert len(one.outputs) == count


def test_nothing_behind_an_end_token_is_taken() -> None:
    scheduler, runner = Scheduler(LIMITS, Lookup(8, 2, 3)), Parrot(max_model_len=256)
    one = ask(1, Parrot.period * 2, 40, end_token_ids=frozenset({4}))
    scheduler.add(one)
    run(scheduler, runner)
    assert one.outputs == [3, 1, 4]


def test_who_asks_not_to_be_guessed_is_not() -> None:
    scheduler, runner = Scheduler(LIMITS, Lookup(8, 2, 3)), Parrot(max_model_len=256)
    one = ask(1, Parrot.period * 2, 20)
    scheduler.add(one, drafts=False)
    assert len(run(scheduler, runner)) == 20
    assert scheduler.drafts.drafted_tokens == 0


def test_drafts_get_what_prompts_leave() -> None:
    scheduler, runner = Scheduler(LIMITS, Lookup(8, 2, 3)), Parrot(max_model_len=256)
    scheduler.add(ask(1, Parrot.period * 2, 60))
    scheduler.apply(runner.run(scheduler.schedule()))
    scheduler.add(ask(2, tuple(1 + at % 9 for at in range(90)), 2))
    sizes = [[len(c.token_ids) for c in step.chunks] for step in run(scheduler, runner)]
    assert sizes[:3] == [[1, 31], [1, 31], [4, 28]]  # 32 tokens at most


def test_drafts_take_no_block_that_others_may_need() -> None:
    limits = Limits(
        max_model_len=64, block_size=4, blocks_total=8, max_batch_tokens=64, max_batch_sequences=4
    )
    scheduler = Scheduler(limits, Lookup(8, 2, 3))
    runner = Parrot(num_blocks=8, max_model_len=64)
    ones = [ask(number, Parrot.period * 2, 6) for number in range(2)]
    for one in ones:
        one.salt = runner.salts[one.sequence_id] = str(one.sequence_id)
        scheduler.add(one)
    run(scheduler, runner)
    assert scheduler.preemptions == 0
    assert all(one.outputs == [3, 1, 4, 1, 5, 3] for one in ones)


def test_cancelled_during_its_step_a_draft_leaves_nothing() -> None:
    scheduler, runner = Scheduler(LIMITS, Lookup(4, 2, 3)), Parrot(max_model_len=256)
    scheduler.add(ask(1, Parrot.period * 2, 40))
    scheduler.apply(runner.run(scheduler.schedule()))
    step = scheduler.schedule()
    assert step.chunks[0].drafts == 4
    sampled = runner.run(step)
    scheduler.cancel(1)
    assert scheduler.apply(sampled) == []
    assert scheduler.pool.free_blocks == scheduler.pool.blocks_total


def test_no_rejected_token_is_ever_found_in_the_prefix_cache() -> None:
    """What was published must be what was written: the runner checks every reuse."""
    chance = random.Random(4)
    limits = Limits(
        max_model_len=128, block_size=2, blocks_total=60, max_batch_tokens=40, max_batch_sequences=4
    )
    runner = PagedFakeRunner(
        num_blocks=60, block_size=2, vocab_size=6, max_model_len=128, recalls=2
    )
    scheduler = Scheduler(limits, Lookup(6, 1, 3))
    ended: list[Sequence] = []
    for number in range(60):
        source = chance.choice(ended).tokens if ended and number % 2 else [1, 2, 3, 1, 2]
        prompt = tuple(source[: chance.randint(3, 60)])
        one = ask(number, prompt, chance.randint(1, 60))
        one.token_limit = limits.total_tokens(len(prompt), one.sampling.max_tokens)
        scheduler.add(one)
        ended.append(one)
        if number % 3 == 0:
            run(scheduler, runner)
    run(scheduler, runner)
    for one in ended:
        assert one.outputs == runner.answer(one.prompt, one.sampling.max_tokens or 0)
    assert scheduler.prefix_hits > 0
    assert 0 < scheduler.drafts.accepted_tokens < scheduler.drafts.drafted_tokens
