"""What only some families have, against transformers: rotary scalings, layer kinds, soft caps,
experts, older files and configurations; and what their readers refuse."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cloudlm.core.errors import BrokenModel, UnsupportedModel
from cloudlm.engine.architectures import find_architecture
from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.rope_config import read_rope
from cloudlm.engine.architectures.transformer_config import TransformerConfig

TOLERANCE = 2e-4


def tokens(count: int, seed: int = 3) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(307) for _ in range(count)]


def largest_error(runner: Any, driver: Any, saved: Any, prompts: list[list[int]]) -> float:
    batch = driver(runner, budget=200)
    for prompt in prompts:
        batch.add(prompt)
    return max(
        float((logits - saved.logits(sequence.prompt)).abs().max())
        for sequence, logits in zip(batch.sequences, batch.all_logits(), strict=True)
    )


@pytest.mark.parametrize("name", ["gemma2", "gemma2-tied", "qwen3-moe"])
def test_logits_of_a_long_prompt_are_those_of_transformers(
    name: str, saved_model: Any, make_runner: Any, driver: Any
) -> None:
    saved = saved_model(name)
    runner = make_runner(saved.folder)
    assert largest_error(runner, driver, saved, [tokens(199), tokens(140)]) < TOLERANCE


def test_beyond_the_trained_context_longrope_has_the_long_divisors(
    saved_model: Any, make_runner: Any, driver: Any
) -> None:
    saved = saved_model("phi4-mini-long")
    runner = make_runner(saved.folder)
    prompts = [tokens(17), tokens(40, seed=4), tokens(71, seed=5)]
    assert largest_error(runner, driver, saved, prompts) < TOLERANCE
    batch = driver(runner, budget=24)
    for prompt in prompts:
        batch.add(prompt)
    batch.run(64)
    for sequence in batch.sequences:
        assert sequence.output == saved.greedy_along(sequence.prompt, sequence.output)


@pytest.mark.parametrize(("longest", "lengths"), [(64, (5, 40, 64)), (71, (71,)), (200, (200,))])
def test_dynamic_rope_is_that_of_transformers_at_the_longest_sequence(
    longest: int, lengths: tuple[int, ...], saved_model: Any, make_runner: Any, driver: Any
) -> None:
    """Within the trained context of 64 nothing is stretched."""
    saved = saved_model("dynamic-rope")
    runner = make_runner(saved.folder, max_model_len=longest)
    prompts = [tokens(length) for length in lengths]
    assert largest_error(runner, driver, saved, prompts) < TOLERANCE


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
DIVISORS = {
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [2.0 + i for i in range(16)],
    "original_max_position_embeddings": 128,
}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    {"rope_type": "yarn", **YARN},
    {"rope_type": "yarn", **YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    {"rope_type": "yarn", **YARN, "attention_factor": 1.25},
    {"rope_type": "yarn", **YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 256},
    {"rope_type": "longrope", **DIVISORS},
    {"rope_type": "longrope", **DIVISORS, "factor": 8.0},
    {"rope_type": "longrope", **DIVISORS, "attention_factor": 1.5},
]


@pytest.mark.parametrize("old_form", [False, True])
@pytest.mark.parametrize("longest", [100, 700])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: "-".join(rope)[:40])
def test_frequencies_are_those_of_transformers(
    rope: dict[str, Any], longest: int, old_form: bool
) -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 256}
    reference = transformers.LlamaConfig(**sizes, rope_parameters={**rope, "rope_theta": 50000.0})
    plain = LlamaRotaryEmbedding.compute_default_rope_parameters
    init = ROPE_INIT_FUNCTIONS.get(rope["rope_type"], plain)
    expected, magnitude = init(reference, device=torch.device("cpu"), seq_len=longest)

    if old_form:
        renamed = {"type" if name == "rope_type" else name: rope[name] for name in rope}
        fields: dict[str, Any] = {"rope_theta": 50000.0, "rope_scaling": renamed}
    else:
        fields = {"rope_parameters": {**rope, "rope_theta": 50000.0}}
    read = read_rope(ModelConfig({**sizes, **fields}), head_dim=32, context=256)
    found = read.scaling.frequencies(read.dim, read.theta, longest)
    assert read.dim == 32
    assert read.scaling.magnitude == pytest.approx(magnitude, rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 4.0}, 1024),
        ({"rope_type": "yarn", **YARN}, 256),
        ({"rope_type": "yarn", **YARN, "factor": 10.0}, 640),
        ({"rope_type": "longrope", **DIVISORS}, 256),
    ],
)
def test_a_scaling_that_stretches_on_demand_widens_the_context(
    rope: dict[str, Any], context: int
) -> None:
    read = read_rope(ModelConfig({"rope_parameters": rope}), head_dim=32, context=256)
    assert read.scaling.reach(256) == context


def describe(architecture: str, values: dict[str, Any]) -> TransformerConfig:
    _, network = find_architecture([architecture])
    description = network.read(ModelConfig(values))  # type: ignore[attr-defined]
    assert isinstance(description, TransformerConfig)
    return description


SIZES = {
    "vocab_size": 307,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 12,
}
SHORT = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("architecture", "old", "new"),
    [
        (
            "Gemma3ForCausalLM",
            {
                "rope_theta": 2e6,
                "rope_local_base_freq": 9000.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "sliding_window_pattern": 6,
            },
            {
                "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 9000.0},
                },
            },
        ),
        (
            "Gemma2ForCausalLM",
            {},
            {"layer_types": ["sliding_attention", "full_attention"] * 6, "sliding_window": 4096},
        ),
        (
            "Qwen2MoeForCausalLM",
            {"max_window_layers": 4},
            {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"] * 8},
        ),
        (
            "GPTNeoXForCausalLM",
            {"rotary_emb_base": 20000, "rotary_pct": 0.5},
            {"rope_parameters": {"rope_theta": 20000.0, "partial_rotary_factor": 0.5}},
        ),
        ("GPTNeoXForCausalLM", {}, {"rope_parameters": {"partial_rotary_factor": 0.25}}),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": {"type": "su", **SHORT}, "original_max_position_embeddings": 64},
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    **SHORT,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        ("MixtralForCausalLM", {}, {"rope_parameters": {"rope_theta": 1e6}}),
        ("Qwen3MoeForCausalLM", {}, {"num_experts": None, "num_local_experts": 6}),
    ],
)
def test_old_configurations_and_defaults_mean_the_same_as_new_ones(
    architecture: str, old: dict[str, Any], new: dict[str, Any]
) -> None:
    shared = {
        **SIZES,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "use_sliding_window": architecture == "Qwen2MoeForCausalLM",
    }
    assert describe(architecture, {**shared, **old}) == describe(architecture, {**shared, **new})


@pytest.mark.parametrize(
    ("architecture", "config_name"),
    [
        ("LlamaForCausalLM", "LlamaConfig"),
        ("MistralForCausalLM", "MistralConfig"),
        ("Qwen2ForCausalLM", "Qwen2Config"),
        ("Qwen3ForCausalLM", "Qwen3Config"),
        ("Qwen2MoeForCausalLM", "Qwen2MoeConfig"),
        ("Qwen3MoeForCausalLM", "Qwen3MoeConfig"),
        ("Gemma2ForCausalLM", "Gemma2Config"),
        ("Gemma3ForCausalLM", "Gemma3TextConfig"),
        ("Phi3ForCausalLM", "Phi3Config"),
        ("Olmo2ForCausalLM", "Olmo2Config"),
        ("MixtralForCausalLM", "MixtralConfig"),
        ("GPTNeoXForCausalLM", "GPTNeoXConfig"),
        ("FalconForCausalLM", "FalconConfig"),
    ],
)
def test_what_a_file_leaves_out_has_the_default_of_transformers(
    architecture: str, config_name: str
) -> None:
    import transformers

    whole = getattr(transformers, config_name)().to_dict()
    sizes = re.compile(
        r"vocab_size|hidden_size|num_.*(layers|heads|experts|tok)|.*intermediate_size"
    )
    bare = {name: value for name, value in whole.items() if sizes.fullmatch(name)}
    assert describe(architecture, bare) == describe(architecture, whole)


def test_old_neox_files_carry_masks_and_tables_that_are_not_needed(
    saved_model: Any, make_runner: Any, driver: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    saved = saved_model("gpt-neox")
    folder = tmp_path / "old"
    shutil.copytree(saved.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        attention = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{attention}.bias"] = torch.ones(1, 1, 256, 256)
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{attention}.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors")
    assert largest_error(make_runner(folder), driver, saved, [tokens(30)]) < TOLERANCE


def test_a_dense_layer_is_found_where_the_configuration_says(
    saved_model: Any, make_runner: Any
) -> None:
    def sparse(name: str) -> list[bool]:
        model = make_runner(saved_model(name).folder).model
        return [hasattr(layer.mlp, "experts") for layer in model.model.layers]

    assert sparse("qwen2-moe") == [True, False, True]
    assert sparse("qwen3-moe") == [False, True, False]
    assert sparse("mixtral") == [True, True, True]


def test_an_expert_computes_all_its_tokens_at_once(
    saved_model: Any, make_runner: Any, driver: Any
) -> None:
    runner = make_runner(saved_model("mixtral").folder)
    rows: list[list[int]] = []
    for layer in runner.model.model.layers:
        seen: list[int] = []
        rows.append(seen)
        for expert in layer.mlp.experts:
            expert.register_forward_hook(
                lambda module, inputs, output, seen=seen: seen.append(len(inputs[0]))
            )
    batch = driver(runner)
    for seed in range(3):
        batch.add(tokens(20, seed))
    batch.all_logits()
    for seen in rows:
        assert len(seen) <= 4, "one call per expert for all sequences"
        assert sum(seen) == 2 * 60, "two experts for each of 60 tokens"
        assert min(seen) > 0, "none is called for nothing"


MOE = {**SIZES, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LONG = {"rope_type": "longrope", **SHORT, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("architecture", "values", "kind", "words"),
    [
        ("FalconForCausalLM", {"alibi": True}, UnsupportedModel, "alibi"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, UnsupportedModel, "bidir"),
        ("Gemma2ForCausalLM", {"layer_types": ["full_attention"]}, BrokenModel, "layer_types"),
        ("Gemma2ForCausalLM", {"layer_types": [[]] * 12}, BrokenModel, "list of 12 of full"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": -1}, BrokenModel, "attn_logit_soft"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 0}, BrokenModel, "query_pre_attn"),
        ("Gemma3ForCausalLM", {"rope_parameters": {"full_attention": 1}}, BrokenModel, "full_att"),
        ("Olmo2ForCausalLM", {"partial_rotary_factor": 0.5}, UnsupportedModel, "partial_rotary"),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 1.5}, BrokenModel, "partial_rotary"),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 0.05}, BrokenModel, "partial_rotary"),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": {**LONG, "short_factor": [1.0]}},
            BrokenModel,
            "short_factor is [1.0], expected a list of 8 numbers above 0",
        ),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": {**LONG, "long_factor": [1.0] * 7 + [float("nan")]}},
            BrokenModel,
            "long_factor",
        ),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "yarn"}}, BrokenModel, "short_factor"),
        (
            "Olmo2ForCausalLM",
            {"rope_scaling": {"type": "dynamic", "factor": 0.5}},
            BrokenModel,
            "factor is 0.5, expected at least 1",
        ),
        ("Olmo2ForCausalLM", {"rope_theta": 1.0}, BrokenModel, "rope_theta"),
        ("Olmo2ForCausalLM", {"rope_scaling": {"type": {1: 2}}}, UnsupportedModel, "yarn, llama3"),
        ("Qwen3MoeForCausalLM", {"num_experts": 10**6}, BrokenModel, "from 1 to 5461"),
        ("Qwen3MoeForCausalLM", {"num_experts_per_tok": 7}, BrokenModel, "from 1 to 6"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [12]}, BrokenModel, "from 0 to 11"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": "all"}, BrokenModel, "mlp_only_layers"),
        ("Qwen2MoeForCausalLM", {}, BrokenModel, "shared_expert_intermediate_size is missing"),
        ("FalconForCausalLM", {"num_kv_heads": 3}, BrokenModel, "num_kv_heads is 3"),
        (
            "FalconForCausalLM",
            {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3},
            BrokenModel,
            "num_ln_in_parallel_attn",
        ),
    ],
)
def test_a_bad_configuration_names_the_field(
    architecture: str, values: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(BrokenModel) as raised:
        describe(architecture, {**MOE, **values})
    assert type(raised.value) is kind
    assert words in str(raised.value)
    assert "config.json" in str(raised.value)


def test_a_missing_tensor_of_a_renamed_family_is_refused(
    saved_model: Any, make_runner: Any, tmp_path: Path
) -> None:
    saved = saved_model("falcon-7b")
    folder = tmp_path / "deep"
    shutil.copytree(saved.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(BrokenModel, match=r"layers\.3.* missing"):
        make_runner(folder)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_part_of_a_gemma3_that_sees_images(
    prefix: str, saved_model: Any, make_runner: Any, driver: Any, tmp_path: Path
) -> None:
    """As published: the text's settings inside, its tensors below another name, a tower beside."""
    from safetensors.torch import load_file, save_file

    saved = saved_model("gemma3-usual")
    folder = tmp_path / "both"
    shutil.copytree(saved.folder, folder)
    text = json.loads((folder / "config.json").read_text())
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (folder / "config.json").write_text(json.dumps({**whole, "vision_config": {}}))
    stored = load_file(folder / "model.safetensors")
    named = {name.replace("model.", prefix, 1): tensor for name, tensor in stored.items()}
    tower = {"vision_tower.patch.weight": torch.zeros(4, 4)}
    save_file({**named, **tower}, folder / "model.safetensors")
    runner = make_runner(folder)
    assert runner.info.architecture == "Gemma3ForConditionalGeneration"
    assert largest_error(runner, driver, saved, [tokens(40)]) < TOLERANCE


def test_an_auto_map_does_not_matter_where_the_network_is_ours(
    saved_model: Any, make_runner: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "phi3"
    shutil.copytree(saved_model("phi3").folder, folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "configuration_phi3.Phi3Config"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    assert make_runner(folder).info.architecture == "Phi3ForCausalLM"
