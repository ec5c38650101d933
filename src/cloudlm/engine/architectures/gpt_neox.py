"""GPT-NeoX (Pythia and others): attention and MLP side by side, layer norms, a quarter of each head
rotated.

Source: Black et al., "GPT-NeoX-20B", 2022.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.rope_config import RopeFields
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
    kv_heads=None,
    default_activation="gelu",
    norm_eps="layer_norm_eps",
    default_norm_eps=1e-5,
    rope=RopeFields(theta_name="rotary_emb_base", partial_name="rotary_pct", partial=0.25),
)


class GPTNeoXForCausalLM(Transformer):
    """Every head has its own queries, keys and values side by side in one matrix."""

    renames: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^gpt_neox\.", "model."),
        (r"^embed_out\.", "lm_head."),
        (r"^model\.embed_in\.", "model.embed_tokens."),
        (r"^model\.final_layer_norm\.", "model.norm."),
        (r"\.attention\.query_key_value\.", ".self_attn.qkv_proj."),
        (r"\.attention\.dense\.", ".self_attn.o_proj."),
        (r"\.dense_h_to_4h\.", ".up_proj."),
        (r"\.dense_4h_to_h\.", ".down_proj."),
    )

    @classmethod
    def read(cls, config: ModelConfig) -> TransformerConfig:
        """See ``Transformer``."""
        common = read_common(config, _FIELDS)
        bias = config.flag("attention_bias", True)
        parallel = config.flag("use_parallel_residual", True)
        return replace(
            common,
            norm=Norm.LAYER,
            residual=Residual.PARALLEL if parallel else Residual.PRE,
            projections=Projections.GROUPED,
            mlp=MLPKind.PLAIN,
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=True,
        )
