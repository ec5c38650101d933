"""Llama: the common decoder as it is.

Source: Touvron et al., "LLaMA", 2023; Dubey et al., "The Llama 3 Herd of Models", 2024.
"""

from __future__ import annotations

from dataclasses import replace

from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.transformer import Transformer
from cloudlm.engine.architectures.transformer_config import TransformerConfig, read_common


class LlamaForCausalLM(Transformer):
    """Biases are configured."""

    @classmethod
    def read(cls, config: ModelConfig) -> TransformerConfig:
        """See ``Transformer``."""
        bias = config.flag("attention_bias", False)
        return replace(
            read_common(config),
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=config.flag("mlp_bias", False),
        )
