"""From a GGUF file's settings to the ``config.json`` of the same model, for families whose mapping
is certain. Others are refused by name.

The names of settings are llama.cpp's. What it does not write down is what its own code assumes:
the comments say where. Must not read weights but the small tables of rotary factors.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloudlm.core.errors import BrokenModel, UnsupportedModel
from cloudlm.registry.gguf.header import GgufHeader, GgufTensor
from cloudlm.registry.gguf.settings import Settings
from cloudlm.registry.stores.failures import storage_failures

_MAX_FACTORS = 1 << 12
_MAX_LAYERS = 1 << 10
# Layers of the models of 27 billion parameters: llama.cpp knows them by this.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


def config_of(header: GgufHeader, path: Path) -> dict[str, Any]:
    """The ``config.json`` of the model in ``path``. Raises BrokenModel, UnsupportedModel."""
    general = Settings(header, "general.")
    family = general.text("architecture")
    if family not in _FAMILIES:
        raise UnsupportedModel(
            f"{header.name}: general.architecture is {family[:40]!r}, which is not read from GGUF; "
            f"supported: {', '.join(_FAMILIES)}. Import the model in safetensors form"
        )
    settings = Settings(header, f"{family}.")
    if settings.integer("expert_count", 0, low=0):
        raise UnsupportedModel(
            f"{header.name}: mixtures of experts are not read from GGUF; import the model in "
            "safetensors form"
        )
    config = _common(header, settings)
    _FAMILIES[family](_Reading(header, path, settings, family), config)
    return config


class _Reading:
    """What a family's reader looks at."""

    def __init__(self, header: GgufHeader, path: Path, settings: Settings, family: str) -> None:
        self.header = header
        self.path = path
        self.settings = settings
        self.family = family

    def has(self, tensor: str) -> bool:
        return tensor in self.header.tensors

    def factors(self, tensor: str, count: int) -> list[float]:
        """A small table of float32, one number per pair of turned dimensions."""
        found: GgufTensor = self.header.tensors[tensor]
        if found.kind.name != "F32" or found.shape != (count,) or count > _MAX_FACTORS:
            raise BrokenModel(
                f"{self.header.name}: tensor {tensor!r} is {found.kind.name} of shape "
                f"{found.shape}, expected F32 of shape ({count},)"
            )
        with storage_failures(self.path, "read"), self.path.open("rb") as stream:
            stream.seek(found.offset)
            raw = stream.read(found.size_bytes)
        if len(raw) != found.size_bytes:
            raise BrokenModel(f"{self.header.name}: truncated while it was read")
        values = list(struct.unpack(f"<{count}f", raw))
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise BrokenModel(f"{self.header.name}: tensor {tensor!r} holds no sound factors")
        return values


def _common(header: GgufHeader, settings: Settings) -> dict[str, Any]:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise BrokenModel(f"{header.name}: tensor 'token_embd.weight' is missing or no matrix")
    hidden = settings.integer("embedding_length")
    heads = settings.integer("attention.head_count", high=65536)
    head_dim = settings.integer("attention.key_length", hidden // heads, high=65536)
    if settings.integer("attention.value_length", head_dim, high=65536) != head_dim:
        raise UnsupportedModel(f"{header.name}: keys and values of different sizes are not run")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": settings.integer("feed_forward_length"),
        "num_hidden_layers": settings.integer("block_count", high=_MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.integer("attention.head_count_kv", heads, high=65536),
        "head_dim": head_dim,
        "max_position_embeddings": settings.integer("context_length", high=1 << 31),
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": settings.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "torch_dtype": _dtype(header),
    }


def _dtype(header: GgufHeader) -> str:
    """The type to compute in: that of most numbers, bfloat16 for quantised ones."""
    return {"F32": "float32", "F16": "float16"}.get(main_kind(header), "bfloat16")


def main_kind(header: GgufHeader) -> str:
    """The name of the kind that most numbers of the file are of."""
    elements: Counter[str] = Counter()
    for tensor in header.tensors.values():
        elements[tensor.kind.name] += tensor.elements
    if not elements:
        raise BrokenModel(f"{header.name}: holds no tensors")
    return max(sorted(elements), key=elements.__getitem__)


def _llama(reading: _Reading, config: dict[str, Any]) -> None:
    config.update(architectures=["LlamaForCausalLM"], model_type="llama")
    biased = reading.has("blk.0.attn_q.bias")
    if biased != reading.has("blk.0.attn_output.bias"):
        raise UnsupportedModel(
            f"{reading.header.name}: biases on some projections of attention only are not read"
        )
    config["attention_bias"] = biased
    _whole_heads_turn(reading, config)
    _scale(reading, config)


def _qwen2(reading: _Reading, config: dict[str, Any]) -> None:
    config.update(architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    _scale(reading, config)


def _qwen3(reading: _Reading, config: dict[str, Any]) -> None:
    config.update(architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    _scale(reading, config)


def _phi3(reading: _Reading, config: dict[str, Any]) -> None:
    config.update(architectures=["Phi3ForCausalLM"], model_type="phi3")
    settings, head_dim = reading.settings, config["head_dim"]
    turned = settings.integer("rope.dimension_count", head_dim)
    if turned > head_dim or turned % 2:
        raise settings.fault("rope.dimension_count", f"an even number up to {head_dim}")
    config["partial_rotary_factor"] = turned / head_dim
    window = settings.integer("attention.sliding_window", 0, low=0)
    config["sliding_window"] = window or None
    original = settings.integer("rope.scaling.original_context_length", 4096, low=2)
    config["original_max_position_embeddings"] = original
    if reading.has("rope_factors_long.weight") and reading.has("rope_factors_short.weight"):
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": reading.factors("rope_factors_short.weight", turned // 2),
            "long_factor": reading.factors("rope_factors_long.weight", turned // 2),
        }
        if "rope.scaling.attn_factor" in settings:
            factor = settings.number("rope.scaling.attn_factor")
            config["rope_scaling"]["attention_factor"] = factor


def _gemma2(reading: _Reading, config: dict[str, Any]) -> None:
    config.update(architectures=["Gemma2ForCausalLM"], model_type="gemma2")
    settings = reading.settings
    config["attn_logit_softcapping"] = settings.number("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = settings.number("final_logit_softcapping", 30.0)
    config["sliding_window"] = settings.integer("attention.sliding_window", 4096)
    config["query_pre_attn_scalar"] = _query_scalar(reading, config)


def _gemma3(reading: _Reading, config: dict[str, Any]) -> None:
    config.update(architectures=["Gemma3ForCausalLM"], model_type="gemma3_text")
    settings = reading.settings
    config["sliding_window"] = settings.integer("attention.sliding_window")
    config["query_pre_attn_scalar"] = _query_scalar(reading, config)
    config["rope_theta"] = settings.number("rope.freq_base", 1e6)
    # llama.cpp's code has this base; later files name it.
    config["rope_local_base_freq"] = settings.number("rope.freq_base_swa", 10000.0)
    config["sliding_window_pattern"] = 6
    _scale(reading, config)


def _query_scalar(reading: _Reading, config: dict[str, Any]) -> int:
    """What scores are divided by the root of: llama.cpp has it in its code."""
    if config["num_hidden_layers"] == _GEMMA_27B_LAYERS[reading.family]:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _whole_heads_turn(reading: _Reading, config: dict[str, Any]) -> None:
    turned = reading.settings.integer("rope.dimension_count", config["head_dim"])
    if turned != config["head_dim"]:
        raise UnsupportedModel(
            f"{reading.header.name}: heads that turn in part ({turned} of {config['head_dim']} "
            "dimensions) are not read for this architecture"
        )


def _scale(reading: _Reading, config: dict[str, Any]) -> None:
    """How positions beyond the trained context are reached."""
    settings = reading.settings
    kind = settings.text("rope.scaling.type", "none")
    if reading.has("rope_freqs.weight"):
        # Llama 3's scaling as divisors of each frequency: LongRoPE with one set of them is that.
        divisors = reading.factors("rope_freqs.weight", config["head_dim"] // 2)
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": divisors,
            "long_factor": divisors,
            "original_max_position_embeddings": config["max_position_embeddings"],
            "attention_factor": 1.0,
        }
    elif kind == "linear":
        factor = settings.number("rope.scaling.factor")
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        config["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": settings.number("rope.scaling.factor"),
            "original_max_position_embeddings": settings.integer(
                "rope.scaling.original_context_length", low=2
            ),
        }
    elif kind != "none":
        raise UnsupportedModel(
            f"{reading.header.name}: rope.scaling.type is {kind[:40]!r}, expected none, linear or "
            "yarn"
        )


_FAMILIES: dict[str, Callable[[_Reading, dict[str, Any]], None]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "phi3": _phi3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}
