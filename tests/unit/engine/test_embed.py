"""Embeddings: equal to transformers' hidden states, in chunks, beside generation."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest
from paged_fake_runner import PagedFakeRunner

from cloudlm.core.chat import Sampling
from cloudlm.core.errors import ContextLengthExceeded, InvalidRequest, Overloaded, Unavailable
from cloudlm.engine.api import EmbedRequest, EngineInfo, GenerateRequest
from cloudlm.engine.engine import LocalEngine
from cloudlm.engine.intake import sequence_to_embed
from cloudlm.engine.limits import Limits
from cloudlm.engine.scheduler import Scheduler
from cloudlm.engine.sequence import Sequence, Status
from cloudlm.engine.step import Pooling


class NoText:
    """A tokenizer whose tokens have no text."""

    def detokenizer(self, prompt_ids: Any) -> Any:
        return self

    def push(self, token_ids: Any) -> str:
        return ""

    def flush(self) -> str:
        return ""


def started(runner: Any, pooling: Pooling, **limits: int) -> LocalEngine:
    values = {"max_batch_tokens": 16, "max_batch_sequences": 4, "max_waiting": 100, **limits}
    return LocalEngine.start(runner, NoText(), pooling=pooling, **values)  # type: ignore[arg-type]


def prompts(count: int, vocabulary: int, longest: int, seed: int = 0) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [
        tuple(draw.randrange(1, vocabulary) for _ in range(draw.randint(1, longest)))
        for _ in range(count)
    ]


def requests(given: list[tuple[int, ...]]) -> list[EmbedRequest]:
    return [EmbedRequest("e", prompt) for prompt in given]


def reference(model: Any, prompt: tuple[int, ...], pooling: Pooling) -> Any:
    import torch

    with torch.inference_mode():
        hidden = model.base_model(torch.tensor([prompt])).last_hidden_state[0].double().numpy()
    vector = hidden[-1] if pooling is Pooling.LAST else hidden.mean(0)
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
async def test_equal_to_transformers(
    saved_model: Any, make_runner: Any, name: str, pooling: Pooling
) -> None:
    saved = saved_model(name)
    engine = started(make_runner(saved.folder), pooling)
    given = prompts(12, 307, 60)
    given += [given[0], given[0][:8] + given[1]]  # a known prefix must change nothing
    try:
        side = engine.submit(GenerateRequest("g", given[2], Sampling(temperature=0, max_tokens=30)))
        talk = asyncio.create_task(_tokens(side))
        found = await engine.embed(requests(given))
        assert len(await talk) == 30
        again = await engine.embed(requests(given[:2]))
    finally:
        await engine.close()
    assert len(found) == len(given)
    for one, prompt in zip([*found, *again], [*given, *given[:2]], strict=True):
        assert one.prompt_tokens == len(prompt)
        difference = np.array(one.values) - reference(saved.reference, prompt, pooling)
        assert np.abs(difference).max() < 1e-4
    assert any(one.cached_tokens for one in again) == (pooling is Pooling.LAST)


async def _tokens(stream: Any) -> list[int]:
    return [token for event in [e async for e in stream] for token in event.token_ids]


@pytest.mark.parametrize("pooling", list(Pooling))
async def test_preempted_prompts_are_counted_once(pooling: Pooling) -> None:
    """A cache so small that prompts give way to those that decode."""
    runner = PagedFakeRunner(num_blocks=12, eos_token_ids=())
    engine = started(runner, pooling, max_batch_tokens=6)
    given = prompts(20, 26, 30)
    try:
        talks = [
            asyncio.create_task(
                _tokens(engine.submit(GenerateRequest(f"g{n}", (n + 1,), Sampling(max_tokens=20))))
            )
            for n in range(3)
        ]
        found = await engine.embed(requests(given))
        await asyncio.gather(*talks)
        assert engine.stats().preemptions > 0
        assert engine.stats().finished == {"stop": 20, "length": 3}
        assert engine.stats().kv_usage == 0.0
    finally:
        await engine.close()
    for one, prompt in zip(found, given, strict=True):
        counted = prompt if pooling is Pooling.MEAN else prompt[-1:]
        wanted = np.array([counted.count(token) for token in range(26)], dtype=np.float64)
        assert np.allclose(np.array(one.values), wanted / np.linalg.norm(wanted), atol=1e-6)


async def test_more_prompts_than_the_queue_holds() -> None:
    engine = started(PagedFakeRunner(), Pooling.LAST, max_waiting=1)
    try:
        assert len(await engine.embed(requests(prompts(200, 26, 9)))) == 200
    finally:
        await engine.close()


async def test_bad_prompts_are_refused_before_any_is_computed() -> None:
    runner = PagedFakeRunner()
    engine = started(runner, Pooling.LAST)
    try:
        for bad, error in (((), InvalidRequest), ((26,), InvalidRequest)):
            with pytest.raises(error):
                await engine.embed(requests([(1, 2), bad]))
        with pytest.raises(ContextLengthExceeded):
            await engine.embed(requests([(1,) * 129]))
        assert (await engine.embed(requests([(1,) * 128])))[0].prompt_tokens == 128
        assert runner.computed_tokens == 128
    finally:
        await engine.close()


async def test_a_weight_that_is_none_is_refused() -> None:
    engine = started(PagedFakeRunner(), Pooling.LAST)
    try:
        with pytest.raises(InvalidRequest, match="weight = 0"):
            await engine.embed([EmbedRequest("e", (1,), weight=0.0)])
    finally:
        await engine.close()


def test_one_tenants_inputs_do_not_hold_up_anothers() -> None:
    limits = Limits(64, 4, 64, max_batch_tokens=16, max_batch_sequences=4)
    info = EngineInfo("fake", 0, "float32", "cpu", 32, 64, 4, 64, ())
    scheduler = Scheduler(limits)

    def add(number: int, tenant: str, priority: int = 0) -> Sequence:
        asked = EmbedRequest("e", (1,) * 12, str(number), tenant=tenant, priority=priority)
        sequence = sequence_to_embed(asked, number, Pooling.LAST, info, limits)
        scheduler.add(sequence)
        return sequence

    for number in range(100):
        add(number, "loud")
    scheduler.schedule()
    scheduler.apply([])
    quiet, urgent = add(200, "quiet"), add(201, "loud", priority=1)
    for _ in range(4):
        scheduler.schedule()
        scheduler.apply([])
    assert quiet.status is urgent.status is Status.FINISHED


async def test_a_full_queue_refuses() -> None:
    engine = started(PagedFakeRunner(), Pooling.LAST, max_waiting=1, max_batch_sequences=1)
    try:
        streams = [
            engine.submit(GenerateRequest(f"g{n}", (1,), Sampling(ignore_eos=True)))
            for n in range(2)
        ]
        with pytest.raises(Overloaded):
            await engine.embed(requests([(1, 2)]))
        assert len(streams) == 2
    finally:
        await engine.close()


async def test_cancelling_and_closing_end_what_runs() -> None:
    runner = PagedFakeRunner()
    engine = started(runner, Pooling.LAST)
    given = requests(prompts(2000, 26, 100))
    try:
        task = asyncio.create_task(engine.embed(given))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        task = asyncio.create_task(engine.embed(given))
        await asyncio.sleep(0.05)
        engine.cancel("e")
        with pytest.raises(Unavailable):
            await task
        while engine.stats().running or engine.stats().waiting:
            await asyncio.sleep(0.01)
        assert engine.stats().kv_usage == 0.0
    finally:
        await engine.close()
