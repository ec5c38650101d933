"""Gemma 2: norms around attention and MLP, soft caps on scores and logits, every other layer with
a sliding window.

Source: Gemma team, "Gemma 2: Improving Open Language Models at a Practical Size", 2024.
"""

from __future__ import annotations

from dataclasses import replace

from cloudlm.core.errors import UnsupportedModel
from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.transformer import Transformer
from cloudlm.engine.architectures.transformer_config import (
    Fields,
    Norm,
    Residual,
    TransformerConfig,
    read_common,
    read_sliding,
)


def read_gemma(
    config: ModelConfig, fields: Fields, pattern: int, logit_softcap: float | None
) -> tuple[TransformerConfig, tuple[bool, ...]]:
    """What Gemma 2 and 3 have in common, and which layers slide: by ``layer_types`` if given, else
    all but every ``pattern``-th; ``logit_softcap`` is a default. Raises BrokenModel or
    UnsupportedModel."""
    if config.flag("use_bidirectional_attention", False):
        raise UnsupportedModel("config.json: use_bidirectional_attention is not supported")
    common = read_common(config, fields)
    layers = common.layers
    sliding = read_sliding(config, layers)
    if sliding is None:
        sliding = tuple((layer + 1) % pattern != 0 for layer in range(layers))
    window = config.optional_integer("sliding_window", 4096)
    bias = config.flag("attention_bias", False)
    gemma = replace(
        common,
        windows=tuple(window if slides else None for slides in sliding),
        scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        logit_softcap=config.optional_number("final_logit_softcapping", logit_softcap),
        embedding_scale=common.hidden_size**0.5,
        norm=Norm.OFFSET_RMS,
        residual=Residual.SANDWICH,
        qkv_bias=bias,
        out_bias=bias,
    )
    return gemma, sliding


GEMMA2_FIELDS = Fields(
    head_dim=256,
    activation="hidden_activation",
    default_activation="gelu_pytorch_tanh",
    context=8192,
    tied=True,
)


class Gemma2ForCausalLM(Transformer):
    """Attention scores are capped before the softmax."""

    @classmethod
    def read(cls, config: ModelConfig) -> TransformerConfig:
        """See ``Transformer``."""
        gemma, _ = read_gemma(config, GEMMA2_FIELDS, pattern=2, logit_softcap=30.0)
        softcap = config.optional_number("attn_logit_softcapping", 50.0)
        return replace(gemma, attention_softcap=softcap)
