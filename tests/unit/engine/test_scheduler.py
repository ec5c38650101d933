"""The scheduler: whatever arrives, everything accepted ends, with the tokens it has alone.

The fake runner keeps a cache and refuses a chunk whose blocks do not hold its own beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st
from paged_fake_runner import PagedFakeRunner

from cloudlm.core.chat import FinishReason, Sampling
from cloudlm.core.errors import BadSetting, ContextLengthExceeded, InvalidRequest
from cloudlm.engine.fairness import MAX_BYPASSES
from cloudlm.engine.limits import Limits
from cloudlm.engine.scheduler import Advance, Scheduler
from cloudlm.engine.sequence import Sequence, Status
from cloudlm.engine.speculate import Lookup
from cloudlm.engine.step import Step

VOCAB = 32
END = frozenset({0})


def limits(**given_limits: int) -> Limits:
    values = {
        "max_model_len": 64,
        "block_size": 4,
        "blocks_total": 32,
        "max_batch_tokens": 16,
        "max_batch_sequences": 8,
    }
    return Limits(**{**values, **given_limits})


@dataclass
class Bench:
    """A scheduler with its fake runner."""

    scheduler: Scheduler
    runner: PagedFakeRunner
    steps: int = 0
    advances: list[Advance] = field(default_factory=list)

    def add(self, sequence_id: int, prompt: tuple[int, ...], max_tokens: int | None, **more: Any):
        sequence = Sequence(
            sequence_id=sequence_id,
            request_id=f"r{sequence_id}",
            prompt=prompt,
            sampling=Sampling(max_tokens=max_tokens),
            token_limit=self.scheduler.limits.total_tokens(len(prompt), max_tokens),
            **more,
        )
        self.runner.salts[sequence_id] = sequence.salt
        if sequence.ended_by_tokens() is None:
            self.scheduler.add(sequence)
        return sequence

    def step(self) -> Step:
        step = self.scheduler.schedule()
        assert step.chunks, "work, but no step"
        assert step.tokens <= self.scheduler.limits.max_batch_tokens
        assert len(step.chunks) <= self.scheduler.limits.max_batch_sequences
        assert all(chunk.token_ids for chunk in step.chunks)
        self.advances += self.scheduler.apply(self.runner.run(step))
        self.scheduler.check_integrity()
        self.steps += 1
        return step

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.step()
        assert self.scheduler.pool.free_blocks == self.scheduler.pool.blocks_total
        self.scheduler.check_integrity()


@pytest.fixture
def bench() -> Callable[..., Bench]:
    def make(**given_limits: int) -> Bench:
        return make_bench(limits(**given_limits))

    return make


def make_bench(bounds: Limits, lookup: Lookup | None = None) -> Bench:
    """With ``lookup`` the text is such that guesses are often right."""
    runner = PagedFakeRunner(
        num_blocks=bounds.blocks_total,
        block_size=bounds.block_size,
        vocab_size=VOCAB if lookup is None else 6,
        recalls=None if lookup is None else 2,
    )
    return Bench(Scheduler(bounds, lookup), runner)


# What fits


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "total"),
    [(5, 3, 8), (5, None, 20), (5, 1000, 20), (19, 1, 20), (20, 0, 20), (5, 0, 5)],
)
def test_length_is_bounded_by_the_context(prompt: int, max_tokens: int | None, total: int) -> None:
    assert limits(max_model_len=20).total_tokens(prompt, max_tokens) == total


def test_an_open_answer_ends_with_the_cache() -> None:
    assert limits(blocks_total=3).total_tokens(5, None) == 12


@pytest.mark.parametrize(("prompt", "max_tokens"), [(21, 0), (20, None), (20, 1), (5000, None)])
def test_a_prompt_that_leaves_no_room_is_refused(prompt: int, max_tokens: int | None) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        limits(max_model_len=20).total_tokens(prompt, max_tokens)
    assert "20 tokens" in caught.value.message
    assert str(prompt) in caught.value.message


@pytest.mark.promise(21)
@pytest.mark.known_failure("vllm#39734")
@pytest.mark.parametrize(("prompt", "max_tokens"), [(12, None), (13, 0), (5, 8), (12, 1)])
def test_what_could_outgrow_the_cache_is_refused(prompt: int, max_tokens: int | None) -> None:
    with pytest.raises(ContextLengthExceeded, match="cache holds 12"):
        limits(blocks_total=3).total_tokens(prompt, max_tokens)


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="max_tokens = -1"):
        limits().total_tokens(5, -1)


@pytest.mark.parametrize("name", list(Limits.__slots__))
def test_limits_below_one_are_refused(name: str) -> None:
    with pytest.raises(BadSetting, match=name):
        limits(**{name: 0})


# Batching


def test_decoding_comes_first_and_prompts_fill_the_budget(bench: Any) -> None:
    b = bench(max_batch_tokens=6)
    b.add(1, (1, 2), 8)
    assert [len(c.token_ids) for c in b.step().chunks] == [2]
    b.add(2, tuple(range(1, 8)) * 2, 3)
    b.add(3, (3,), 3)
    assert [(c.sequence_id, len(c.token_ids), c.samples) for c in b.step().chunks] == [
        (1, 1, True),
        (2, 5, False),
    ]
    assert [(c.sequence_id, c.start) for c in b.step().chunks] == [(1, 3), (2, 5)]
    assert [(c.sequence_id, len(c.token_ids), c.samples) for c in b.step().chunks] == [
        (1, 1, True),
        (2, 4, True),
        (3, 1, True),
    ]
    b.finish()


def test_no_more_sequences_run_than_asked(bench: Any) -> None:
    b = bench(max_batch_sequences=2)
    for one in range(5):
        b.add(one, (one + 1,), 3)
    b.step()
    assert len(b.scheduler.running) == 2
    b.finish()


def test_a_budget_smaller_than_the_batch_still_serves_all(bench: Any) -> None:
    b = bench(max_batch_tokens=1, max_batch_sequences=8)
    for one in range(3):
        b.add(one, (one + 1, 2, 3), 3, end_token_ids=frozenset())
    b.finish()
    assert b.steps == 15  # 3 × (3 prompt + 2 decode) tokens, one per step


def test_sampled_tokens_and_reasons_are_reported(bench: Any) -> None:
    b = bench()
    one = b.add(1, (1, 2, 3), 2)
    b.finish()
    assert [a.sampled.token_id for a in b.advances] == one.outputs
    assert [a.finish_reason for a in b.advances] == [None, FinishReason.LENGTH]
    assert one.status is Status.FINISHED
    assert one.block_table == []


def test_prompt_scores_are_asked_for_every_position_even_if_cached(bench: Any) -> None:
    b = bench(max_batch_tokens=4)
    prompt = (1, 2, 3, 4, 5, 6, 7, 1, 2)
    b.add(1, prompt, 1)
    b.finish()
    b.advances.clear()
    scored = b.add(2, prompt, 0, prompt_logprobs=True)
    b.finish()
    values = [lp for a in b.advances for lp, _ in a.sampled.prompt_logprobs]
    assert values == [-float(token) for token in prompt[1:]]
    assert scored.finish_reason is FinishReason.LENGTH
    assert scored.outputs == []
    assert scored.cached_tokens == 0


# Prefix reuse


def test_a_known_prefix_is_not_computed_again_but_the_last_token_is(bench: Any) -> None:
    b = bench()
    prompt = (1, 2, 3, 4, 5, 6, 7, 1)  # two full blocks
    first = b.add(1, prompt, 1)
    b.finish()
    second = b.add(2, prompt, 1)
    assert [(c.start, len(c.token_ids)) for c in b.step().chunks] == [(4, 4)]
    assert second.cached_tokens == 4
    assert second.outputs == first.outputs
    longer = b.add(3, (*prompt, 5), 1)
    assert [(c.start, len(c.token_ids)) for c in b.step().chunks] == [(8, 1)]
    assert longer.cached_tokens == 8
    assert (b.scheduler.prefix_hits, b.scheduler.prefix_queries) == (12, 25)


def test_a_generated_answer_is_reused_by_the_next_turn(bench: Any) -> None:
    b = bench()
    first = b.add(1, (1, 2, 3), 6, end_token_ids=frozenset())
    b.finish()
    assert len(first.tokens) == 9
    second = b.add(2, (*first.tokens, 5, 6), 1)
    b.finish()
    assert second.cached_tokens == 8


@pytest.mark.promise(7, 39)
@pytest.mark.known_failure("CVE-2025-46570")
def test_tenants_share_nothing(bench: Any) -> None:
    b = bench()
    prompt = (1, 2, 3, 4, 5, 6, 7, 1, 2)
    b.add(1, prompt, 1, salt="a")
    b.finish()
    other = b.add(2, prompt, 1, salt="b")
    b.finish()
    same = b.add(3, prompt, 1, salt="a")
    b.finish()
    assert (other.cached_tokens, same.cached_tokens) == (0, 8)


@pytest.mark.parametrize("budget", [8, 12, 64])
def test_a_cold_prefix_is_computed_once_for_all_choices(bench: Any, budget: int) -> None:
    b = bench(max_batch_tokens=budget)
    prompt = tuple(1 + i % 7 for i in range(33))
    choices = [b.add(i, prompt, 1, index=i, end_token_ids=frozenset()) for i in range(4)]
    stranger = b.add(9, (7, 7), 1, salt="x", end_token_ids=frozenset())
    while choices[0].status is not Status.FINISHED:
        b.step()
    assert stranger.status is Status.FINISHED  # passed those who wait for the prefix
    b.finish()
    assert [one.cached_tokens for one in choices] == [0, 32, 32, 32]
    assert b.runner.computed_tokens == 33 + 3 + 2


def test_who_waits_for_a_prefix_goes_on_when_its_owner_is_cancelled(bench: Any) -> None:
    b = bench(max_batch_tokens=4)
    prompt = tuple(1 + i % 7 for i in range(17))
    b.add(1, prompt, 1)
    b.add(2, prompt, 1)
    b.step()
    b.step()
    assert b.scheduler.cancel(1)
    b.step()
    assert [s.sequence_id for s in b.scheduler.running] == [2]
    b.finish()
    assert b.runner.computed_tokens == 17


def test_other_tenants_do_not_wait_for_a_prefix(bench: Any) -> None:
    b = bench(max_batch_tokens=64)
    prompt = tuple(1 + i % 7 for i in range(17))
    b.add(1, prompt, 2, salt="a", end_token_ids=frozenset())
    b.add(2, prompt, 2, salt="b", end_token_ids=frozenset())
    assert len(b.step().chunks) == 2


# Too little cache


@pytest.mark.promise(21)
def test_the_last_arrived_gives_way_and_ends_with_the_same_tokens(bench: Any) -> None:
    b = bench(blocks_total=6)
    first = b.add(1, (1, 2, 3, 4, 5), 18, end_token_ids=frozenset())
    second = b.add(2, (6, 5, 4), 18, end_token_ids=frozenset())
    b.finish()
    assert b.scheduler.preemptions > 0
    assert first.outputs == b.runner.answer(first.prompt, 18)
    assert second.outputs == b.runner.answer(second.prompt, 18)
    done = [a.sequence.sequence_id for a in b.advances if a.finish_reason]
    assert done == [1, 2]


@pytest.mark.promise(21)
@pytest.mark.known_failure("vllm#31731")
def test_small_ones_pass_a_blocked_big_one_but_not_for_ever(bench: Any) -> None:
    b = bench(blocks_total=8, max_batch_sequences=4)
    b.add(0, (1, 2, 3, 4, 5), 3, end_token_ids=frozenset())
    b.step()
    big = b.add(1, tuple(1 + i % 7 for i in range(30)), 2)
    passed = 0
    for one in range(2, 200):
        b.add(one, (1 + one % 7, 1 + one // 7 % 7, 1 + one // 49), 4, end_token_ids=frozenset())
        b.step()
        if big.cached_tokens is not None:
            break
        passed = sum(a.sequence.sequence_id > 1 for a in b.advances if a.finish_reason)
    assert 0 < passed <= MAX_BYPASSES
    assert big.bypasses <= MAX_BYPASSES
    assert big.cached_tokens is not None
    b.finish()


def test_a_burst_does_not_pass_a_blocked_one_more_often_than_allowed(bench: Any) -> None:
    b = bench(max_model_len=256, blocks_total=60, max_batch_sequences=64, max_batch_tokens=1000)
    b.add(0, (1, 2, 3, 4, 5), 3, end_token_ids=frozenset())
    b.step()
    big = b.add(1, tuple(1 + i % 7 for i in range(234)), 1)
    for one in range(2, 40):
        b.add(one, (1 + one % 7, 1 + one // 7), 1)
    b.step()
    assert big.bypasses == MAX_BYPASSES
    assert len({a.sequence.sequence_id for a in b.advances if a.sequence is not big}) == 17
    b.finish()


def test_a_resumed_sequence_goes_on_as_it_would_have(bench: Any) -> None:
    b = bench()
    whole = b.runner.answer((1, 2, 3), 10)
    for cut in range(10):
        resumed = b.add(cut, (1, 2, 3), 10, outputs=whole[:cut], end_token_ids=frozenset())
        b.finish()
        assert resumed.outputs == whole


# Cancelling


@pytest.mark.promise(2)
def test_cancelling_frees_at_once_wherever_it_stands(bench: Any) -> None:
    b = bench(max_batch_tokens=4, max_batch_sequences=2)
    for one in range(3):
        b.add(one, (one + 1,) * 6, 4, end_token_ids=frozenset())
    b.step()
    for one in range(3):  # in its prompt, waiting, waiting
        assert b.scheduler.cancel(one)
        b.scheduler.check_integrity()
    assert not b.scheduler.cancel(0)
    assert not b.scheduler.has_work
    assert b.scheduler.pool.usage == 0.0


def test_cancelling_while_a_step_runs_drops_its_result(bench: Any) -> None:
    b = bench()
    gone, stays = b.add(1, (1, 2), 4), b.add(2, (3, 4), 4)
    step = b.scheduler.schedule()
    sampled = b.runner.run(step)
    b.scheduler.cancel(1)
    assert [a.sequence for a in b.scheduler.apply(sampled)] == [stays]
    assert gone.outputs == []
    assert gone.finish_reason is FinishReason.ABORT
    b.finish()


# Anything


@dataclass(frozen=True)
class Arrival:
    prompt: tuple[int, ...]
    max_tokens: int | None
    step: int
    salt: str = ""
    resumed: int = 0
    index: int = 0
    scored: bool = False
    cancelled_after: int | None = None


PREFIX = (1, 2, 3, 4, 5, 6, 7, 1, 1, 2, 2, 3, 3, 4, 4, 5)
prompts = st.builds(
    lambda shared, own: PREFIX[:shared] + tuple(own) or (1,),
    st.integers(0, len(PREFIX)),
    st.lists(st.integers(0, 7), max_size=12),
)
arrivals = st.builds(
    Arrival,
    prompt=prompts,
    max_tokens=st.one_of(st.none(), st.integers(0, 24)),
    step=st.integers(0, 6),
    salt=st.sampled_from(["", "", "a"]),
    resumed=st.integers(0, 4),
    index=st.integers(0, 1),
    scored=st.booleans(),
    cancelled_after=st.one_of(st.none(), st.none(), st.integers(0, 8)),
)
bounds = st.builds(
    Limits,
    max_model_len=st.integers(4, 48),
    block_size=st.integers(1, 5),
    blocks_total=st.integers(4, 24),
    max_batch_tokens=st.integers(1, 24),
    max_batch_sequences=st.integers(1, 6),
)


lookups = st.builds(Lookup, st.integers(1, 9), st.integers(1, 2), st.integers(2, 4))


@pytest.mark.promise(21)
@given(bounds, st.lists(arrivals, min_size=3, max_size=10), st.one_of(st.none(), lookups))
@example(
    Limits(48, 1, 24, 1, 6),
    [Arrival((1 + i % 7,) * 3, 20, 0) for i in range(10)],
    None,
)
@example(
    Limits(48, 2, 20, 24, 6),
    [Arrival((1 + i % 5,) * 3, 40, i // 3) for i in range(10)],
    Lookup(5, 1, 3),
)
@settings(max_examples=300, deadline=None)
def test_everything_accepted_ends_with_the_tokens_it_has_alone(
    limit: Limits, coming: list[Arrival], lookup: Lookup | None
) -> None:
    b = make_bench(limit, lookup)
    live: dict[int, tuple[Arrival, Sequence]] = {}
    cancels: dict[int, list[int]] = {}
    bound = 13  # steps until then, whether or not there is work
    for now in range(13):
        for key, one in enumerate(coming):
            if one.step != now:
                continue
            sequence = _submit(b, key, one)
            if sequence is None:
                continue
            live[key] = one, sequence
            bound += 2 * sequence.token_limit
            if one.cancelled_after is not None:
                cancels.setdefault(now + one.cancelled_after, []).append(key)
        _cancel(b, cancels.pop(now, []))
        if b.scheduler.has_work:
            b.step()
    now = 13
    while b.scheduler.has_work or cancels:
        _cancel(b, cancels.pop(now, []))
        if b.scheduler.has_work:
            b.step()
        now += 1
        assert now <= bound, "no end in sight"
    assume(live)
    drafts = b.scheduler.drafts
    event(f"preempted: {b.scheduler.preemptions > 0}, reused: {b.scheduler.prefix_hits > 0}")
    event(f"accepted: {drafts.accepted_tokens > 0}, of all: {drafts.drafted_tokens > 0}")
    assert not drafts._drafters
    assert b.scheduler.pool.free_blocks == limit.blocks_total
    for one, sequence in live.values():
        _check_end(b, one, sequence)


def _submit(b: Bench, key: int, one: Arrival) -> Sequence | None:
    try:
        total = b.scheduler.limits.total_tokens(len(one.prompt), one.max_tokens)
    except ContextLengthExceeded:
        return None
    resumed = b.runner.answer(
        one.prompt, min(one.resumed, total - len(one.prompt)), index=one.index, end_token_ids=END
    )
    return b.add(
        key,
        one.prompt,
        one.max_tokens,
        outputs=resumed,
        salt=one.salt,
        index=one.index,
        prompt_logprobs=one.scored,
        end_token_ids=END,
    )


def _cancel(b: Bench, keys: list[int]) -> None:
    for key in keys:
        b.scheduler.cancel(key)
        b.scheduler.check_integrity()


def _check_end(b: Bench, one: Arrival, sequence: Sequence) -> None:
    room = sequence.token_limit - len(one.prompt)
    alone = b.runner.answer(one.prompt, room, index=one.index, end_token_ids=END)
    if sequence.finish_reason is FinishReason.ABORT:
        assert one.cancelled_after is not None
        assert sequence.outputs == alone[: len(sequence.outputs)]
        return
    assert sequence.outputs == alone
    assert sequence.finish_reason in (None if sequence.arrival < 0 else sequence.ended_by_tokens(),)
