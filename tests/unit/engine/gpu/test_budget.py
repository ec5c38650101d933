"""How much cache a GPU gets, who computes there, and what is said when there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import EngineSettings
from cloudlm.engine import load
from cloudlm.engine.gpu.accelerator import HostAccelerator
from cloudlm.engine.gpu.budget import Load, cache_bytes
from cloudlm.engine.load import load_runner, pick_device
from cloudlm.engine.paths import choice, gpu_choice
from cloudlm.engine.paths.gpu_choice import choose_operations, make_operations, triton_obstacle
from cloudlm.engine.paths.gpu_path import memory_load

GIB = 2**30


def test_the_cache_gets_what_is_left() -> None:
    """What others have taken of the GPU is not ours, nor what weights and a step need."""
    needs = Load(16 * GIB, 28672, 128256, batch_tokens=8192, batch_sequences=256)
    assert 3 * GIB < needs.working_bytes < 10 * GIB
    whole = cache_bytes(80 * GIB, 80 * GIB, 0.9, needs)
    assert whole == int(72 * GIB) - 16 * GIB - needs.working_bytes
    assert cache_bytes(70 * GIB, 80 * GIB, 0.9, needs) == whole - 10 * GIB


def test_a_gpu_that_is_too_small_is_named_with_its_numbers() -> None:
    needs = Load(16 * GIB, 28672, 128256, batch_tokens=1024, batch_sequences=64)
    with pytest.raises(BadSetting, match=r"gpu_memory_utilization = 0.9 leaves 14.4 GiB of 16.0"):
        cache_bytes(16 * GIB, 16 * GIB, 0.9, needs)
    with pytest.raises(BadSetting, match=r"leaves 0\.0 GiB"):
        cache_bytes(1 * GIB, 16 * GIB, 0.9, needs)


def test_what_weights_take(saved_model: Any, make_runner: Any) -> None:
    """As many bytes as the packed network has, within the few that norms and biases make."""
    model = make_runner(saved_model("llama-wide-heads").folder, kernels="torch").model
    matrices = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    vocabulary = 307 * 64
    found = {
        precision: memory_load(
            model, precision, torch.bfloat16, batch_tokens=1, batch_sequences=1
        ).weights_bytes
        for precision in ("bfloat16", "int8", "int4")
    }
    assert found["bfloat16"] == 2 * sum(p.numel() for p in model.parameters())
    assert matrices + 5 * vocabulary < found["int8"] < 1.2 * matrices + 5.2 * vocabulary
    assert found["int4"] < found["int8"] - 0.45 * matrices


@pytest.fixture
def network(saved_model: Any, make_runner: Any) -> Any:
    return lambda name: make_runner(saved_model(name).folder, kernels="torch").model


@pytest.mark.parametrize(
    ("settings", "obstacle", "operations"),
    [
        ({}, None, "triton"),
        ({"kernels": "native"}, None, "triton"),
        ({"precision": "int4"}, None, "triton"),
        ({}, "no Triton", ""),
        ({"kernels": "torch"}, None, ""),
        ({"precision": "int8"}, "no Triton", "torch"),
        ({"precision": "int8", "kernels": "torch"}, None, "torch"),
    ],
)
def test_who_computes(
    network: Any, settings: dict[str, str], obstacle: str | None, operations: str
) -> None:
    assert choose_operations(network("llama"), EngineSettings(**settings), obstacle) == operations


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("llama", {"kernels": "native"}, "native cannot be had on this GPU: no Triton"),
        ("llama", {"precision": "int8-a8"}, "int8-a8 is for CPUs; a GPU has int8 and int4"),
        ("gpt2", {"precision": "int4"}, "GPT2LMHeadModel has no quantised form"),
    ],
)
def test_what_cannot_be_had_is_refused(
    network: Any, name: str, settings: dict[str, str], words: str
) -> None:
    with pytest.raises(BadSetting, match=words):
        choose_operations(network(name), EngineSettings(**settings), "no Triton")


def test_triton_is_told_from_its_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_choice.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'cloudlm[gpu]'" in (triton_obstacle() or "")
    monkeypatch.setattr(gpu_choice.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(gpu_choice.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert "install gcc" in (triton_obstacle() or "")
    monkeypatch.setenv("CC", "/opt/cc")
    assert triton_obstacle() is None


def test_cuda_that_is_missing_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BadSetting, match=r"device cuda asked for, but .* was built without it"):
        pick_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(BadSetting, match=r"built for CUDA 13.0 and finds no device"):
        pick_device("cuda")
    assert pick_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("precision", ["auto", "int4"])
def test_a_folder_is_loaded_onto_a_gpu(
    saved_model: Any, driver: Any, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The whole way from settings to tokens, with the CPU in the GPU's place: the cache's size
    comes from the GPU's memory, and the setting of graphs reaches the path."""
    asked: list[torch.device] = []

    def memory(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 3 * GIB, 3 * GIB

    monkeypatch.setattr(load, "pick_device", lambda wanted: torch.device("cuda"))
    monkeypatch.setattr(choice, "triton_obstacle", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    import cloudlm.engine.gpu.accelerator as accelerators

    monkeypatch.setattr(accelerators, "CudaAccelerator", lambda device: HostAccelerator())
    twin = make_operations("torch", HostAccelerator())
    monkeypatch.setattr(gpu_choice, "make_operations", lambda name, accelerator: twin)
    folder: Path = saved_model("llama").folder
    settings = EngineSettings(
        device="cuda",
        dtype="bfloat16" if precision == "int4" else "float32",
        precision=precision,
        max_model_len=64,
        max_batch_sequences=2,
        block_size=8,
        gpu_memory_utilization=0.51,
    )
    runner = load_runner(folder, settings, (), lambda share, what: None)
    assert asked == [torch.device("cuda")]
    assert runner.info.dtype == ("int4" if precision == "int4" else "float32")
    assert 10 * 2**20 < runner._pool.blocks.nbytes < 100 * 2**20
    assert runner._path is not None and runner._path._graphs is not None
    batch = driver(runner)
    one = batch.add([5, 6, 7])
    batch.run(4)
    assert len(one.output) == 4
    if precision == "auto":
        assert saved_model("llama").greedy_along(one.prompt, one.output) == one.output
