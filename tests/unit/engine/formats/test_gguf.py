"""GGUF: blocks as llama.cpp's package reads them, models with the logits of transformers."""

from __future__ import annotations

import copy
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cloudlm.core.errors import BrokenModel, UnsupportedModel
from cloudlm.core.settings import EngineSettings
from cloudlm.engine.formats.gguf_blocks import BLOCKS
from cloudlm.engine.formats.opening import open_checkpoint
from cloudlm.engine.load import load_runner
from cloudlm.registry.gguf.folder import write_model_folder
from cloudlm.registry.gguf.header import KINDS

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

TOLERANCE = 2e-4
# Where a block's float16 scales lie.
HALVES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "Q4_1": (0, 2), "Q5_1": (0, 2),
}  # fmt: skip
# Names in ``conftest.MODELS``, all within what GGUF can say; ``yarn`` last trains to 256.
MODELS = (
    "llama", "llama-tied", "llama-wide-heads", "llama3-rope", "linear-rope", "yarn-rope", "qwen2",
    "qwen3", "phi3", "phi4-mini", "gemma2-usual", "gemma3-usual",
)  # fmt: skip


def tokens(count: int = 50, seed: int = 3) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(307) for _ in range(count)]


def folder_of(path: Path, target: Path) -> Path:
    target.mkdir()
    write_model_folder(path, target, {})
    return target


def logits(runner: Any, driver: Any, prompt: list[int]) -> torch.Tensor:
    batch = driver(runner, budget=17)
    batch.add(prompt)
    found: torch.Tensor = batch.all_logits()[0]
    return found


def written(saved: Any, path: Path, kind: str = "F32", **options: Any) -> Path:
    from gguf_models import write_gguf

    return write_gguf(saved.reference, path, gguf.GGMLQuantizationType[kind], **options)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_read_as_llama_cpp_reads_them(name: str) -> None:
    kind = next(kind for kind in KINDS.values() if kind.name == name)
    generator = np.random.default_rng(5)
    raw = generator.integers(0, 256, (70, kind.size_bytes), dtype=np.uint8)
    for at in HALVES.get(name, (0,)):
        scale = generator.normal(size=(70, 1)).astype(np.float16)
        raw[:, at : at + 2] = scale.view(np.uint8)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    found = BLOCKS[name](torch.from_numpy(raw))
    assert found.shape == (70, kind.elements)
    assert np.array_equal(found.numpy(), expected)


def test_the_kinds_have_the_sizes_that_llama_cpp_has() -> None:
    for number, kind in KINDS.items():
        assert gguf.GGML_QUANT_SIZES[number] == (kind.elements, kind.size_bytes)
        assert gguf.GGMLQuantizationType(number).name == kind.name


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(
    name: str, saved_model: Any, make_runner: Any, driver: Any, tmp_path: Path
) -> None:
    saved = saved_model(name)
    path = written(saved, tmp_path / "x.gguf")
    folder = folder_of(path, tmp_path / "folder")
    runner = make_runner(folder, max_model_len=saved.max_model_len)
    found = logits(runner, driver, tokens())
    assert float((found - saved.logits(tokens())).abs().max()) < TOLERANCE


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_files_give_the_numbers_of_llama_cpp(
    kind: str, saved_model: Any, make_runner: Any, driver: Any, tmp_path: Path
) -> None:
    saved = saved_model("llama-heads-32-plain")
    rounded = copy.deepcopy(saved.reference)
    for parameter in rounded.parameters():
        number = gguf.GGMLQuantizationType[kind]
        if parameter.dim() == 2 and parameter.shape[1] % gguf.GGML_QUANT_SIZES[number][0] == 0:
            raw = gguf.quants.quantize(parameter.detach().numpy(), number)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(raw, number).copy())
    with torch.inference_mode():
        expected = rounded(torch.tensor([tokens()])).logits[0]
    path = written(saved, tmp_path / "x.gguf", kind)
    found = logits(make_runner(folder_of(path, tmp_path / "f")), driver, tokens())
    assert float((found - expected).abs().max()) < TOLERANCE


def test_q4_0_stays_as_it_is_on_the_kernels(
    saved_model: Any, driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloudlm.engine.native.fallback import TorchKernels
    from cloudlm.engine.paths import choice

    twin = TorchKernels()
    twin.name = "twin"  # type: ignore[misc]
    monkeypatch.setattr(choice, "load_kernels", lambda *_, **__: twin)
    folder = folder_of(
        written(saved_model("llama-heads-32-plain"), tmp_path / "x.gguf", "Q4_0"), tmp_path / "f"
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.precision == "int4"
    for entry in checkpoint.entries:
        if entry.codes is not None:
            weight = entry.codes()
            groups = torch.arange(weight.codes.shape[1]) // weight.group
            numbers = (weight.codes.float() - 8) * weight.scale[:, groups]
            assert torch.equal(numbers, entry.floats(torch.float32, True))
    settings = EngineSettings(device="cpu", kv_cache_mb=2, threads=1, kernels="native")
    runner = load_runner(folder, settings, (), lambda share, what: None)
    assert runner.info.dtype == "int4"
    plain = EngineSettings(device="cpu", kv_cache_mb=2, threads=1, kernels="torch")
    exact = load_runner(folder, plain, (), lambda share, what: None)
    rounded = load_runner(folder, replace(plain, dtype="bfloat16"), (), lambda share, what: None)
    found, expected, usual = (logits(one, driver, tokens()) for one in (runner, exact, rounded))
    off, allowed = (one - expected for one in (found, usual))
    assert float(off.square().mean()) < 1.5 * float(allowed.square().mean())


def test_an_unknown_tensor_and_a_wrong_shape_are_named(
    saved_model: Any, make_runner: Any, tmp_path: Path
) -> None:
    folder = folder_of(written(saved_model("qwen2"), tmp_path / "x.gguf"), tmp_path / "f")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32, "head_dim": 8}))
    with pytest.raises(BrokenModel, match=r"model\.gguf: tensor .* has shape"):
        make_runner(folder)
    raw = (folder / "model.gguf").read_bytes().replace(b"blk.1.attn_k.bias", b"blk.1.attn_z.bias")
    (folder / "model.gguf").unlink()
    (folder / "model.gguf").write_bytes(raw)
    with pytest.raises(UnsupportedModel, match=r"attn_z.*not known for qwen2"):
        make_runner(folder)


def test_two_files_are_not_guessed_at(saved_model: Any, make_runner: Any, tmp_path: Path) -> None:
    folder = folder_of(written(saved_model("qwen2"), tmp_path / "x.gguf"), tmp_path / "f")
    shutil.copy(folder / "model.gguf", folder / "other.gguf")
    with pytest.raises(BrokenModel, match="2 GGUF files"):
        make_runner(folder)
