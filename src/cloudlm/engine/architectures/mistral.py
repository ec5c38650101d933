"""Mistral: Llama whose layers may all see a sliding window only.

Source: Jiang et al., "Mistral 7B", 2023.
"""

from __future__ import annotations

from dataclasses import replace

from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.llama import LlamaConfig, LlamaForCausalLM, read_common


class MistralForCausalLM(LlamaForCausalLM):
    """``sliding_window`` is the number of positions a token sees, its own included."""

    @classmethod
    def read(cls, config: ModelConfig) -> LlamaConfig:
        """See ``LlamaForCausalLM``."""
        common = read_common(config)
        window = config.optional_integer("sliding_window")
        return replace(common, windows=(window,) * len(common.windows))
