"""A model's figures from what families of models write into their config.json."""

from __future__ import annotations

from typing import Any

import pytest

from cloudlm.core.errors import BrokenModel
from cloudlm.core.figures import ModelFigures, figures_of
from cloudlm.core.model import Manifest, ModelFile

LLAMA = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "vocab_size": 128_256,
}


def manifest(parameters: int = 8_030_261_248, weights_bytes: int = 16_060_522_496) -> Manifest:
    return Manifest(
        name="m",
        version=1,
        files=(
            ModelFile("model.safetensors", weights_bytes, "0" * 64),
            ModelFile("tokenizer.json", 9_000_000, "1" * 64),
        ),
        parameters=parameters,
        task="generate",
        architecture="LlamaForCausalLM",
        precision="bfloat16",
        context_length=8192,
        created_at=0.0,
    )


def figures(precision: str | None = None, **changes: Any) -> ModelFigures:
    config = {name: value for name, value in {**LLAMA, **changes}.items() if value is not None}
    return figures_of(manifest(), config, precision)


def test_a_llama() -> None:
    found = figures()
    assert (found.layers, found.kv_heads, found.head_dim) == (32, 8, 128)
    assert found.weights_bytes == pytest.approx(16_060_522_496)
    assert found.cache_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert found.active == found.parameters
    assert found.widest == 2 * 14_336


def test_a_lower_precision_weighs_less() -> None:
    assert figures("int8").weights_bytes < 0.51 * figures().weights_bytes
    assert figures("int4").weights_bytes < 0.28 * figures().weights_bytes


def test_other_names_and_defaults() -> None:
    gpt = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50_257}
    found = figures_of(manifest(), gpt)
    assert (found.layers, found.kv_heads, found.head_dim, found.widest) == (12, 12, 64, 6144)
    assert figures(head_dim=256).head_dim == 256
    assert figures(num_key_value_heads=None).kv_heads == 32
    falcon = {**LLAMA, "multi_query": True}
    del falcon["num_key_value_heads"]
    assert figures_of(manifest(), falcon).kv_heads == 1
    inside = {"text_config": LLAMA, "vision_config": {"hidden_size": 1}}
    assert figures_of(manifest(), inside).hidden_size == 4096


def test_experts_that_rest_do_not_work() -> None:
    found = figures(num_local_experts=8, num_experts_per_tok=2)
    idle = 6 * 3 * 4096 * 14_336 * 32
    assert found.active == max(1, found.parameters - idle)


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_size", None), ("num_hidden_layers", "32"), ("vocab_size", -1), ("vocab_size", 1.5)],
)
def test_a_broken_config_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(BrokenModel, match=name):
        figures(**{name: value})
