"""OLMo 2: norms on the outputs of attention and MLP, and on all queries and keys together.

Source: OLMo team, "2 OLMo 2 Furious", 2024.
"""

from __future__ import annotations

from dataclasses import replace

from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.transformer import Transformer
from cloudlm.engine.architectures.transformer_config import (
    Fields,
    QueryKeyNorm,
    Residual,
    TransformerConfig,
    read_common,
)

_FIELDS = Fields(default_norm_eps=1e-5)


class Olmo2ForCausalLM(Transformer):
    """What enters attention and MLP is not normed."""

    @classmethod
    def read(cls, config: ModelConfig) -> TransformerConfig:
        """See ``Transformer``."""
        bias = config.flag("attention_bias", False)
        return replace(
            read_common(config, _FIELDS),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=QueryKeyNorm.WHOLE,
            residual=Residual.POST,
        )
