"""The event loop serves others while somebody's huge prompt is read."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

import cloudlm.registry
from cloudlm.core.errors import Overloaded
from cloudlm.worker.prepare import INLINE_SIZE, Offload


@pytest.mark.promise(24)
async def test_probes_answer_and_small_prompts_run_while_a_huge_one_is_tokenised(
    bench: Any,
) -> None:
    entered, release = threading.Event(), threading.Event()
    encode = bench.serving.tokenizer.encode

    def slow(text: str, add_special_tokens: bool = False) -> list[int]:
        if len(text) >= INLINE_SIZE:
            entered.set()
            assert release.wait(20)
            return [1] * len(text)
        found: list[int] = encode(text, add_special_tokens)
        return found

    bench.serving.tokenizer.encode = slow
    huge = [asyncio.create_task(bench.complete(prompt="x" * 1_000_000)) for _ in range(3)]
    huge.append(
        asyncio.create_task(bench.chat(messages=[{"role": "user", "content": "x" * 1_000_000}]))
    )
    while not entered.is_set() and not any(task.done() for task in huge):
        await asyncio.sleep(0.005)
    assert (await bench.client.get("/livez")).status_code == 200
    assert (await bench.chat()).status_code == 200
    assert (await bench.complete()).status_code == 200
    assert not any(task.done() for task in huge)
    release.set()
    assert [(await task).status_code for task in huge] == [400] * 4


async def test_what_waits_for_a_thread_is_bounded() -> None:
    offload, release = Offload(threads=1, max_pending=100_000), threading.Event()
    try:
        waiting = [asyncio.create_task(offload.sized(40_000, release.wait, 20)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="large requests") as caught:
            await offload.sized(40_000, release.wait, 20)
        assert caught.value.retry_after_s
        release.set()
        assert await offload.sized(20_000, len, "abc") == 3
        assert await asyncio.gather(*waiting) == [True, True]
        assert await offload.sized(1_000_000, len, "abc") == 3  # alone, any size is taken
    finally:
        release.set()
        offload.close()


@pytest.mark.promise(24)
async def test_the_real_tokenizer_lets_the_loop_run() -> None:
    from cloudlm.engine.tokens import Tokenizer

    folder = Path(cloudlm.registry.__file__).parent / "bundled" / "bank-helper"
    tokenizer = Tokenizer(folder)
    text = "Why was my card declined at the shop today? " * 24_000
    ticks, longest_s = 0, 0.0
    loop = asyncio.get_running_loop()
    offload = Offload()
    work = asyncio.create_task(offload.sized(len(text), tokenizer.encode, text))
    while not work.done():
        before = loop.time()
        await asyncio.sleep(0.001)
        longest_s = max(longest_s, loop.time() - before)
        ticks += 1
    assert len(await work) > 100_000
    assert ticks > 20  # the loop went round; with the interpreter's lock held it goes once
    offload.close()
