"""From a folder to answers; settings that cannot work are refused with the remedy."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from cloudlm.core.chat import FinishReason, Sampling
from cloudlm.core.errors import BadSetting, BrokenModel, UnsafeModel, UnsupportedModel
from cloudlm.core.settings import EngineSettings
from cloudlm.engine.api import GenerateRequest
from cloudlm.engine.architectures.base import Shape
from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.load import load_engine, pick_device, pick_dtype, pick_threads, plan_cache

SMALL = EngineSettings(device="cpu", kv_cache_mb=2, threads=1)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def folder(saved_model: Any, tmp_path: Path) -> Path:
    """A whole model folder, tokenizer included."""
    copy = tmp_path / "model"
    shutil.copytree(saved_model("qwen2").folder, copy)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = RustTokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(copy / "tokenizer.json"))
    return copy


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


async def test_a_folder_becomes_an_engine_that_answers_as_transformers(
    folder: Path, saved_model: Any
) -> None:
    told: list[tuple[float, str]] = []
    engine = load_engine(
        folder, SMALL, max_waiting=4, progress=lambda share, what: told.append((share, what))
    )
    try:
        prompts = [[1, 2, 3], list(range(40, 140)), [9]]
        streams = [
            engine.submit(
                GenerateRequest(f"r{n}", tuple(p), Sampling(temperature=0, max_tokens=24))
            )
            for n, p in enumerate(prompts)
        ]
        for prompt, stream in zip(prompts, streams, strict=True):
            events = [event async for event in stream]
            tokens = [token for event in events for token in event.token_ids]
            assert tokens == saved_model("qwen2").greedy(prompt, 24)
            assert events[-1].finish_reason is FinishReason.LENGTH
    finally:
        await engine.close()
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert told[-1] == (1.0, "ready")
    assert any("weights" in what for _, what in told)
    assert engine.info.max_model_len == 256


@pytest.mark.parametrize("speculative", ["ngram", "off"])
async def test_guessing_is_a_setting(folder: Path, saved_model: Any, speculative: str) -> None:
    settings = replace(SMALL, speculative=speculative, prompt_lookup_min=1)
    engine = load_engine(folder, settings, max_waiting=4)
    prompt = list(range(40, 70)) * 3
    sampling = Sampling(temperature=0, max_tokens=40, ignore_eos=True)
    try:
        stream = engine.submit(GenerateRequest("r", tuple(prompt), sampling))
        tokens = [token async for event in stream for token in event.token_ids]
        assert tokens == saved_model("qwen2").greedy(prompt, 40)
        assert (engine.stats().drafted_tokens > 0) == (speculative == "ngram")
    finally:
        await engine.close()


def test_a_lookup_that_cannot_be_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    settings = replace(SMALL, speculative="ngram", prompt_lookup_min=9)
    with pytest.raises(BadSetting, match="prompt_lookup_min = 9"):
        load_engine(tmp_path / "nothing", settings, max_waiting=1)


def test_threads_are_set_once_for_the_process(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        change(folder, hidden_size=128)
        for threads, expected in ((2, 2), (0, 1)):
            settings = EngineSettings(device="cpu", threads=threads)
            with pytest.raises(BrokenModel):
                load_engine(folder, settings, max_waiting=1)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"architectures": ["BertModel"]}, UnsupportedModel, "BertModel"),
        ({"architectures": ["X"], "auto_map": {"AutoModel": "x.Y"}}, UnsafeModel, "auto_map"),
        ({"quantization_config": {"bits": 4}}, UnsupportedModel, "quantization_config"),
        ({"quantization_config": 4}, BrokenModel, "quantization_config"),
        ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedModel, "fp8"),
        ({"hidden_size": 128}, BrokenModel, "config.json asks for"),
        ({"num_hidden_layers": 2}, BrokenModel, "model.layers.2"),
        ({"num_hidden_layers": 4}, BrokenModel, "model.layers.3"),
    ],
)
def test_a_broken_folder_names_file_and_fault(
    folder: Path, fields: dict[str, Any], kind: type[Exception], words: str
) -> None:
    change(folder, **fields)
    with pytest.raises(BrokenModel) as raised:
        load_engine(folder, SMALL, max_waiting=1)
    assert type(raised.value) is kind
    assert words in str(raised.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BrokenModel, match=f"{name} is missing"):
        load_engine(folder, SMALL, max_waiting=1)


@pytest.mark.parametrize(
    ("asked", "config", "stored", "parameters", "device", "expected"),
    [
        ("auto", {"torch_dtype": "bfloat16"}, "", 10**9, CPU, torch.bfloat16),
        ("auto", {"dtype": "float16"}, "", 10**9, CPU, torch.float16),
        ("auto", {}, "", 10**9, CPU, torch.float32),
        ("auto", {"dtype": "bfloat16"}, "bfloat16", 10**6, CPU, torch.float32),
        ("auto", {"dtype": "bfloat16"}, "", 10**6, CUDA, torch.bfloat16),
        ("auto", {"dtype": "float32"}, "bfloat16", 10**9, CPU, torch.bfloat16),
        ("auto", {"dtype": "float16"}, "int4", 10**9, CPU, torch.float16),
        ("bfloat16", {"dtype": "float32"}, "float32", 10**6, CPU, torch.bfloat16),
    ],
)
def test_the_type_is_chosen(
    asked: str,
    config: dict[str, str],
    stored: str,
    parameters: int,
    device: torch.device,
    expected: torch.dtype,
) -> None:
    assert pick_dtype(asked, ModelConfig(config), parameters, device, stored) is expected


def test_an_unknown_type_is_named() -> None:
    with pytest.raises(BrokenModel, match="torch_dtype is 'int3', expected one of float32"):
        pick_dtype("auto", ModelConfig({"torch_dtype": "int3"}), 10**9, CPU)


def test_the_device_is_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)  # noqa: B023
        assert pick_device("auto") == (CUDA if available else CPU)
        assert pick_device("cpu") == CPU
    assert pick_device("cuda") == CUDA
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadSetting, match="has no CUDA"):
        pick_device("cuda")


# One block of 16 tokens: 4 layers × 2 × 16 × 8 heads × 64 numbers × 4 bytes = 256 KiB.
SHAPE = Shape(vocab_size=9, kv_heads=8, head_dim=64, context=2048, windows=(None,) * 4)


@pytest.mark.parametrize(
    ("cache_mb", "max_model_len", "expected"),
    [(1, 0, (4, 64)), (32, 0, (128, 2048)), (64, 0, (256, 2048)), (1, 50, (4, 50))],
)
def test_the_cache_is_planned(cache_mb: int, max_model_len: int, expected: tuple[int, int]) -> None:
    settings = EngineSettings(kv_cache_mb=cache_mb, max_model_len=max_model_len)
    assert plan_cache(SHAPE, settings, torch.float32) == expected


@pytest.mark.parametrize(
    ("cache_mb", "max_model_len", "block_size", "words"),
    [
        (1, 0, 256, "kv_cache_mb = 1 does not hold one block .* at least 4"),
        (64, 2049, 16, "max_model_len = 2049 is more than the model's context of 2048"),
        (1, 2000, 16, "holds 64 tokens; set kv_cache_mb to at least 32"),
    ],
)
def test_a_cache_that_cannot_work_is_refused_with_the_remedy(
    cache_mb: int, max_model_len: int, block_size: int, words: str
) -> None:
    settings = EngineSettings(
        kv_cache_mb=cache_mb, max_model_len=max_model_len, block_size=block_size
    )
    with pytest.raises(BadSetting, match=words):
        plan_cache(SHAPE, settings, torch.float32)


def test_a_very_small_model_gets_one_thread() -> None:
    cores = len(os.sched_getaffinity(0))
    assert [pick_threads(0, 3_000_000), pick_threads(0, 500_000_000)] == [1, cores]
    assert pick_threads(5, 3_000_000) == 5
