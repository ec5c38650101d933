"""Every architecture against transformers on random weights: logits and greedy answers."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cloudlm.core.errors import BrokenModel, UnsupportedModel
from cloudlm.engine.architectures import SUPPORTED, find_architecture
from cloudlm.engine.architectures.config import ModelConfig

NAMES = (
    "llama",
    "llama-tied",
    "llama-wide-heads",
    "llama-biased",
    "llama3-rope",
    "linear-rope",
    "mistral",
    "mistral-window",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "gpt2",
    "gpt2-by-layer",
    "yarn-rope",
    "gemma2",
    "gemma3",
    "olmo2",
    "phi3",
    "phi4-mini",
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
    "gpt-neox",
    "gpt-neox-sequential",
    "falcon-7b",
    "falcon-40b",
    "falcon-11b",
    "falcon-sequential",
)
LENGTHS = (1, 5, 17, 40, 71)
TOLERANCE = 2e-4
HALF = ("gemma2", "gemma3", "olmo2", "phi3", "qwen2-moe", "gpt-neox", "falcon-40b")


def prompts(seed: int = 5) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(307) for _ in range(length)] for length in LENGTHS]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_answer_alone_is_that_of_transformers(
    name: str, saved_model: Any, make_runner: Any, driver: Any
) -> None:
    saved = saved_model(name)
    prompt = prompts()[2]
    runner = make_runner(saved.folder, max_model_len=saved.max_model_len)
    alone = driver(runner, budget=7)
    sequence = alone.add(prompt)
    alone.run(64)
    assert sequence.output == saved.greedy_along(prompt, sequence.output)
    assert len(set(sequence.output)) > 10, "the model's answer is too monotonous to prove anything"


@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_in_a_mixed_batch_are_those_of_transformers(
    name: str, saved_model: Any, make_runner: Any, driver: Any
) -> None:
    saved = saved_model(name)
    runner = make_runner(saved.folder, max_model_len=saved.max_model_len)
    batch = driver(runner, budget=24)
    for prompt in prompts()[:3]:
        batch.add(prompt)
    for _ in range(5):
        batch.step(64)
    for prompt in prompts()[3:]:  # these come while the others are decoding
        batch.add(prompt)
    batch.run(64)
    for sequence in batch.sequences:
        assert len(sequence.output) == 64
        assert sequence.output == saved.greedy_along(sequence.prompt, sequence.output)


@pytest.mark.parametrize("budget", [1000, 13])
@pytest.mark.parametrize("name", NAMES)
def test_logits_of_every_position_are_those_of_transformers(
    name: str, budget: int, saved_model: Any, make_runner: Any, driver: Any
) -> None:
    saved = saved_model(name)
    runner = make_runner(saved.folder, max_model_len=saved.max_model_len)
    batch = driver(runner, budget=budget)
    for prompt in prompts(seed=8):
        batch.add(prompt)
    for sequence, logits in zip(batch.sequences, batch.all_logits(), strict=True):
        expected = saved.logits(sequence.prompt)
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3", "gpt2", *HALF])
def test_half_precision_stays_near_float32(
    name: str, dtype: str, saved_model: Any, make_runner: Any, driver: Any
) -> None:
    saved = saved_model(name)
    runner = make_runner(saved.folder, dtype=dtype)
    assert runner.info.dtype == dtype
    batch = driver(runner, budget=13)
    for prompt in prompts():
        batch.add(prompt)
    for sequence, logits in zip(batch.sequences, batch.all_logits(), strict=True):
        expected = saved.logits(sequence.prompt)
        error = (logits - expected).pow(2).mean() / expected.pow(2).mean()
        assert error.item() < 0.02


def test_old_configurations_mean_the_same_as_new_ones(
    saved_model: Any, make_runner: Any, driver: Any, tmp_path: Path
) -> None:
    """Before transformers 5: rope_theta and rope_scaling, torch_dtype."""
    saved = saved_model("llama3-rope")
    folder = tmp_path / "old"
    shutil.copytree(saved.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {**rope, "type": rope.pop("rope_type")}
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    prompt = prompts()[4]
    old = driver(make_runner(folder))
    old.add(prompt)
    assert (old.all_logits()[0] - saved.logits(prompt)).abs().max().item() < TOLERANCE


def test_gpt2_files_without_prefix_and_with_mask_buffers_load(
    saved_model: Any, make_runner: Any, driver: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    saved = saved_model("gpt2")
    folder = tmp_path / "old"
    shutil.copytree(saved.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 256, 256)
    old["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(old, folder / "model.safetensors")
    runner = driver(make_runner(folder))
    runner.add(prompts()[3])
    assert (runner.all_logits()[0] - saved.logits(prompts()[3])).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("names", [["BertModel"], [], None, "LlamaForCausalLM", [7]])
def test_an_unsupported_architecture_is_named_with_those_supported(names: Any) -> None:
    with pytest.raises(UnsupportedModel) as raised:
        find_architecture(names)
    assert "LlamaForCausalLM" in str(raised.value)
    assert "Qwen3ForCausalLM" in str(raised.value)
    if names == ["BertModel"]:
        assert "BertModel" in str(raised.value)


def test_all_registered_architectures_can_be_imported() -> None:
    assert [find_architecture([name])[1].__name__ for name in SUPPORTED] == list(SUPPORTED)


LLAMA = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 300,
}


@pytest.mark.parametrize(
    ("field", "value", "kind", "words"),
    [
        ("hidden_size", None, BrokenModel, "hidden_size is missing"),
        ("hidden_size", "64", BrokenModel, "hidden_size is '64', expected a whole number"),
        ("num_hidden_layers", 10**9, BrokenModel, "num_hidden_layers is 1000000000"),
        ("num_key_value_heads", 3, BrokenModel, "divisor of num_attention_heads"),
        ("head_dim", 15, BrokenModel, "even"),
        ("rms_norm_eps", float("nan"), BrokenModel, "rms_norm_eps"),
        ("hidden_act", "mystery", BrokenModel, "hidden_act is 'mystery', expected one of silu"),
        ("tie_word_embeddings", "yes", BrokenModel, "true or false"),
        ("rope_scaling", {"rope_type": "spiral", "factor": 2.0}, UnsupportedModel, "'spiral'"),
        ("rope_scaling", {"rope_type": "linear"}, BrokenModel, "factor is missing"),
        ("rope_scaling", [1], BrokenModel, "rope_scaling is [1], expected a JSON object"),
        ("partial_rotary_factor", 0.5, UnsupportedModel, "partial_rotary_factor"),
        ("vocab_size", True, BrokenModel, "vocab_size"),
    ],
)
def test_a_bad_configuration_names_the_field(
    field: str, value: Any, kind: type[Exception], words: str
) -> None:
    _, llama = find_architecture(["LlamaForCausalLM"])
    with torch.device("meta"):
        llama.from_config(ModelConfig(LLAMA))
        with pytest.raises(kind) as raised:
            llama.from_config(ModelConfig({**LLAMA, field: value}))
    assert type(raised.value) is kind
    assert words in str(raised.value)
    assert "config.json" in str(raised.value)


def test_bad_layer_types_are_refused() -> None:
    _, qwen2 = find_architecture(["Qwen2ForCausalLM"])
    values = {**LLAMA, "use_sliding_window": True, "layer_types": ["full_attention"]}
    with pytest.raises(BrokenModel, match="layer_types"), torch.device("meta"):
        qwen2.from_config(ModelConfig(values))


def test_gpt2_heads_must_divide_the_width() -> None:
    _, gpt2 = find_architecture(["GPT2LMHeadModel"])
    with pytest.raises(BrokenModel, match="n_head is 5"), torch.device("meta"):
        gpt2.from_config(ModelConfig({"n_embd": 64, "n_head": 5}))
