"""Gemma 3 (text): Gemma 2 with normed queries and keys in place of capped scores, and rotations of
its own for the layers with a sliding window.

Source: Gemma team, "Gemma 3 Technical Report", 2025.
"""

from __future__ import annotations

from dataclasses import replace

from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.gemma2 import GEMMA2_FIELDS, read_gemma
from cloudlm.engine.architectures.rope_config import RopeFields, read_rope, rope_of
from cloudlm.engine.architectures.transformer import Transformer
from cloudlm.engine.architectures.transformer_config import QueryKeyNorm, TransformerConfig
from cloudlm.engine.ops.rope import Rope

_FULL = RopeFields(theta=1e6)
_SLIDING = RopeFields(theta_name="rope_local_base_freq")


class Gemma3ForCausalLM(Transformer):
    """All but every ``sliding_window_pattern``-th layer slide."""

    @classmethod
    def read(cls, config: ModelConfig) -> TransformerConfig:
        """See ``Transformer``."""
        fields = replace(GEMMA2_FIELDS, context=131072)
        pattern = config.integer("sliding_window_pattern", 6)
        gemma, sliding = read_gemma(config, fields, pattern, logit_softcap=None)
        full, local = _ropes(config, gemma.head_dim, gemma.context)
        return replace(
            gemma,
            qk_norm=QueryKeyNorm.HEAD,
            ropes=tuple(local if slides else full for slides in sliding),
        )


def _ropes(config: ModelConfig, head_dim: int, context: int) -> tuple[Rope, Rope]:
    """The rotations of the layers that see everything and of those that slide: sections of
    ``rope_parameters``, or fields beside ``rope_scaling``, which is for the former only."""
    nested = config.section("rope_parameters")
    local = rope_of(nested.section("sliding_attention"), config, head_dim, context, _SLIDING)
    if "rope_parameters" in config:
        full = nested.section("full_attention")
        return rope_of(full, config, head_dim, context, _FULL), local
    return read_rope(config, head_dim, context, _FULL), local
