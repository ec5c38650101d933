"""Mistral: Llama whose layers may all see a sliding window only.

Source: Jiang et al., "Mistral 7B", 2023.
"""

from __future__ import annotations

from dataclasses import replace

from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.transformer import Transformer
from cloudlm.engine.architectures.transformer_config import Fields, TransformerConfig, read_common

_FIELDS = Fields(context=131072)


class MistralForCausalLM(Transformer):
    """``sliding_window`` is the number of positions a token sees, its own included."""

    @classmethod
    def read(cls, config: ModelConfig) -> TransformerConfig:
        """See ``Transformer``."""
        common = read_common(config, _FIELDS)
        window = config.optional_integer("sliding_window", 4096)
        return replace(common, windows=(window,) * common.layers)
