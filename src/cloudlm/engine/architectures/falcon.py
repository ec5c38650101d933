"""Falcon: attention and MLP side by side, few key and value heads. The variant with ALiBi in place
of rotary positions is not run.

Source: Almazrouei et al., "The Falcon Series of Open Language Models", 2023.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from cloudlm.core.errors import UnsupportedModel
from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.transformer import Transformer
from cloudlm.engine.architectures.transformer_config import (
    Fields,
    MLPKind,
    Norm,
    Projections,
    Residual,
    TransformerConfig,
    read_common,
)

_FIELDS = Fields(
    inner_size="ffn_hidden_size",
    inner_ratio=4,
    kv_heads="num_kv_heads",
    activation="activation",
    default_activation="gelu",
    norm_eps="layer_norm_epsilon",
    default_norm_eps=1e-5,
    tied=True,
)


class FalconForCausalLM(Transformer):
    """The 7B has one key head and one norm per layer, the later ones (``new_decoder_architecture``)
    several key heads and mostly two norms."""

    renames: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^transformer\.", "model."),
        (r"^model\.word_embeddings\.", "model.embed_tokens."),
        (r"^model\.ln_f\.", "model.norm."),
        (r"^model\.h\.", "model.layers."),
        (r"\.self_attention\.query_key_value\.", ".self_attn.qkv_proj."),
        (r"\.self_attention\.dense\.", ".self_attn.o_proj."),
        (r"\.ln_attn\.", ".input_layernorm."),
        (r"\.ln_mlp\.", ".post_attention_layernorm."),
        (r"\.dense_h_to_4h\.", ".up_proj."),
        (r"\.dense_4h_to_h\.", ".down_proj."),
    )

    @classmethod
    def read(cls, config: ModelConfig) -> TransformerConfig:
        """See ``Transformer``."""
        if config.flag("alibi", False):
            raise UnsupportedModel("config.json: alibi is not supported, only rotary positions")
        common = read_common(config, _FIELDS)
        new = config.flag("new_decoder_architecture", False)
        one_key_head = not new and config.flag("multi_query", True)
        bias = config.flag("bias", False)
        return replace(
            common,
            kv_heads=1 if one_key_head else common.kv_heads if new else common.heads,
            norm=Norm.LAYER,
            residual=_residual(config, new),
            projections=Projections.GROUPED,
            mlp=MLPKind.PLAIN,
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=bias,
        )


def _residual(config: ModelConfig, new: bool) -> Residual:
    if new:
        norms = config.integer("num_ln_in_parallel_attn", 2, high=2)
        return Residual.PARALLEL if norms == 2 else Residual.PARALLEL_ONE_NORM
    parallel = config.flag("parallel_attn", True)
    return Residual.PARALLEL_ONE_NORM if parallel else Residual.PRE
