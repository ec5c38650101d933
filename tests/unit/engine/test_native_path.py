"""The native path against transformers in float32: no further from it than PyTorch in bfloat16 is,
whatever shares the batch; quantised weights; a crowd in a small cache; which path is chosen when.

Every test of numbers runs on the library (where a compiler is found) and on its PyTorch twin.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cloudlm.core.chat import Sampling
from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import EngineSettings
from cloudlm.engine.api import GenerateRequest
from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.engine import LocalEngine
from cloudlm.engine.load import build_network
from cloudlm.engine.native.fallback import TorchKernels
from cloudlm.engine.paths import choice
from cloudlm.engine.paths.choice import choose_path
from cloudlm.engine.paths.native_path import NativePath, native_block_size, why_not
from cloudlm.engine.runner import Runner, RunnerFacts

NAMES = ("llama-heads-32", "mistral-heads-32", "qwen2-heads-32", "qwen3", "phi3-heads-32")
LENGTHS = (1, 31, 32, 33, 70, 200)
BLOCKS = 64


@pytest.fixture(params=["library", "twin"])
def kernels(request: pytest.FixtureRequest) -> Any:
    return TorchKernels() if request.param == "twin" else request.getfixturevalue("library")


@pytest.fixture
def load(saved_model: Any, make_runner: Any, kernels: Any) -> Callable[..., Runner]:
    """``load("qwen3", precision="int8", num_blocks=9)``: a runner on the native path."""

    def loader(name: str, precision: str = "bfloat16", num_blocks: int = BLOCKS) -> Runner:
        plain = make_runner(saved_model(name).folder, dtype="bfloat16", kernels="torch")
        facts = RunnerFacts(name, 256, num_blocks, 32)

        def on_kernels(model: Decoder) -> NativePath:
            return NativePath(model, kernels, precision, num_blocks, 32)

        return Runner(plain.model, facts, make_path=on_kernels)

    return loader


def rounded(saved: Any) -> Any:
    """transformers' logits in float32 of the weights as bfloat16 has them."""
    reference = copy.deepcopy(saved.reference).bfloat16().float()

    def logits(token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            answer: torch.Tensor = reference(torch.tensor([token_ids])).logits[0]
            return answer

    return logits


def prompts(seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(307) for _ in range(length)] for length in LENGTHS]


def error(driver: Any, runner: Runner, budget: int, expected: list[torch.Tensor]) -> float:
    """Root mean square of the logits' errors, relative to the logits' own."""
    batch = driver(runner, budget=budget)
    for prompt in prompts(1):
        batch.add(prompt)
    off = torch.cat([a - b for a, b in zip(batch.all_logits(), expected, strict=True)])
    return float(off.pow(2).mean().sqrt() / torch.cat(expected).pow(2).mean().sqrt())


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_as_near_to_float32_as_pytorch_in_bfloat16(
    load: Any, driver: Any, saved_model: Any, make_runner: Any, name: str
) -> None:
    """Whole prompts in one batch, and prompts in chunks that end anywhere."""
    logits = rounded(saved_model(name))
    expected = [logits(prompt) for prompt in prompts(1)]
    plain = make_runner(saved_model(name).folder, dtype="bfloat16", kernels="torch")
    usual = error(driver, plain, 1000, expected)
    assert 0 < usual < 0.1
    for budget in (1000, 45):
        assert error(driver, load(name), budget, expected) < 1.1 * usual


@pytest.mark.parametrize(
    ("precision", "largest"),
    [("int8", 0.06), ("int8-a8", 0.12), ("int4", 0.7), ("int4-a8", 0.7)],
)
def test_quantised_weights_give_logits_that_are_near(
    load: Any, driver: Any, saved_model: Any, precision: str, largest: float
) -> None:
    logits = rounded(saved_model("qwen3"))
    runner = load("qwen3", precision)
    assert runner.info.dtype == precision
    assert runner.info.parameters == sum(
        p.numel() for p in saved_model("qwen3").reference.parameters()
    )
    off = error(driver, runner, 90, [logits(prompt) for prompt in prompts(1)])
    assert 1e-4 < off < largest


def test_keys_that_sequences_share_are_read_for_each_of_them(
    load: Any, driver: Any, saved_model: Any
) -> None:
    """Five sequences decode behind the same 160 tokens in the same blocks, one beside them."""
    logits = rounded(saved_model("qwen3"))
    runner = load("qwen3")
    batch = driver(runner)
    chance = random.Random(2)
    head = [chance.randrange(307) for _ in range(160)]
    first = batch.add(head)
    batch.all_logits()
    for tail in range(5):
        one = batch.add([*head, 7 + tail, 30])
        one.blocks, one.computed = list(first.blocks), 160
    batch.add(prompts(3)[4])
    batch.run(12)
    for one in batch.sequences[1:]:
        assert len(one.output) == 12
        answers = logits(one.tokens)[len(one.prompt) - 1 : -1]
        chosen = answers.gather(1, torch.tensor(one.output)[:, None])[:, 0]
        gaps = (answers.max(1).values - chosen) / answers.std()
        assert float(gaps.max()) < 0.1


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
    """Preempted, resumed, sharing prefixes: every token is float32's choice or next to it."""
    logits = rounded(saved_model("qwen3"))
    chance = random.Random(4)
    heads = [[chance.randrange(307) for _ in range(150)] for _ in range(2)]
    engine = LocalEngine.start(
        load("qwen3", num_blocks=22),
        Words(),
        max_batch_tokens=60,
        max_batch_sequences=8,
        max_waiting=50,
    )
    requests = [
        [
            *chance.choice(heads)[: chance.choice([0, 40, 150])],
            *(chance.randrange(307) for _ in range(9)),
        ]
        for _ in range(24)
    ]
    sampling = Sampling(temperature=0, max_tokens=50, ignore_eos=True)

    async def one(number: int, prompt: list[int]) -> list[int]:
        request = GenerateRequest(f"r{number}", tuple(prompt), sampling)
        return [token async for event in engine.submit(request) for token in event.token_ids]

    try:
        async with asyncio.timeout(120):
            answers = await asyncio.gather(*(one(n, p) for n, p in enumerate(requests)))
        assert engine.stats().preemptions > 0
        assert engine.stats().prefix_hits > 0
        engine._loop.scheduler.check_integrity()
    finally:
        await engine.close()
    exact = 0
    for prompt, answer in zip(requests, answers, strict=True):
        assert len(answer) == 50
        expected = logits(prompt + answer)[len(prompt) - 1 : -1]
        chosen = expected.gather(1, torch.tensor(answer)[:, None])[:, 0]
        gaps = (expected.max(1).values - chosen) / expected.std()
        assert float(gaps.max()) < 0.1
        exact += int((gaps == 0).sum())
    assert exact > 0.95 * 50 * len(requests)


def pick(model: Any, *, parameters: int = 10**9, device: str = "cpu", **settings: Any) -> Any:
    return choose_path(
        model,
        EngineSettings(**settings),
        parameters=parameters,
        device=torch.device(device),
        pick_dtype=lambda asked: torch.float32 if asked == "float32" else torch.bfloat16,
        threads=1,
    )


@pytest.fixture
def network(saved_model: Any, make_runner: Any) -> Callable[[str], Any]:
    return lambda name: make_runner(saved_model(name).folder, kernels="torch").model


class FakeKernels:
    name = "amx"


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """``found(kernels)``: what this machine then has."""

    def set_to(kernels: Any) -> None:
        def load_kernels(threads: int, *, instructions: str | None) -> Any:
            return TorchKernels() if instructions == "torch" else kernels

        monkeypatch.setattr(choice, "load_kernels", load_kernels)

    return set_to


def test_auto_takes_the_library_where_it_is_quicker(network: Any, found: Any) -> None:
    found(FakeKernels())
    qwen3 = network("qwen3")
    assert pick(qwen3).kernels is not None
    assert pick(qwen3, precision="bfloat16").kernels is not None
    assert pick(qwen3, parameters=10**7).kernels is None
    assert pick(qwen3, kernels="native", parameters=10**3).kernels is not None
    assert pick(qwen3, dtype="float32").kernels is None
    assert pick(qwen3, kernels="torch").kernels is None
    assert pick(network("gpt2")).kernels is None
    assert pick(qwen3, device="cuda").kernels is None


def test_without_a_library_pytorch_computes(network: Any, found: Any) -> None:
    found(TorchKernels())
    qwen3 = network("qwen3")
    chosen = pick(qwen3)
    assert (chosen.kernels, chosen.dtype, chosen.precision) == (None, torch.bfloat16, "bfloat16")
    assert isinstance(pick(qwen3, precision="int4").kernels, TorchKernels)
    with pytest.raises(BadSetting, match="compiler or set kernels to auto"):
        pick(qwen3, kernels="native")


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("gpt2", {"precision": "int8"}, "precision = int8 cannot be had: GPT2LMHeadModel is not"),
        ("gemma2", {"kernels": "native"}, "kernels = native cannot be had: the kernels lack"),
        ("llama", {"kernels": "native"}, "head size"),
        ("qwen3", {"precision": "int8", "dtype": "float32"}, "set one of them"),
        ("qwen3", {"kernels": "native", "dtype": "float32"}, "compute in bfloat16, and dtype is"),
        ("qwen3", {"precision": "int4-a8", "device": "cuda"}, "is for CPUs; a GPU has int8"),
    ],
)
def test_what_cannot_be_had_is_refused(
    network: Any, found: Any, name: str, settings: dict[str, str], words: str
) -> None:
    found(FakeKernels())
    with pytest.raises(BadSetting, match=words):
        pick(network(name), **settings)


@pytest.mark.parametrize("name", NAMES)
def test_the_families_that_the_kernels_run(network: Any, name: str) -> None:
    assert why_not(network(name)) is None


@pytest.mark.parametrize(
    "name", ["gpt2", "gemma2", "gemma3", "olmo2", "mixtral", "qwen3-moe", "gpt-neox", "falcon-40b"]
)
def test_the_families_that_they_do_not(network: Any, name: str) -> None:
    assert why_not(network(name)) is not None


@pytest.mark.parametrize(("head_dim", "runs"), [(32, True), (48, False), (512, True), (544, False)])
def test_heads_that_the_kernels_have_room_for(tmp_path: Path, head_dim: int, runs: bool) -> None:
    """A file may say what it likes: a longer head would be written over what stands behind."""
    values = {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": head_dim,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 307,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    obstacle = why_not(build_network(tmp_path)[2])
    assert (obstacle is None) == runs, obstacle
    if not runs:
        assert (
            obstacle == f"the kernels lack its head size ({head_dim}; a multiple of 32 up to 512)"
        )


def test_blocks_are_whole_tiles() -> None:
    assert [native_block_size(size) for size in (1, 16, 32, 33, 256)] == [32, 32, 32, 64, 256]


def test_a_folder_is_loaded_onto_the_library(
    saved_model: Any, make_runner: Any, driver: Any, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "load_kernels", lambda threads, *, instructions: library)
    before = torch.get_num_threads()
    try:
        runner = make_runner(
            saved_model("qwen3").folder, kernels="native", dtype="auto", precision="int8", threads=2
        )
    finally:
        torch.set_num_threads(before)
    assert (runner.info.dtype, runner.info.block_size) == ("int8", 32)
    batch = driver(runner)
    one = batch.add([1, 2, 3])
    batch.run(3)
    assert len(one.output) == 3
