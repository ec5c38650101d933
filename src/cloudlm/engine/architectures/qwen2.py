"""Qwen2 and Qwen2.5: Llama with biased query, key and value projections.

Source: Yang et al., "Qwen2 Technical Report", 2024.
"""

from __future__ import annotations

from dataclasses import replace

from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.transformer import Transformer
from cloudlm.engine.architectures.transformer_config import (
    Fields,
    TransformerConfig,
    read_common,
    read_sliding,
)

_FIELDS = Fields(context=32768)


def read_windows(config: ModelConfig, layers: int) -> tuple[int | None, ...]:
    """The window of each layer: by ``layer_types`` if given, else the layers from
    ``max_window_layers`` on slide; none does unless ``use_sliding_window`` is set."""
    if not config.flag("use_sliding_window", False):
        return (None,) * layers
    window = config.optional_integer("sliding_window", 4096)
    sliding = read_sliding(config, layers)
    if sliding is None:
        first = config.integer("max_window_layers", 28, low=0)
        sliding = tuple(layer >= first for layer in range(layers))
    return tuple(window if slides else None for slides in sliding)


class Qwen2ForCausalLM(Transformer):
    """The biases are fixed, not configured."""

    @classmethod
    def read(cls, config: ModelConfig) -> TransformerConfig:
        """See ``Transformer``."""
        common = read_common(config, _FIELDS)
        return replace(common, qkv_bias=True, windows=read_windows(config, common.layers))
