"""GPTQ, AWQ and compressed-tensors give the logits of the numbers that they stand for, both as
numbers and as the codes that kernels take; what does not fit is refused by name."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantised_models import Quantiser, write_awq, write_compressed, write_gptq
from safetensors.torch import load_file, save_file

from cloudlm.core.errors import BrokenModel, UnsupportedModel
from cloudlm.core.settings import EngineSettings
from cloudlm.engine.formats import integers
from cloudlm.engine.formats.base import StoredLinear
from cloudlm.engine.formats.opening import open_checkpoint
from cloudlm.engine.load import load_runner

Write = Callable[..., Quantiser]
# Name -> how it is written, its options, and the precision that keeps its codes.
FORMATS: dict[str, tuple[Write, dict[str, Any], str]] = {
    "gptq": (write_gptq, {}, "int4"),
    "gptq-v2": (write_gptq, {"form": "gptq_v2"}, "int4"),
    "gptq-symmetric": (write_gptq, {"symmetric": True, "biases_of_zeros": True}, "int4"),
    "gptq-one-group": (write_gptq, {"group": -1}, "int4"),
    "gptq-act-order": (write_gptq, {"act_order": True}, ""),
    "gptq-int8": (write_gptq, {"bits": 8}, ""),
    "gptq-int8-rows": (write_gptq, {"bits": 8, "group": -1, "symmetric": True}, "int8"),
    "awq": (write_awq, {}, "int4"),
    "ct-int4": (write_compressed, {"bits": 4, "group": 32}, "int4"),
    "ct-int4-uneven": (write_compressed, {"bits": 4, "group": 64}, "int4"),  # of 96 inputs
    "ct-int4-zeros": (write_compressed, {"bits": 4, "group": 32, "symmetric": False}, "int4"),
    "ct-int4-act-order": (write_compressed, {"bits": 4, "group": 32, "act_order": True}, ""),
    "ct-w8a16": (write_compressed, {"bits": 8}, "int8"),
    "ct-w8a8": (
        write_compressed,
        {"bits": 8, "packed": False, "eight_bit_inputs": True},
        "int8-a8",
    ),
    "ct-w8-zeros": (write_compressed, {"bits": 8, "packed": False, "symmetric": False}, ""),
}


def tokens(seed: int = 3, count: int = 60) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(307) for _ in range(count)]


@pytest.fixture(scope="module")
def written(saved_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Quantiser]:
    """A model in a format, made once."""
    made: dict[str, Quantiser] = {}

    def make(name: str, model: str = "qwen2-heads-32") -> Quantiser:
        if name not in made:
            write, options, _ = FORMATS[name]
            target = tmp_path_factory.mktemp(name)
            made[name] = write(saved_model(model).folder, target, **options)
        return made[name]

    return make


def reference_logits(folder: Path, prompt: list[int]) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0]


def logits(runner: Any, driver: Any, prompt: list[int]) -> torch.Tensor:
    batch = driver(runner, budget=17)
    batch.add(prompt)
    found: torch.Tensor = batch.all_logits()[0]
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_numbers_in_transformers(
    name: str, written: Any, make_runner: Any, driver: Any
) -> None:
    made = written(name)
    expected = reference_logits(made.plain, tokens())
    found = logits(make_runner(made.folder), driver, tokens())
    assert float((found - expected).abs().max()) < 2e-4


@pytest.mark.parametrize("name", FORMATS)
def test_codes_stand_for_the_same_numbers(name: str, written: Any) -> None:
    """Bit for bit: what the kernels would be given, multiplied out, is the matrix."""
    made = written(name)
    checkpoint = open_checkpoint(made.folder)
    assert checkpoint.precision == FORMATS[name][2]
    plain = load_file(made.plain / "model.safetensors")
    kept = [entry for entry in checkpoint.entries if entry.codes is not None]
    # Of one group of 96 inputs the kernels make nothing.
    expected = 6 * 3 if name == "gptq-one-group" else 7 * 3
    assert len(kept) == (expected if checkpoint.precision else 0)
    for entry in kept:
        weight = entry.codes()
        numbers = weight.codes.float()
        if hasattr(weight, "group"):
            groups = torch.arange(numbers.shape[1]) // weight.group
            zeros = torch.tensor(8.0) if weight.zeros is None else weight.zeros.float()[:, groups]
            numbers = (numbers - zeros) * weight.scale[:, groups]
        else:
            numbers = numbers * weight.scale[:, None]
        assert torch.equal(numbers, plain[entry.name])


@pytest.mark.parametrize("name", ["gptq", "awq", "ct-int4", "ct-w8a16", "ct-w8a8"])
@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_kernels_take_the_codes_as_they_are(
    name: str,
    kernels: str,
    written: Any,
    make_runner: Any,
    driver: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As near to float32 as PyTorch in bfloat16 with the same numbers; the log says what was
    kept."""
    from cloudlm.engine.native import build, fallback, load_kernels
    from cloudlm.engine.paths import choice

    if kernels == "native" and (build.find_compiler() is None or not build.instruction_sets()):
        pytest.skip("no C++ compiler on PATH, or a CPU without AVX2")
    if kernels == "torch":  # the twin of the library, under its name
        twin = fallback.TorchKernels()
        twin.name = "twin"  # type: ignore[misc]
        monkeypatch.setattr(choice, "load_kernels", lambda *_, **__: twin)
    else:
        monkeypatch.setattr(choice, "load_kernels", load_kernels)
    made = written(name)
    settings = EngineSettings(device="cpu", kv_cache_mb=2, threads=1, kernels="native")
    with caplog.at_level("INFO"):
        runner = load_runner(made.folder, settings, (), lambda share, what: None)
    assert runner.info.dtype == FORMATS[name][2]
    assert runner.info.weights == f"{FORMATS[name][2]} as stored, bfloat16"
    assert (runner.info.kernels == "twin") == (kernels == "torch")
    fields = [getattr(record, "fields", {}) for record in caplog.records]
    assert {"kept": 21}.items() <= next(one for one in fields if "kept" in one).items()
    expected = reference_logits(made.plain, tokens())
    off = logits(runner, driver, tokens()) - expected
    usual = logits(make_runner(made.plain, dtype="bfloat16"), driver, tokens()) - expected
    share = 4.0 if name == "ct-w8a8" else 1.2  # inputs of 8 bits
    assert float(off.square().mean().sqrt()) < share * float(usual.square().mean().sqrt())
    assert not any(isinstance(one, StoredLinear) for one in runner.model.modules())


@pytest.mark.parametrize("group_size", [100, 128, 2**24])
def test_a_group_is_no_longer_than_its_matrix(
    group_size: int, written: Any, tmp_path: Path
) -> None:
    """One group of all inputs by another name: the kernels fill a matrix up to whole groups, so
    that a size out of nowhere would be asked of the memory."""
    folder = spoil(
        written("gptq-one-group"), tmp_path, lambda t, c: c.update(group_size=group_size)
    )
    checkpoint = open_checkpoint(folder)
    plain = load_file(written("gptq-one-group").plain / "model.safetensors")
    kept = [entry for entry in checkpoint.entries if entry.codes is not None]
    assert len(kept) >= 6 * 3  # those of 64 inputs
    for entry in kept:
        weight = entry.codes()
        assert weight.group in (64, 128), entry.name
        assert weight.group <= entry.shape[1] + 63
        zeros = weight.zeros.float()
        assert torch.equal((weight.codes.float() - zeros) * weight.scale, plain[entry.name])


@given(inputs=st.integers(1, 5000), asked=st.integers(1, 2**24))
def test_a_size_of_groups_is_bounded_and_cuts_alike(inputs: int, asked: int) -> None:
    size = integers.group_size(asked, inputs)
    assert size <= min(asked, inputs + 63)
    assert torch.equal(integers.in_order(inputs, size), integers.in_order(inputs, asked))
    if asked % 64 == 0 or asked == 32 or (inputs % 64 == 0 and asked >= inputs):
        assert integers.runs_in_kernels(size)


def test_an_explicit_precision_of_other_bits_wins(written: Any) -> None:
    settings = EngineSettings(device="cpu", kv_cache_mb=2, threads=1, precision="int8")
    runner = load_runner(written("gptq").folder, settings, (), lambda share, what: None)
    assert (runner.info.dtype, runner.info.weights) == ("int8", "int8")


def spoil(
    made: Quantiser, target: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]
) -> Path:
    """A copy with other tensors or another ``quantization_config``."""

    folder = target / "spoilt"
    shutil.copytree(made.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "change", "kind", "words"),
    [
        ("gptq", lambda t, c: t.pop(f"{Q}.qzeros"), BrokenModel, "qzeros"),
        ("gptq", lambda t, c: t[f"{Q}.g_idx"].fill_(99), BrokenModel, "groups outside"),
        ("gptq", lambda t, c: c.update(group_size=64), BrokenModel, "groups of 64"),
        ("gptq", lambda t, c: c.update(group_size=-7), BrokenModel, "group_size"),
        ("gptq", lambda t, c: c.update(bits=3), UnsupportedModel, "3 bits"),
        ("gptq", lambda t, c: c.update(checkpoint_format="marlin"), UnsupportedModel, "marlin"),
        ("gptq", lambda t, c: t.update({f"{Q}.scales": t[f"{Q}.scales"][:, :8]}), BrokenModel, Q),
        ("gptq", lambda t, c: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:4]}), BrokenModel, Q),
        ("awq", lambda t, c: c.update(version="gemv"), UnsupportedModel, "gemv"),
        ("awq", lambda t, c: t.pop(f"{Q}.scales"), BrokenModel, "scales"),
        ("ct-int4", lambda t, c: t.pop(f"{Q}.weight_shape"), BrokenModel, "weight_shape"),
        ("ct-int4", lambda t, c: t[f"{Q}.weight_shape"].fill_(2**40), BrokenModel, "cannot hold"),
        ("ct-int4", lambda t, c: t[f"{Q}.weight_shape"].fill_(-1), BrokenModel, "cannot hold"),
        ("ct-int4", lambda t, c: c.update(format="float-quantized"), UnsupportedModel, "float"),
        (
            "ct-int4",
            lambda t, c: c.update(transform_config={"a": 1}),
            UnsupportedModel,
            "transform",
        ),
        (
            "ct-int4",
            lambda t, c: c["config_groups"]["group_0"]["weights"].update(group_size=64),
            BrokenModel,
            "of one size",
        ),
        (
            "ct-w8-zeros",
            lambda t, c: t.update(
                {f"{Q}.weight_zero_point": t[f"{Q}.weight_zero_point"][:5, 0].clone()}
            ),
            BrokenModel,
            "weight_zero_point",
        ),
        ("ct-w8a8", lambda t, c: t.pop(f"{Q}.weight_scale"), UnsupportedModel, "I8"),
        ("gptq", lambda t, c: t.pop(f"{Q}.scales"), BrokenModel, "scales"),
    ],
)
def test_faults_are_named(
    name: str, change: Any, kind: type[Exception], words: str, written: Any, tmp_path: Path,
    make_runner: Any,
) -> None:  # fmt: skip
    folder = spoil(written(name), tmp_path, change)
    with pytest.raises(BrokenModel, match=words) as raised:
        make_runner(folder)
    assert type(raised.value) is kind


def test_a_bias_that_is_not_zero_is_not_left_out(
    written: Any, tmp_path: Path, make_runner: Any
) -> None:
    def change(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.up_proj.bias"].fill_(0.5)

    folder = spoil(written("gptq-symmetric"), tmp_path, change)
    with pytest.raises(BrokenModel, match=r"up_proj\.bias"):
        make_runner(folder)
