"""Qwen3-MoE: Qwen3 whose MLPs are mixtures of experts.

Source: Yang et al., "Qwen3 Technical Report", 2025.
"""

from __future__ import annotations

from dataclasses import replace

from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.qwen2_moe import read_qwen_experts
from cloudlm.engine.architectures.transformer import Transformer
from cloudlm.engine.architectures.transformer_config import (
    Fields,
    QueryKeyNorm,
    TransformerConfig,
    read_common,
)

_FIELDS = Fields(context=32768)


class Qwen3MoeForCausalLM(Transformer):
    """All layers slide if any does; no shared expert."""

    @classmethod
    def read(cls, config: ModelConfig) -> TransformerConfig:
        """See ``Transformer``."""
        common = read_common(config, _FIELDS)
        slides = config.flag("use_sliding_window", False)
        window = config.optional_integer("sliding_window", 4096) if slides else None
        bias = config.flag("attention_bias", False)
        return replace(
            common,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=QueryKeyNorm.HEAD,
            experts=read_qwen_experts(config, common.layers),
            windows=(window,) * common.layers,
        )
