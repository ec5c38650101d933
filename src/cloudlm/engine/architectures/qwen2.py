"""Qwen2 and Qwen2.5: Llama with biased query, key and value projections.

Source: Yang et al., "Qwen2 Technical Report", 2024.
"""

from __future__ import annotations

from dataclasses import replace

from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.llama import LlamaConfig, LlamaForCausalLM, read_common

_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_windows(config: ModelConfig, layers: int) -> tuple[int | None, ...]:
    """The window of each layer: by ``layer_types`` if given, else the layers from
    ``max_window_layers`` on slide; none does unless ``use_sliding_window`` is set."""
    if not config.flag("use_sliding_window", False):
        return (None,) * layers
    window = config.optional_integer("sliding_window")
    kinds = config.raw("layer_types")
    if kinds is None:
        first = config.integer("max_window_layers", 28, low=0)
        return tuple(window if layer >= first else None for layer in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(_LAYER_TYPES):
        raise config.fault("layer_types", f"a list of {layers} of {', '.join(_LAYER_TYPES)}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


class Qwen2ForCausalLM(LlamaForCausalLM):
    """The biases are fixed, not configured."""

    @classmethod
    def read(cls, config: ModelConfig) -> LlamaConfig:
        """See ``LlamaForCausalLM``."""
        common = read_common(config)
        windows = read_windows(config, len(common.windows))
        return replace(common, qkv_bias=True, windows=windows)
