"""The GPU path on the CPU: the same tokens as transformers, decoding eagerly and by graphs.

Graphs are a twin that repeats operations without a line of Python (tests/support/recorded_graph);
kernels are PyTorch's twins, and for some families Triton's own in its interpreter.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded_graph import RecordingAccelerator

from cloudlm.core.chat import Sampling
from cloudlm.core.errors import NotSupported
from cloudlm.engine.api import GenerateRequest
from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.engine import LocalEngine
from cloudlm.engine.gpu.accelerator import HostAccelerator
from cloudlm.engine.gpu.graphs import graph_sizes
from cloudlm.engine.gpu.torch_ops import TorchOperations
from cloudlm.engine.paths.gpu_path import GpuFacts, GpuPath
from cloudlm.engine.runner import Runner, RunnerFacts, Source
from cloudlm.engine.step import Chunk, Step

BLOCKS, BLOCK = 120, 8
FAMILIES = (
    "llama",
    "llama3-rope",
    "llama-biased",
    "mistral-window",
    "qwen2-window",
    "qwen3",
    "gemma2",
    "gemma3",
    "olmo2",
    "phi3",
    "phi4-mini",
    "gpt2",
    "gpt-neox",
    "falcon-40b",
    "mixtral",
    "qwen2-moe",
)
LENGTHS = (1, 7, 8, 40, 90)


@pytest.fixture
def load(saved_model: Any, make_runner: Any) -> Callable[..., Runner]:
    """``load("qwen3", accelerator, operations, precision="int8")``: a runner on the GPU path."""

    def loader(
        name: str,
        accelerator: Any,
        operations: Any = None,
        *,
        precision: str = "float32",
        num_blocks: int = BLOCKS,
        sizes: tuple[int, ...] = (1, 2, 4, 6),
    ) -> Runner:
        def plain() -> Any:
            dtype = "bfloat16" if precision == "bfloat16" else "float32"
            return make_runner(
                saved_model(name).folder,
                dtype=dtype,
                kernels="torch",
                max_model_len=saved_model(name).max_model_len,
            ).model

        facts = RunnerFacts(name, 256, num_blocks, BLOCK)

        def on_gpu(model: Decoder) -> GpuPath:
            built = GpuFacts(precision, num_blocks, BLOCK, 256, sizes)
            return GpuPath(model, operations or TorchOperations(), accelerator, built)

        return Runner(plain(), facts, Source(plain, ()), make_path=on_gpu)

    return loader


def prompts(seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(307) for _ in range(length)] for length in LENGTHS]


def check_greedy(batch: Any, saved: Any, steps: int) -> None:
    """All sequences' answers are transformers' own."""
    for one in batch.sequences:
        assert len(one.output) == steps
        assert saved.greedy_along(one.prompt, one.output) == one.output


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(
    load: Any, driver: Any, saved_model: Any, name: str
) -> None:
    """Prompts in chunks beside sequences that decode; then five that decode by graphs of six."""
    accelerator = RecordingAccelerator()
    batch = driver(load(name, accelerator), budget=60)
    for prompt in prompts(1):
        batch.add(prompt)
    batch.run(10)
    check_greedy(batch, saved_model(name), 10)
    if name in ("mixtral", "qwen2-moe"):
        assert accelerator.captures == 0, "experts wait for the device"
    else:
        assert accelerator.captures == 4
        assert accelerator.replays >= 5


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2"])
def test_tokens_of_the_triton_kernels(
    load: Any, driver: Any, saved_model: Any, triton_operations: Any, name: str
) -> None:
    """Two prompts in chunks, then one step of two; few tokens, as the interpreter is slow."""
    batch = driver(load(name, HostAccelerator(), triton_operations, sizes=()), budget=8)
    for prompt in prompts(2)[1:3]:
        batch.add(prompt)
    batch.run(2)
    check_greedy(batch, saved_model(name), 2)


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
def test_graphs_and_eager_steps_agree(load: Any, driver: Any, precision: str) -> None:
    """Batches that shrink and grow again, blocks that move to other sequences: nothing of an
    earlier batch stays in the buffers."""
    answers = []
    for sizes in ((1, 3, 8), ()):
        accelerator = RecordingAccelerator()
        batch = driver(load("qwen3", accelerator, precision=precision, sizes=sizes))
        for count in (5, 1, 8, 2):
            chance = random.Random(count)
            for _ in range(count):
                batch.add([chance.randrange(307) for _ in range(chance.randrange(1, 40))])
            batch.run(6)
        answers.append([one.output for one in batch.sequences])
        assert (accelerator.replays > 0) == bool(sizes)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("precision", "largest"), [("int8", 0.06), ("int4", 0.7)])
def test_quantised_weights_give_logits_that_are_near(
    load: Any, driver: Any, saved_model: Any, precision: str, largest: float
) -> None:
    for name in ("qwen3", "gemma2"):
        runner = load(name, HostAccelerator(), precision=precision)
        assert runner.info.dtype == precision
        batch = driver(runner)
        expected = []
        for prompt in prompts(3):
            batch.add(prompt)
            expected.append(saved_model(name).logits(prompt))
        off = torch.cat([a - b for a, b in zip(batch.all_logits(), expected, strict=True)])
        share = float(off.pow(2).mean().sqrt() / torch.cat(expected).pow(2).mean().sqrt())
        assert 1e-4 < share < largest


def test_a_graph_stores_nothing_in_anybodys_block(load: Any) -> None:
    """Rows that fill the batch up write into the one block that no table names."""
    runner = load("llama", RecordingAccelerator(), sizes=(4,))
    pool = runner._path.pool
    with torch.inference_mode():
        pool.blocks.fill_(3.0)
    chunk = Chunk(1, (5,), 10, (7, 9), samples=True, sampling=Sampling(temperature=0.0))
    assert len(runner.run(Step((chunk,)))) == 1
    changed = (pool.blocks != 3.0).flatten(3).any(-1).any(0).any(0).nonzero().flatten().tolist()
    assert changed == [9, BLOCKS]


def test_more_sequences_than_the_largest_graph_run_eagerly(
    load: Any, driver: Any, saved_model: Any
) -> None:
    accelerator = RecordingAccelerator()
    batch = driver(load("qwen3", accelerator, sizes=(1, 2)))
    for prompt in prompts(4)[:4]:
        batch.add(prompt)
    batch.run(4)
    check_greedy(batch, saved_model("qwen3"), 4)
    assert accelerator.replays == 0


def test_the_recorder_refuses_what_waits_for_the_device() -> None:
    numbers = torch.arange(3)
    with pytest.raises(AssertionError, match="waits for the device"):
        RecordingAccelerator().capture(lambda: bool(numbers.sum() > 2))
    with pytest.raises(AssertionError, match="lift_fresh waits"):
        RecordingAccelerator().capture(lambda: numbers.add_(torch.tensor(3)))


def test_sizes_of_graphs() -> None:
    assert graph_sizes(1) == (1,)
    assert graph_sizes(3) == (1, 2, 3)
    assert graph_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert graph_sizes(4096)[-3:] == (224, 240, 256)
    for most in (5, 20, 100, 300):
        sizes = graph_sizes(most)
        assert sizes[-1] == min(most, 256) and list(sizes) == sorted(set(sizes))


def test_it_sleeps_and_wakes(load: Any, driver: Any, saved_model: Any) -> None:
    """Graphs go with the memory that they run on, and are recorded again."""
    accelerator = RecordingAccelerator()
    runner = load("qwen3", accelerator)
    runner.sleep(1)
    assert runner._path is None
    runner.wake()
    assert accelerator.captures == 8
    batch = driver(runner)
    batch.add(prompts(5)[2])
    batch.run(4)
    check_greedy(batch, saved_model("qwen3"), 4)


def test_adapters_are_refused(load: Any, tmp_path: Any) -> None:
    with pytest.raises(NotSupported, match="kernels=torch"):
        load("llama", HostAccelerator()).read_adapter(tmp_path)


class Words:
    """A tokenizer that shows nothing."""

    class Silent:
        def push(self, token_ids: list[int]) -> str:
            return ""

        def flush(self) -> str:
            return ""

    def detokenizer(self, prompt_ids: list[int]) -> Silent:
        return self.Silent()


async def test_a_crowd_in_a_small_cache_gets_right_answers(load: Any, saved_model: Any) -> None:
    """Preempted, resumed, sharing prefixes, in graphs and beside prompts."""
    chance = random.Random(4)
    head = [chance.randrange(307) for _ in range(60)]
    accelerator = RecordingAccelerator()
    engine = LocalEngine.start(
        load("qwen3", accelerator, num_blocks=30, sizes=(1, 2, 4)),
        Words(),
        max_batch_tokens=40,
        max_batch_sequences=6,
        max_waiting=50,
    )
    requests = [
        [*head[: chance.choice([0, 20, 60])], *(chance.randrange(307) for _ in range(5))]
        for _ in range(12)
    ]
    sampling = Sampling(temperature=0, max_tokens=40, ignore_eos=True)

    async def one(number: int, prompt: list[int]) -> list[int]:
        request = GenerateRequest(f"r{number}", tuple(prompt), sampling)
        return [token async for event in engine.submit(request) for token in event.token_ids]

    try:
        async with asyncio.timeout(60):
            answers = await asyncio.gather(*(one(n, p) for n, p in enumerate(requests)))
        assert engine.stats().preemptions > 0
        assert engine.stats().prefix_hits > 0
        assert accelerator.replays > 0
    finally:
        await engine.close()
    for prompt, answer in zip(requests, answers, strict=True):
        assert saved_model("qwen3").greedy_along(prompt, answer) == answer
