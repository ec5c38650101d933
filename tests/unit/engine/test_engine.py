"""The engine's thread and its bridge: events, stops, cancellation, overload, death."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from paged_fake_runner import PagedFakeRunner

from cloudlm.core.chat import FinishReason, Sampling
from cloudlm.core.clock import ManualClock
from cloudlm.core.errors import (
    BadSetting,
    ContextLengthExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
)
from cloudlm.engine.api import Engine, GenerateRequest, TokenEvent
from cloudlm.engine.engine import LocalEngine
from cloudlm.engine.speculate import Lookup
from cloudlm.engine.step import Step

HALF = 24  # the fake's incomplete character: it has text only together with its successor


class Letters:
    """Token 1 is "b", 2 is "c" …; 0 is the end token without text; 24 waits for its successor."""

    def __init__(self) -> None:
        self.broken = False

    def detokenizer(self, prompt_ids: Iterable[int]) -> LettersDetokenizer:
        if self.broken:
            raise ValueError("no such tokenizer")
        return LettersDetokenizer()


class LettersDetokenizer:
    def __init__(self) -> None:
        self._half = False

    def push(self, token_ids: Iterable[int]) -> str:
        text = ""
        for token in token_ids:
            if token == HALF:
                self._half = True
            elif token:
                text += ("~" if self._half else "") + chr(97 + token)
                self._half = False
        return text

    def flush(self) -> str:
        return "?" if self._half else ""


def text_of(tokens: Iterable[int]) -> str:
    detokenizer = LettersDetokenizer()
    return detokenizer.push(tokens) + detokenizer.flush()


class Gate:
    """Lets the runner's steps pass one by one, so that a test decides what happens between."""

    def __init__(self) -> None:
        self._passes = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def __call__(self, step: Step) -> None:
        self.entered.release()
        assert self._passes.acquire(timeout=60)

    def open(self, steps: int = 10_000) -> None:
        self._passes.release(steps)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=60)


@pytest.fixture
def start() -> Callable[..., Any]:
    @asynccontextmanager
    async def starter(
        *,
        before_step: Callable[[Step], None] | None = None,
        max_batch_tokens: int = 16,
        max_batch_sequences: int = 4,
        max_waiting: int = 100,
        lookup: Lookup | None = None,
        **runner_fields: Any,
    ) -> AsyncIterator[tuple[LocalEngine, Any]]:
        runner = PagedFakeRunner(**runner_fields)
        if before_step is not None:
            runner.before_step = before_step
        engine = LocalEngine.start(
            runner,
            Letters(),
            max_batch_tokens=max_batch_tokens,
            max_batch_sequences=max_batch_sequences,
            max_waiting=max_waiting,
            lookup=lookup,
        )
        try:
            yield engine, runner
        finally:
            if isinstance(before_step, Gate):
                before_step.open()
            await engine.close()
            assert runner.closed == 1

    return starter


def request(
    prompt: Iterable[int] = (1, 2, 3), request_id: str = "r", **fields: Any
) -> GenerateRequest:
    rest = {
        key: fields.pop(key)
        for key in ("output_token_ids", "index", "cache_salt", "prompt_logprobs")
        if key in fields
    }
    fields.setdefault("max_tokens", 6)
    return GenerateRequest(request_id, tuple(prompt), Sampling(**fields), **rest)


async def read(stream: AsyncIterator[TokenEvent]) -> list[TokenEvent]:
    async with asyncio.timeout(30):
        return [event async for event in stream]


def tokens(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def text(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


# Answers


async def test_a_sequence_yields_its_tokens_text_and_one_end(start: Any) -> None:
    async with start() as (engine, runner):
        port: Engine = engine
        events = await read(port.submit(request(ignore_eos=True)))
        alone = runner.answer((1, 2, 3), 6)
        assert tokens(events) == alone
        assert text(events) == text_of(alone)
        assert [e.finish_reason for e in events] == [None] * 5 + [FinishReason.LENGTH]


async def test_many_at_once_get_what_each_gets_alone(start: Any) -> None:
    async with start(num_blocks=12, max_batch_tokens=7) as (engine, runner):
        prompts = [(1 + n % 5, 2, *range(1, n % 9 + 2)) for n in range(24)]
        streams = [
            engine.submit(request(p, f"r{n}", ignore_eos=True, max_tokens=20, index=n))
            for n, p in enumerate(prompts)
        ]
        answers = await asyncio.gather(*map(read, streams))
        for n, (prompt, events) in enumerate(zip(prompts, answers, strict=True)):
            assert tokens(events) == runner.answer(prompt, 20, index=n)
        stats = engine.stats()
        assert stats.preemptions > 0
        assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0.0)
        assert stats.generated_tokens == 24 * 20
        assert stats.prompt_tokens == sum(map(len, prompts))
        assert stats.finished == {"length": 24}
        assert stats.steps == len(runner.steps)
        assert stats.busy_since is None


async def test_the_end_token_counts_but_has_no_text(start: Any) -> None:
    async with start() as (engine, runner):
        alone = runner.answer((1, 2, 3), 100, end_token_ids=frozenset({0}))
        assert alone[-1] == 0, "choose another prompt"
        events = await read(engine.submit(request(max_tokens=None)))
        assert tokens(events) == alone
        assert text(events) == text_of(alone[:-1])
        assert events[-1].finish_reason is FinishReason.STOP
        assert events[-1].stop_match is None


async def test_a_stop_token_is_named(start: Any) -> None:
    async with start() as (engine, runner):
        alone = runner.answer((1, 2, 3), 6)
        stop = alone[3]
        cut = alone[: alone.index(stop) + 1]
        events = await read(
            engine.submit(request(stop_token_ids=(stop,), ignore_eos=True, logprobs=0))
        )
        assert tokens(events) == cut
        assert text(events) == text_of(cut[:-1])
        assert (events[-1].finish_reason, events[-1].stop_match) == (FinishReason.STOP, stop)
        assert [lp.token_id for e in events for lp in e.logprobs] == cut


async def test_a_stop_string_over_several_tokens_never_shows(start: Any) -> None:
    async with start() as (engine, runner):
        whole = text_of(runner.answer((1, 2, 3), 12))
        stop = whole[5:8]
        events = await read(
            engine.submit(request(stop=("zzzz", stop), ignore_eos=True, max_tokens=12))
        )
        assert text(events) == whole[: whole.index(stop)]
        assert (events[-1].finish_reason, events[-1].stop_match) == (FinishReason.STOP, stop)
        assert engine.stats().finished == {"stop": 1}
        assert engine.stats().running == 0


async def test_a_stop_string_inside_a_guess_ends_the_answer_there(start: Any) -> None:
    fields = {"recalls": 1, "vocab_size": 4, "eos_token_ids": (), "max_model_len": 120}
    async with start(lookup=Lookup(8, 1, 3), **fields) as (engine, runner):
        whole = text_of(runner.answer((1, 2, 3), 60))
        for at in range(3, len(whole) - 4, 4):
            stop, before = whole[at : at + 4], engine.stats()
            stopped = request(stop=(stop,), ignore_eos=True, max_tokens=60)
            events = await read(engine.submit(stopped))
            assert text(events) == whole[: whole.index(stop)]
            assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)
            assert events[-1].stop_match == stop
            counted = engine.stats().generated_tokens - before.generated_tokens
            assert counted == len(tokens(events))
        assert engine.stats().accepted_tokens > 0
        assert engine.stats().kv_usage == 0.0


async def test_what_was_held_back_comes_with_the_end(start: Any) -> None:
    async with start() as (engine, runner):
        whole = text_of(runner.answer((1, 2, 3), 6))
        events = await read(engine.submit(request(stop=(whole[-2:] + "#",), ignore_eos=True)))
        assert events[-1].text.endswith(whole[-2:])
        assert text(events) == whole


async def test_no_answer_asked_but_the_prompt_scored(start: Any) -> None:
    async with start() as (engine, _):
        prompt = tuple(range(1, 21))
        (event,) = await read(engine.submit(request(prompt, max_tokens=0, prompt_logprobs=True)))
        assert event.finish_reason is FinishReason.LENGTH
        assert event.token_ids == ()
        assert event.prompt_logprobs[0] is None
        assert [lp.token_id for lp in event.prompt_logprobs if lp] == list(prompt[1:])
        assert [lp.logprob for lp in event.prompt_logprobs if lp] == [-float(t) for t in prompt[1:]]
        (event,) = await read(engine.submit(request(prompt, max_tokens=0)))
        assert (event.finish_reason, event.token_ids) == (FinishReason.LENGTH, ())


async def test_prompt_scores_come_once_with_the_first_token(start: Any) -> None:
    async with start(max_batch_tokens=2) as (engine, _):
        events = await read(engine.submit(request(prompt_logprobs=True, ignore_eos=True)))
        assert [len(e.prompt_logprobs) for e in events] == [3, 0, 0, 0, 0, 0]


async def test_the_answer_ends_with_the_context(start: Any) -> None:
    async with start(max_model_len=10) as (engine, _):
        for max_tokens in (None, 500):
            events = await read(engine.submit(request(max_tokens=max_tokens, ignore_eos=True)))
            assert len(tokens(events)) == 7
            assert events[-1].finish_reason is FinishReason.LENGTH


async def test_cached_tokens_are_reported(start: Any) -> None:
    async with start() as (engine, _):
        prompt = range(1, 11)
        await read(engine.submit(request(prompt, cache_salt="a")))
        again = await read(engine.submit(request(prompt, cache_salt="a")))
        other = await read(engine.submit(request(prompt, cache_salt="\ud800")))
        assert {e.cached_tokens for e in again} == {8}
        assert {e.cached_tokens for e in other} == {0}
        assert engine.stats().prefix_hits == 8


# Resume


@pytest.mark.promise(1)
async def test_resumed_anywhere_the_rest_is_the_same(start: Any) -> None:
    async with start() as (engine, runner):
        whole = runner.answer((1, 2, 3), 30)
        shown = text_of(whole)
        fields = {"ignore_eos": True, "max_tokens": 30, "stop": (shown[-4:] + "#", shown[9:11])}
        full = await read(engine.submit(request(**fields)))
        for cut in range(1, len(tokens(full))):
            before = text(full[:cut])
            rest = await read(engine.submit(request(**fields, output_token_ids=tuple(whole[:cut]))))
            assert tokens(rest) == tokens(full)[cut:]
            assert before + text(rest) == text(full)
            assert rest[-1].stop_match == full[-1].stop_match == shown[9:11]


async def test_resumed_when_complete_it_only_ends(start: Any) -> None:
    async with start() as (engine, runner):
        whole = runner.answer((1, 2, 3), 6)
        (event,) = await read(
            engine.submit(request(ignore_eos=True, output_token_ids=tuple(whole)))
        )
        assert (event.token_ids, event.finish_reason) == ((), FinishReason.LENGTH)
        (event,) = await read(engine.submit(request(output_token_ids=(4, 0))))
        assert (event.finish_reason, event.stop_match) == (FinishReason.STOP, None)
        (event,) = await read(engine.submit(request(output_token_ids=(4, 5), stop_token_ids=(5,))))
        assert (event.finish_reason, event.stop_match) == (FinishReason.STOP, 5)
        resumed = request(output_token_ids=(4, 5), stop_token_ids=(5,), stop=("ef",))
        (event,) = await read(engine.submit(resumed))
        assert event.stop_match == 5  # a stop token has no text that could match
        (event,) = await read(engine.submit(request(output_token_ids=(4, 5), stop=("ef",))))
        assert (event.finish_reason, event.stop_match, event.text) == (
            FinishReason.STOP,
            "ef",
            "",
        )
        assert engine.stats().steps == 0
        assert engine.stats().finished == {"length": 1, "stop": 4}


# Refusals


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": (1, 26)}, "token id 26 does not exist.*0 to 25"),
        ({"prompt": (-1, 3)}, "token id -1"),
        ({"output_token_ids": (99,)}, "output_token_ids: token id 99"),
        ({"output_token_ids": (1,) * 7}, "7 tokens to resume from.*may have 6"),
        ({"logit_bias": {26: 1.0}}, "logit_bias: token id 26"),
        ({"logprobs": 27}, "logprobs = 27"),
        ({"max_tokens": -1}, "max_tokens = -1"),
    ],
)
async def test_bad_requests_are_refused_at_the_call(
    start: Any, wrong: dict[str, Any], message: str
) -> None:
    async with start() as (engine, _):
        with pytest.raises(InvalidRequest, match=message):
            engine.submit(request(**wrong))
        assert len(await read(engine.submit(request(ignore_eos=True)))) == 6
        assert engine.stats().waiting == 0


@pytest.mark.promise(21)
async def test_too_long_requests_are_refused_at_the_call(start: Any) -> None:
    async with start(num_blocks=8, max_model_len=100) as (engine, _):
        with pytest.raises(ContextLengthExceeded, match=r"context is 100 tokens.*has 100"):
            engine.submit(request([1] * 100))
        with pytest.raises(ContextLengthExceeded, match="kv_cache_mb"):
            engine.submit(request([1] * 10, max_tokens=50))


async def test_bad_limits_refuse_to_start() -> None:
    with pytest.raises(BadSetting, match=r"blocks_total = 0.*kv_cache_mb"):
        LocalEngine.start(
            PagedFakeRunner(num_blocks=0),
            Letters(),
            max_batch_tokens=1,
            max_batch_sequences=1,
            max_waiting=1,
        )


async def test_a_full_queue_refuses(start: Any) -> None:
    gate = Gate()
    async with start(before_step=gate, max_batch_sequences=2, max_waiting=3) as (engine, _):
        burst = [engine.submit(request(request_id=f"r{n}")) for n in range(5)]
        with pytest.raises(Overloaded, match="3 sequences wait") as caught:
            engine.submit(request())
        assert caught.value.retry_after_s
        await gate.reached()
        gate.open(1)
        await gate.reached()  # now it is the snapshot that counts the queue
        assert (engine.stats().running, engine.stats().waiting) == (2, 3)
        with pytest.raises(Overloaded):
            engine.submit(request())
        gate.open()
        await asyncio.gather(*map(read, burst))
        assert await read(engine.submit(request()))


# Cancelling


async def test_cancel_ends_every_sequence_of_the_request(start: Any) -> None:
    gate = Gate()
    async with start(before_step=gate, max_batch_sequences=2) as (engine, runner):
        choices = [
            engine.submit(request(request_id="gone", index=n, max_tokens=50)) for n in range(3)
        ]
        other = engine.submit(request(request_id="stays", ignore_eos=True))
        await gate.reached()
        engine.cancel("gone")
        engine.cancel("unknown")
        gate.open()
        for events in await asyncio.gather(*map(read, choices)):
            assert events[-1].finish_reason is FinishReason.ABORT
            assert len(tokens(events)) <= 1
        assert len(tokens(await read(other))) == 6
        gone = {c.sequence_id for c in runner.steps[0].chunks}
        assert not gone & {c.sequence_id for step in runner.steps[1:] for c in step.chunks}
        assert engine.stats().finished == {"abort": 3, "length": 1}


async def test_closing_the_iterator_cancels(start: Any) -> None:
    gate = Gate()
    async with start(before_step=gate) as (engine, _):
        stream = engine.submit(request(max_tokens=100, ignore_eos=True))
        gate.open(2)
        async with aclosing(stream):
            await anext(stream)
        assert [event async for event in stream] == []
        gate.open()
        await until(lambda: engine.stats().running == 0)
        assert engine.stats().finished == {"abort": 1}


async def test_a_forgotten_iterator_cancels(start: Any) -> None:
    gate = Gate()
    async with start(before_step=gate) as (engine, _):
        stream = engine.submit(request(max_tokens=100, ignore_eos=True))
        await gate.reached()
        del stream
        gc.collect()
        gate.open()
        await until(lambda: engine.stats().finished == {"abort": 1})


async def test_a_cancelled_wait_loses_no_event(start: Any) -> None:
    gate = Gate()
    async with start(before_step=gate) as (engine, runner):
        stream = engine.submit(request(ignore_eos=True))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await anext(stream)
        gate.open()
        assert tokens(await read(stream)) == runner.answer((1, 2, 3), 6)


async def test_consumers_that_never_read_block_nobody(start: Any) -> None:
    async with start() as (engine, _):
        lazy = [engine.submit(request(ignore_eos=True)) for _ in range(4)]
        assert len(tokens(await read(engine.submit(request(ignore_eos=True))))) == 6
        await until(lambda: engine.stats().running == 0)
        assert [len(await read(one)) for one in lazy] == [6] * 4


@pytest.mark.promise(2)
@pytest.mark.known_failure("sglang#36475")
async def test_random_cancellation_leaks_nothing(start: Any) -> None:
    chance, gate = random.Random(7), Gate()
    async with start(num_blocks=10, max_batch_tokens=5, before_step=gate) as (engine, runner):

        async def one(n: int) -> None:
            prompt = [1 + n % 3] * chance.randint(1, 12)
            stream = engine.submit(request(prompt, f"r{n}", max_tokens=20, ignore_eos=True))
            got: list[int] = []
            async with aclosing(stream):
                for _ in range(chance.randint(0, 20)):
                    got += (await anext(stream)).token_ids
            assert got == runner.answer(tuple(prompt), len(got))

        async def pace() -> None:
            while True:  # or the engine may be done before the first consumer looks
                if gate.entered.acquire(blocking=False):
                    gate.open(1)
                await asyncio.sleep(0)

        pacing = asyncio.create_task(pace())
        await asyncio.gather(*(one(n) for n in range(60)))
        pacing.cancel()
        gate.open()
        await until(lambda: sum(engine.stats().finished.values()) == 60)
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0.0)
        assert stats.finished["abort"] > 0
        assert stats.alive


async def test_a_loop_that_closed_does_not_hold_its_sequences(start: Any) -> None:
    gate = Gate()
    async with start(before_step=gate) as (engine, _):
        streams: list[Any] = []

        async def elsewhere() -> None:
            streams.append(engine.submit(request(max_tokens=100, ignore_eos=True)))

        await asyncio.to_thread(asyncio.run, elsewhere())
        gate.open()
        await until(lambda: engine.stats().finished == {"abort": 1})
        assert len(tokens(await read(engine.submit(request(ignore_eos=True))))) == 6


# The end of the engine


@pytest.mark.promise(11)
@pytest.mark.known_failure("vllm#39863")
async def test_a_dead_runner_fails_everybody_and_shows(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()

    def die(step: Step) -> None:
        gate(step)
        raise RuntimeError("device lost")

    closing = threading.Event()
    async with start(before_step=die, max_batch_sequences=1) as (engine, runner):
        close = runner.close
        runner.close = lambda: (closing.wait(20), close())  # the thread outlives the failure
        streams = [engine.submit(request(request_id=f"r{n}")) for n in range(3)]
        await gate.reached()
        late = engine.submit(request(request_id="late"))
        with caplog.at_level(logging.CRITICAL, logger="cloudlm.engine.engine"):
            gate.open()
            for stream in [*streams, late]:
                with pytest.raises(InternalError, match="must be restarted"):
                    await read(stream)
                assert await read(stream) == []
        assert not engine.stats().alive
        assert engine.stats().steps == 0
        assert engine.stats().finished == {"error": 4}
        with pytest.raises(InternalError, match="has stopped"):
            engine.submit(request())
        closing.set()


async def test_what_the_runner_lost_ends_an_idle_engine(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with start() as (engine, _):
        with caplog.at_level(logging.CRITICAL, logger="cloudlm.engine"):
            engine.fail("rank 1 has ended")
            await until(lambda: not engine.stats().alive)
        with pytest.raises(InternalError, match="must be restarted"):
            engine.submit(request())


async def test_a_tokenizer_that_fails_costs_one_sequence(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start() as (engine, _):
        engine.tokenizer.broken = True
        with pytest.raises(InternalError, match="could not be decoded"):
            await read(engine.submit(request()))
        engine.tokenizer.broken = False
        stream = engine.submit(request(ignore_eos=True))
        monkeypatch.setattr(LettersDetokenizer, "push", lambda self, ids: 1 / 0)
        with pytest.raises(InternalError, match="could not be decoded"):
            await read(stream)
        monkeypatch.undo()
        assert len(tokens(await read(engine.submit(request(ignore_eos=True))))) == 6
        assert engine.stats().alive
        assert engine.stats().kv_usage == 0.0


async def test_closing_aborts_what_runs_and_what_waits(start: Any) -> None:
    gate = Gate()
    async with start(before_step=gate, max_batch_sequences=1) as (engine, _):
        streams = [engine.submit(request(max_tokens=100, ignore_eos=True)) for _ in range(2)]
        await gate.reached()
        streams.append(engine.submit(request()))
        closing = asyncio.create_task(engine.close())
        await until(lambda: not engine.stats().alive)
        with pytest.raises(InternalError, match="has stopped"):
            engine.submit(request())
        gate.open()
        await closing
        for events in await asyncio.gather(*map(read, streams)):
            assert events[-1].finish_reason is FinishReason.ABORT
        await engine.close()  # again: nothing to do


@pytest.mark.promise(11)
async def test_progress_can_be_judged_while_a_step_hangs() -> None:
    gate, clock = Gate(), ManualClock()
    runner = PagedFakeRunner()
    runner.before_step = gate
    engine = LocalEngine.start(
        runner,
        Letters(),
        max_batch_tokens=8,
        max_batch_sequences=2,
        max_waiting=2,
        clock=clock,
    )
    await clock.advance(5.0)
    assert engine.stats().busy_since is None
    stream = engine.submit(request(ignore_eos=True))
    assert engine.stats().waiting + engine.stats().running == 1
    await gate.reached()
    second = engine.submit(request(ignore_eos=True))
    await clock.advance(60.0)
    assert (engine.stats().busy_since, engine.stats().steps) == (5.0, 0)
    assert engine.stats().running == 1
    gate.open()
    assert [e.queued_s for e in await read(stream)][:2] == [0.0, None]
    assert [e.queued_s for e in await read(second)] == [60.0, *[None] * 5]
    assert engine.stats().busy_since is None
    assert engine.stats().steps > 0
    await engine.close()
