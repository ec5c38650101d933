"""LoRA: equal to merged weights in mixed batches, refused when unsound, loaded while serving."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_fake_runner import PagedFakeRunner
from random_adapters import adapt, write
from silent_engine import started

from cloudlm.core.chat import Sampling
from cloudlm.core.errors import (
    BrokenModel,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    UnsafeModel,
    UnsupportedModel,
)
from cloudlm.engine.api import EmbedRequest, GenerateRequest

# model -> the last parts of the names that are adapted
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gemma2": ["q_proj", "v_proj"],
    "falcon-40b": ["query_key_value", "dense_h_to_4h"],
}


def logits_of(model: Any, token_ids: list[int]) -> Any:
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].float()


@pytest.mark.parametrize("name", list(TARGETS))
def test_mixed_batches_equal_merged_weights(
    saved_model: Any, make_runner: Any, driver: Any, tmp_path: Path, name: str
) -> None:
    saved = saved_model(name)
    runner = make_runner(saved.folder)
    models = {
        "": saved.reference,
        "a": adapt(saved.reference, TARGETS[name], tmp_path / "a", 1),
        "b": adapt(saved.reference, TARGETS[name][:1], tmp_path / "b", 2, r=8, use_rslora=True),
    }
    for key in "ab":
        runner.add_adapter(key, runner.read_adapter(tmp_path / key))
    draw = random.Random(5)
    batch = driver(runner, budget=23)
    for number in range(9):
        prompt = [draw.randrange(307) for _ in range(draw.randint(1, 40))]
        batch.add(prompt, adapter=["", "a", "b"][number % 3])
    found = batch.all_logits()
    for one, rows in zip(batch.sequences, found, strict=True):
        wanted = logits_of(models[one.adapter], one.prompt)
        assert float((rows - wanted).abs().max()) < 1e-4 * max(1.0, float(wanted.abs().max()))
        if one.adapter:
            assert float((rows - logits_of(models[""], one.prompt)).abs().max()) > 0.1


def test_one_adapter_alone_and_the_base_afterwards(
    saved_model: Any, make_runner: Any, driver: Any, tmp_path: Path
) -> None:
    saved = saved_model("llama")
    runner = make_runner(saved.folder)
    prompt = list(range(30))
    batch = driver(runner)
    batch.add(prompt)
    (before,) = batch.all_logits()
    merged = adapt(saved.reference, ["q_proj", "down_proj"], tmp_path / "a", 3)
    runner.add_adapter("a", runner.read_adapter(tmp_path / "a"))
    batch = driver(runner)
    batch.add(prompt, adapter="a")
    (rows,) = batch.all_logits()
    assert torch.allclose(rows, logits_of(merged, prompt), atol=1e-3)
    runner.remove_adapter("a")
    assert not any(module._forward_hooks for module in runner.model.modules())
    batch = driver(runner)
    batch.add(prompt)
    assert torch.equal(batch.all_logits()[0], before)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
GOOD = {A: torch.zeros(4, 64), B: torch.zeros(64, 4)}


@pytest.mark.parametrize(
    ("tensors", "config", "error", "match"),
    [
        ({}, {"use_dora": True}, UnsupportedModel, "use_dora"),
        ({}, {"modules_to_save": ["lm_head"]}, UnsupportedModel, "modules_to_save"),
        ({}, {"rank_pattern": {"x": 1}}, UnsupportedModel, "rank_pattern"),
        ({}, {"alpha_pattern": {"x": 1}}, UnsupportedModel, "alpha_pattern"),
        ({}, {"some_future_option": 1}, UnsupportedModel, "some_future_option"),
        ({}, {"bias": "all"}, UnsupportedModel, "bias"),
        ({}, {"peft_type": "IA3"}, UnsupportedModel, "LORA"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, UnsupportedModel, "base's weights"),
        ({}, {"r": 0}, BrokenModel, "r is 0"),
        ({}, {"r": 513}, BrokenModel, "r is 513"),
        ({}, {"r": 8}, BrokenModel, "shape"),
        ({}, {"lora_alpha": "x"}, BrokenModel, "lora_alpha"),
        ({}, {"use_rslora": 3}, BrokenModel, "use_rslora"),
        ({}, {"target_modules": 3}, BrokenModel, "target_modules"),
        ({}, {"target_modules": ["k_proj"]}, BrokenModel, "target_modules"),
        ({A: torch.zeros(4, 65)}, {}, BrokenModel, "shape"),
        ({B: None}, {}, BrokenModel, "has no lora_B"),
        ({A: torch.full((4, 64), float("nan"))}, {}, BrokenModel, "finite"),
        ({A: torch.zeros(4, 64, dtype=torch.int32)}, {}, UnsupportedModel, "I32"),
        ({"other": torch.zeros(1)}, {}, UnsupportedModel, "lora_A"),
        ({A.replace("q_proj", "x"): torch.zeros(4, 64)}, {}, UnsupportedModel, "projection"),
        (
            {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)},
            {},
            UnsupportedModel,
            "lm_head",
        ),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 64)},
            {},
            UnsupportedModel,
            "lora_A",
        ),
    ],
)
def test_unsound_adapters_are_refused(
    saved_model: Any,
    make_runner: Any,
    tmp_path: Path,
    tensors: dict[str, Any],
    config: dict[str, Any],
    error: type[Exception],
    match: str,
) -> None:
    runner = make_runner(saved_model("llama").folder)
    given = {name: one for name, one in {**GOOD, **tensors}.items() if one is not None}
    with pytest.raises(error, match=match):
        runner.read_adapter(write(tmp_path / "bad", given, **config))


def test_files_that_are_not_what_they_should_be(
    saved_model: Any, make_runner: Any, tmp_path: Path
) -> None:
    runner = make_runner(saved_model("llama").folder)
    assert runner.read_adapter(write(tmp_path / "good", GOOD)).pairs.keys() == {
        "model.layers.0.self_attn.q_proj"
    }
    with pytest.raises(BrokenModel, match="not a folder"):
        runner.read_adapter(tmp_path / "nowhere")
    folder = write(tmp_path / "bad", GOOD)
    weights = folder / "adapter_model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1])
    with pytest.raises(BrokenModel, match="cut"):
        runner.read_adapter(folder)
    weights.unlink()
    with pytest.raises(BrokenModel, match="missing"):
        runner.read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UnsafeModel, match="pickled"):
        runner.read_adapter(folder)
    weights.symlink_to(tmp_path / "good" / "adapter_model.safetensors")
    with pytest.raises(UnsafeModel, match="symbolic link"):
        runner.read_adapter(folder)
    weights.unlink()
    weights.write_bytes(raw)
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(BrokenModel, match="JSON"):
        runner.read_adapter(folder)


def ask(adapter: str, prompt: tuple[int, ...] = (1, 2, 3, 4, 5, 6), count: int = 8) -> Any:
    sampling = Sampling(max_tokens=count, ignore_eos=True)
    return GenerateRequest(f"r-{adapter}", prompt, sampling, adapter=adapter)


async def last(stream: Any) -> Any:
    return [event async for event in stream][-1]


async def test_prefixes_are_kept_apart_by_adapter(tmp_path: Path) -> None:
    """The fake runner checks that each block read was written under the reader's adapter."""
    engine = started(PagedFakeRunner())
    prompt = tuple(range(1, 21))
    try:
        await engine.load_adapter("a", tmp_path, "here")
        assert engine.adapters() == {"a": "here"}
        for adapter in ("", "a"):
            assert (await last(engine.submit(ask(adapter, prompt)))).cached_tokens == 0
            assert (await last(engine.submit(ask(adapter, prompt)))).cached_tokens > 0
        found = await engine.embed([EmbedRequest("e", prompt, adapter="a")])
        assert found[0].cached_tokens > 0
        await engine.unload_adapter("a")
        await engine.load_adapter("a", tmp_path, "there")  # another one under the same name
        assert (await last(engine.submit(ask("a", prompt)))).cached_tokens == 0
    finally:
        await engine.close()


async def test_loading_and_unloading_while_others_run(tmp_path: Path) -> None:
    runner = PagedFakeRunner(max_model_len=2000, num_blocks=600)
    engine = started(runner)
    try:
        await engine.load_adapter("a", tmp_path, "here")
        running = [asyncio.create_task(last(engine.submit(ask("a", count=300)))) for _ in range(3)]
        base = asyncio.create_task(last(engine.submit(ask("", count=500))))
        await asyncio.sleep(0)
        leaving = asyncio.create_task(engine.unload_adapter("a"))
        await asyncio.sleep(0)
        with pytest.raises(ModelNotFound):
            engine.submit(ask("a"))
        await leaving
        assert all(task.done() for task in running) or runner.adapters == set()
        assert [(await task).finish_reason for task in running] == ["length"] * 3
        for number in range(20):
            await engine.load_adapter(f"n{number}", tmp_path, "x")
        assert (await base).finish_reason == "length"
        assert len(engine.adapters()) == len(runner.adapters) == 20
    finally:
        await engine.close()


async def test_what_cannot_be_loaded_leaves_nothing(tmp_path: Path) -> None:
    engine = started(PagedFakeRunner())
    try:
        with pytest.raises(BrokenModel):
            await engine.load_adapter("a", tmp_path / "none", "x")
        await engine.load_adapter("a", tmp_path, "x")
        with pytest.raises(InvalidRequest, match="loaded already"):
            await engine.load_adapter("a", tmp_path, "x")
        for call in (engine.unload_adapter("b"), engine.embed([EmbedRequest("e", (1,), "", "b")])):
            with pytest.raises(ModelNotFound):
                await call
    finally:
        await engine.close()
    with pytest.raises(InternalError):
        await engine.load_adapter("c", tmp_path, "x")
    assert engine.adapters() == {"a": "x"}


@pytest.mark.parametrize("queued", [False, True], ids=["while it is read", "while it is added"])
async def test_a_load_that_nobody_waits_for_any_more_leaves_nothing(
    tmp_path: Path, queued: bool
) -> None:
    runner = PagedFakeRunner()
    there, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> str:
        there.set()
        assert go_on.wait(10)
        return "a"

    if queued:
        runner.before_step = wait
    else:
        runner.read_adapter = wait  # type: ignore[method-assign]
    engine = started(runner)
    try:
        running = engine.submit(ask(""))
        loading = asyncio.create_task(engine.load_adapter("a", tmp_path, "here"))
        assert await asyncio.to_thread(there.wait, 10)
        await asyncio.sleep(0.05 if queued else 0)  # until it waits for the step's end
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        go_on.set()
        assert (await last(running)).finish_reason == "length"
        runner.read_adapter = lambda folder: "a"  # type: ignore[method-assign]
        await engine.load_adapter("a", tmp_path, "there")
        assert engine.adapters() == {"a": "there"}
        assert runner.adapters == {"a/2"}
    finally:
        go_on.set()
        await engine.close()


async def test_a_closing_engine_answers_who_waits(tmp_path: Path) -> None:
    engine = started(PagedFakeRunner(max_model_len=4000, num_blocks=1200))
    await engine.load_adapter("a", tmp_path, "x")
    running = asyncio.create_task(last(engine.submit(ask("a", count=3000))))
    leaving = asyncio.create_task(engine.unload_adapter("a"))
    await asyncio.sleep(0.01)
    await engine.close()
    with pytest.raises(InternalError):
        await leaving
    assert (await running).finish_reason == "abort"
