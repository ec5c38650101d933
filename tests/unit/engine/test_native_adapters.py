"""LoRA on the native path: as near to merged weights as PyTorch's own modules in bfloat16 are, and
nothing changes for others in the batch.

Every test of numbers runs on the library (where a compiler is found) and on its PyTorch twin.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import adapt

from cloudlm.core.errors import NotSupported
from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.native.fallback import TorchKernels
from cloudlm.engine.paths.native_path import NativePath
from cloudlm.engine.runner import Runner, RunnerFacts, Source
from cloudlm.engine.step import Step

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
# model -> what the adapters "a" and "b" adapt
TARGETS = {
    "llama-heads-32": (ALL, ["v_proj", "up_proj"]),
    "mistral-heads-32": (["q_proj", "down_proj"], ALL),
    "qwen3": (["k_proj", "gate_proj"], ["o_proj"]),
    "phi3-heads-32": (FUSED, ["gate_up_proj"]),
}
BLOCKS = 64
NONE = ("", "", "")


@pytest.fixture(params=["library", "twin"])
def kernels(request: pytest.FixtureRequest) -> Any:
    return TorchKernels() if request.param == "twin" else request.getfixturevalue("library")


@pytest.fixture
def load(saved_model: Any, make_runner: Any, kernels: Any) -> Callable[..., Runner]:
    """``load("qwen3", precision="int8")``: a runner on the native path that can sleep."""

    def loader(name: str, precision: str = "bfloat16", *, deterministic: bool = False) -> Runner:
        def network() -> Decoder:
            folder = saved_model(name).folder
            model: Decoder = make_runner(folder, dtype="bfloat16", kernels="torch").model
            return model

        def on_kernels(model: Decoder) -> NativePath:
            return NativePath(model, kernels, precision, BLOCKS, 32, deterministic=deterministic)

        facts = RunnerFacts(name, 256, BLOCKS, 32, deterministic=deterministic)
        return Runner(network(), facts, Source(network, ()), on_kernels)

    return loader


@pytest.fixture
def adapters(saved_model: Any, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """``adapters("qwen3")``: two in ``tmp_path``, and by name the weights with them merged."""

    def make(name: str) -> dict[str, Any]:
        reference, (a, b) = saved_model(name).reference, TARGETS[name]
        return {
            "": reference,
            "a": adapt(reference, a, tmp_path / "a", 1),
            "b": adapt(reference, b, tmp_path / "b", 2, r=37, lora_alpha=20, use_rslora=True),
        }

    return make


def add_all(runner: Runner, folder: Path) -> Runner:
    for key in "ab":
        runner.add_adapter(key, runner.read_adapter(folder / key))
    return runner


def crowd(batch: Any, names: tuple[str, ...] = ("", "a", "b")) -> Any:
    draw = random.Random(5)
    for number in range(9):
        prompt = [draw.randrange(307) for _ in range(draw.randint(1, 60))]
        batch.add(prompt, adapter=names[number % 3])
    return batch


def off(batch: Any, models: dict[str, Any]) -> float:
    """Root mean square of the logits' errors, relative to those of float32 with merged weights."""
    found = torch.cat(batch.all_logits())
    names = ("", "a", "b") * 3
    with torch.inference_mode():
        exact = torch.cat(
            [
                models[name](torch.tensor([one.prompt])).logits[0]
                for name, one in zip(names, batch.sequences, strict=True)
            ]
        )
    return float((found - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())


@pytest.mark.parametrize("name", list(TARGETS))
def test_mixed_batches_are_as_near_to_merged_weights_as_pytorch(
    load: Any,
    adapters: Any,
    driver: Any,
    saved_model: Any,
    make_runner: Any,
    tmp_path: Path,
    name: str,
) -> None:
    models = adapters(name)
    plain = make_runner(saved_model(name).folder, dtype="bfloat16", kernels="torch")
    usual = off(crowd(driver(add_all(plain, tmp_path))), models)
    assert 0 < usual < 0.15
    runner = add_all(load(name), tmp_path)
    for budget in (1000, 23):
        assert off(crowd(driver(runner, budget=budget)), models) < 1.1 * usual
    for key in "ab":
        runner.remove_adapter(key)
    assert off(crowd(driver(runner), NONE), models) > 0.3  # they had their part in it


@pytest.mark.parametrize(("precision", "largest"), [("int8", 0.06), ("int4", 0.7)])
def test_a_quantised_base_takes_them_too(
    load: Any, adapters: Any, driver: Any, tmp_path: Path, precision: str, largest: float
) -> None:
    models = adapters("qwen3")
    runner = add_all(load("qwen3", precision), tmp_path)
    assert off(crowd(driver(runner)), models) < largest


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4-a8"])
def test_who_has_none_gets_the_same_to_the_bit(
    load: Any, adapters: Any, driver: Any, tmp_path: Path, precision: str
) -> None:
    adapters("llama-heads-32")
    runner = add_all(load("llama-heads-32", precision), tmp_path)
    beside = crowd(driver(runner)).all_logits()
    alone = crowd(driver(runner), NONE).all_logits()
    assert all(torch.equal(one, other) for one, other in zip(beside[::3], alone[::3], strict=True))
    assert not torch.equal(beside[1], alone[1])


def test_they_outlive_sleep(load: Any, adapters: Any, driver: Any, tmp_path: Path) -> None:
    adapters("qwen3")
    runner = add_all(load("qwen3"), tmp_path)
    before = crowd(driver(runner)).all_logits()
    runner.sleep(1)
    runner.remove_adapter("b")
    runner.wake()
    after = crowd(driver(runner), ("", "a", "")).all_logits()
    for number in (0, 1, 3, 4, 6, 7):
        assert torch.equal(before[number], after[number])
    with pytest.raises(KeyError):
        crowd(driver(runner)).all_logits()


def test_deterministic_ones_depend_on_nothing_else(
    load: Any, adapters: Any, driver: Any, tmp_path: Path, kernels: Any
) -> None:
    if isinstance(kernels, TorchKernels):
        pytest.skip("PyTorch's products depend on their shapes; such a start is refused")
    adapters("mistral-heads-32")
    runner = add_all(load("mistral-heads-32", deterministic=True), tmp_path)
    alone = []
    for one in crowd(driver(runner)).sequences:
        lonely = driver(runner)
        lonely.add(one.prompt, adapter=one.adapter)
        alone += lonely.all_logits()
    for budget in (7, 23, 1000):
        together = crowd(driver(runner, budget=budget, seed=budget)).all_logits()
        assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def test_on_pytorchs_modules_deterministic_batches_take_none(
    saved_model: Any, make_runner: Any, adapters: Any, tmp_path: Path
) -> None:
    adapters("qwen3")
    runner = make_runner(saved_model("qwen3").folder, deterministic=True)
    adapter = runner.read_adapter(tmp_path / "a")
    with pytest.raises(NotSupported, match="kernels = native"):
        runner.add_adapter("a", adapter)
    assert runner.run(Step(())) == []
