"""Qwen3: Llama with a norm on each head's queries and keys.

Source: Yang et al., "Qwen3 Technical Report", 2025.
"""

from __future__ import annotations

from dataclasses import replace

from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.qwen2 import read_windows
from cloudlm.engine.architectures.transformer import Transformer
from cloudlm.engine.architectures.transformer_config import (
    Fields,
    QueryKeyNorm,
    TransformerConfig,
    read_common,
)

_FIELDS = Fields(head_dim=128, context=32768)


class Qwen3ForCausalLM(Transformer):
    """Queries and keys are normed per head before they are rotated."""

    @classmethod
    def read(cls, config: ModelConfig) -> TransformerConfig:
        """See ``Transformer``."""
        common = read_common(config, _FIELDS)
        bias = config.flag("attention_bias", False)
        return replace(
            common,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=QueryKeyNorm.HEAD,
            windows=read_windows(config, common.layers),
        )
