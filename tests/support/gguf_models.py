"""Writes a model of transformers as a GGUF file, with llama.cpp's own package and its names; what
that package leaves to its converters is done here as they do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import quants

FAMILIES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "Phi3ForCausalLM": gguf.MODEL_ARCH.PHI3,
    "Gemma2ForCausalLM": gguf.MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3,
}


def write_gguf(
    reference: Any,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    tokenizer: dict[str, Any] | None = None,
    settings: dict[str, float] | None = None,
) -> Path:
    """``kind`` is that of matrices whose rows are whole blocks; the rest is F32."""
    config = reference.config
    family = FAMILIES[config.architectures[0]]
    name = gguf.MODEL_ARCH_NAMES[family]
    writer = gguf.GGUFWriter(path, name)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    for key, value in (settings or {}).items():
        writer.add_float32(f"{name}.{key}", value)
    _write_rope(writer, rope, config, head_dim)
    _write_tokenizer(writer, tokenizer or plain_tokenizer(config.vocab_size))
    names = gguf.get_tensor_name_map(family, config.num_hidden_layers)
    for stored, tensor in reference.state_dict().items():
        if stored == "lm_head.weight" and config.tie_word_embeddings:
            continue
        written = names.get_name(stored, try_suffixes=(".weight", ".bias"))
        assert written is not None, stored
        numbers = tensor.float().numpy()
        if name == "llama" and ("q_proj" in stored or "k_proj" in stored):
            numbers = _turned(numbers, heads if "q_proj" in stored else kv_heads)
        if name.startswith("gemma") and stored.endswith("norm.weight"):
            numbers = numbers + 1
        _write_tensor(writer, written, numbers, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _turned(numbers: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows that llama.cpp's rotation wants."""
    parts = numbers.reshape(heads, 2, numbers.shape[0] // heads // 2, *numbers.shape[1:])
    return parts.swapaxes(1, 2).reshape(numbers.shape)


def _write_tensor(
    writer: gguf.GGUFWriter, name: str, numbers: np.ndarray, kind: gguf.GGMLQuantizationType
) -> None:
    whole = numbers.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
    if numbers.ndim == 1 or not whole:
        kind = gguf.GGMLQuantizationType.F32
    writer.add_tensor(name, quants.quantize(numbers, kind), raw_dtype=kind)


def _write_rope(writer: gguf.GGUFWriter, rope: dict[str, Any], config: Any, head_dim: int) -> None:
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
        plain = rope["rope_theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / scaled.numpy()).astype(np.float32))
    if kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        for name in ("short", "long"):
            factors = np.array(rope[f"{name}_factor"], dtype=np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)


def plain_tokenizer(size: int) -> dict[str, Any]:
    """A byte-level vocabulary of ``size`` tokens with one merge."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "th", *(f"<extra {i}>" for i in range(len(alphabet) + 1, size))]
    types = [1] * (len(alphabet) + 1) + [3] * (size - len(alphabet) - 1)
    return {"model": "gpt2", "pre": "qwen2", "tokens": tokens, "types": types, "merges": ["t h"]}


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any]) -> None:
    writer.add_tokenizer_model(tokenizer["model"])
    if "pre" in tokenizer:
        writer.add_tokenizer_pre(tokenizer["pre"])
    writer.add_token_list(tokenizer["tokens"])
    writer.add_token_types(tokenizer["types"])
    if "scores" in tokenizer:
        writer.add_token_scores(tokenizer["scores"])
    if "merges" in tokenizer:
        writer.add_token_merges(tokenizer["merges"])
    for name in ("bos", "eos", "unk", "eot"):
        if name in tokenizer:
            getattr(writer, f"add_{name}_token_id")(tokenizer[name])
    if "add_bos" in tokenizer:
        writer.add_add_bos_token(tokenizer["add_bos"])
    if "add_space_prefix" in tokenizer:
        writer.add_add_space_prefix(tokenizer["add_space_prefix"])
    if "template" in tokenizer:
        writer.add_chat_template(tokenizer["template"])
