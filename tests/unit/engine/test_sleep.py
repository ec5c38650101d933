"""Sleep and wake: memory falls, answers stay the same, nothing runs on a runner that sleeps."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paged_fake_runner import PagedFakeRunner
from silent_engine import started

from cloudlm.core.chat import Sampling
from cloudlm.core.errors import BrokenModel, NotSupported, Unavailable
from cloudlm.engine.api import EmbedRequest, GenerateRequest
from cloudlm.engine.step import Chunk, Step

WEIGHTS_MB = 50


def ask(count: int = 8, prompt: tuple[int, ...] = tuple(range(1, 13))) -> GenerateRequest:
    return GenerateRequest(
        "r", prompt, Sampling(temperature=0.0, max_tokens=count, ignore_eos=True)
    )


async def read(stream: Any) -> tuple[list[int], Any]:
    events = [event async for event in stream]
    return [token for event in events for token in event.token_ids], events[-1]


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random model whose weights take WEIGHTS_MB."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size > WEIGHTS_MB * 2**20
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("level", [1, 2])
async def test_answers_stay_after_a_sleep(large_folder: Path, make_runner: Any, level: int) -> None:
    engine = started(make_runner(large_folder))
    try:
        before = await read(engine.submit(ask()))
        await engine.sleep(level)
        await engine.wake()
        after = await read(engine.submit(ask()))
        assert after[0] == before[0]
        assert after[1].cached_tokens == 0  # the cache's content is gone
        assert (await read(engine.submit(ask())))[1].cached_tokens > 0
    finally:
        await engine.close()


MEASURE = """
import sys
from pathlib import Path
from cloudlm.core.settings import EngineSettings
from cloudlm.engine.load import load_runner

def anonymous_kb():
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if "RssAnon" in line))

settings = EngineSettings(device="cpu", dtype="float32", kv_cache_mb=8, threads=1)
runner = load_runner(Path(sys.argv[1]), settings, (), lambda share, what: None)
awake = anonymous_kb()
runner.sleep(int(sys.argv[2]))
print(awake - anonymous_kb())
"""


@pytest.mark.parametrize("level", [1, 2])
def test_memory_falls(large_folder: Path, level: int) -> None:
    """In a process of its own: what other tests left behind must not count."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large_folder), str(level)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 1024 > 0.9 * WEIGHTS_MB


async def test_files_that_are_gone_are_named_and_it_sleeps_on(
    saved_model: Any, make_runner: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved_model("llama").folder, folder)
    engine = started(make_runner(folder))
    try:
        before = await read(engine.submit(ask()))
        await engine.sleep(1)
        (folder / "model.safetensors").rename(tmp_path / "away")
        for _ in range(2):
            with pytest.raises(BrokenModel, match="no weights"):
                await engine.wake()
            with pytest.raises(Unavailable):
                engine.submit(ask())
        (tmp_path / "away").rename(folder / "model.safetensors")
        await engine.wake()
        assert (await read(engine.submit(ask())))[0] == before[0]
        await engine.sleep(1)
    finally:
        await engine.close()  # also asleep


async def test_adapters_outlive_sleep(
    saved_model: Any, make_runner: Any, driver: Any, tmp_path: Path
) -> None:
    import json

    import torch
    from safetensors.torch import save_file

    runner = make_runner(saved_model("llama").folder)
    path = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    pair = {path.format("A"): torch.ones(2, 64), path.format("B"): torch.ones(96, 2)}
    save_file(pair, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    )
    adapter = runner.read_adapter(tmp_path)
    runner.add_adapter("a", adapter)

    def logits(key: str) -> Any:
        batch = driver(runner)
        batch.add(list(range(20)), adapter=key)
        return batch.all_logits()[0]

    before = [logits("a"), logits("")]
    runner.sleep(2)
    with pytest.raises(Unavailable, match="asleep"):
        runner.read_adapter(tmp_path)
    runner.add_adapter("b", adapter)
    runner.wake()
    assert not torch.equal(before[0], before[1])
    for key, wanted in zip(["a", "", "b"], [*before, before[0]], strict=True):
        assert torch.equal(logits(key), wanted)


def test_what_has_no_files_cannot_sleep(saved_model: Any, make_runner: Any) -> None:
    from cloudlm.engine.runner import Runner, RunnerFacts

    loaded = make_runner(saved_model("llama").folder)
    runner = Runner(loaded.model, RunnerFacts("Llama", 64, 8, 4))
    with pytest.raises(NotSupported):
        runner.sleep(1)
    chunk = Chunk(1, (1,), 0, (0,), samples=True, sampling=Sampling(temperature=0.0))
    assert len(runner.run(Step((chunk,)))) == 1


async def test_running_requests_are_finished_and_new_ones_refused() -> None:
    runner = PagedFakeRunner(max_model_len=2000, num_blocks=600)
    engine = started(runner)
    try:
        running = [asyncio.create_task(read(engine.submit(ask(400)))) for _ in range(3)]
        await asyncio.sleep(0)
        falling = asyncio.create_task(engine.sleep(1))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as refused:
            engine.submit(ask())
        assert refused.value.retry_after_s
        with pytest.raises(Unavailable):
            await engine.embed([EmbedRequest("e", (1,))])
        await falling
        assert [(len(tokens), end.finish_reason) for tokens, end in await gathered(running)] == [
            (400, "length")
        ] * 3
        assert runner.asleep == 1
        await engine.sleep(2)  # sleeps already
        assert engine.stats().alive
        await engine.wake()
        await engine.wake()
        assert len((await read(engine.submit(ask())))[0]) == 8
    finally:
        await engine.close()


async def gathered(tasks: list[Any]) -> list[Any]:
    return list(await asyncio.gather(*tasks))


async def test_any_order_of_sleeping_waking_and_asking_is_safe() -> None:
    """The fake runner fails if it is run asleep, or put to sleep or woken twice."""
    import random

    draw = random.Random(7)
    engine = started(PagedFakeRunner())
    refused = 0

    async def one() -> None:
        nonlocal refused
        await asyncio.sleep(draw.random() * 0.05)
        kind = draw.choice(["sleep", "wake", "ask", "ask", "ask"])
        try:
            if kind == "sleep":
                await engine.sleep(1)
            elif kind == "wake":
                await engine.wake()
            else:
                assert len((await read(engine.submit(ask(30))))[0]) == 30
        except Unavailable:
            refused += 1

    try:
        await asyncio.gather(*(one() for _ in range(300)))
        assert engine.stats().alive
        await engine.wake()
        assert len((await read(engine.submit(ask())))[0]) == 8
        assert refused
    finally:
        await engine.close()


async def test_a_runner_that_cannot_wake_sleeps_on() -> None:
    runner = PagedFakeRunner()
    engine = started(runner)
    try:
        await engine.sleep(1)
        runner.broken = BrokenModel("gone")
        with pytest.raises(BrokenModel):
            await engine.wake()
        with pytest.raises(Unavailable):
            engine.submit(ask())
        runner.broken = None
        await engine.wake()
        assert len((await read(engine.submit(ask())))[0]) == 8
    finally:
        await engine.close()
