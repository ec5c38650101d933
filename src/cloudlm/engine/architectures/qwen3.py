"""Qwen3: Llama with a norm on each head's queries and keys.

Source: Yang et al., "Qwen3 Technical Report", 2025.
"""

from __future__ import annotations

from dataclasses import replace

from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.llama import LlamaConfig, LlamaForCausalLM, read_common
from cloudlm.engine.architectures.qwen2 import read_windows


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Queries and keys are normed per head before they are rotated."""

    @classmethod
    def read(cls, config: ModelConfig) -> LlamaConfig:
        """See ``LlamaForCausalLM``."""
        common = read_common(config)
        bias = config.flag("attention_bias", False)
        return replace(
            common,
            head_dim=config.integer("head_dim", 128, high=65536),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=True,
            windows=read_windows(config, len(common.windows)),
        )
