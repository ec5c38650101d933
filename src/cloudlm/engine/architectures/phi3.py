"""Phi-3, Phi-3.5 and Phi-4: Llama with stacked projections, and LongRoPE for long contexts.

Source: Abdin et al., "Phi-3 Technical Report", 2024; "Phi-4-Mini Technical Report", 2025.
"""

from __future__ import annotations

from dataclasses import replace

from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.rope_config import RopeFields
from cloudlm.engine.architectures.transformer import Transformer
from cloudlm.engine.architectures.transformer_config import (
    Fields,
    MLPKind,
    Projections,
    TransformerConfig,
    read_common,
)

# Early files call LongRoPE "su" or, though it is not that, "yarn".
_FIELDS = Fields(
    default_norm_eps=1e-5,
    context=4096,
    rope=RopeFields(
        partial=1.0, kinds={"su": "longrope", "yarn": "longrope"}, original_context=4096
    ),
)


class Phi3ForCausalLM(Transformer):
    """In Phi-4-mini only a part of each head is rotated."""

    @classmethod
    def read(cls, config: ModelConfig) -> TransformerConfig:
        """See ``Transformer``."""
        common = read_common(config, _FIELDS)
        window = config.optional_integer("sliding_window")
        return replace(
            common,
            projections=Projections.STACKED,
            mlp=MLPKind.GATED_FUSED,
            windows=(window,) * common.layers,
        )
