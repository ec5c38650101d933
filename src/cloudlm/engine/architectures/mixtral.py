"""Mixtral: Mistral whose MLPs are mixtures of experts.

Source: Jiang et al., "Mixtral of Experts", 2024.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.rope_config import RopeFields
from cloudlm.engine.architectures.transformer import Transformer
from cloudlm.engine.architectures.transformer_config import (
    Fields,
    TransformerConfig,
    read_common,
    read_experts,
)

_FIELDS = Fields(default_norm_eps=1e-5, context=131072, rope=RopeFields(theta=1e6))


class MixtralForCausalLM(Transformer):
    """The weights of a token's experts sum to one."""

    renames: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"(\.experts\.\d+)\.w1\.", r"\1.gate_proj."),
        (r"(\.experts\.\d+)\.w2\.", r"\1.down_proj."),
        (r"(\.experts\.\d+)\.w3\.", r"\1.up_proj."),
    )

    @classmethod
    def read(cls, config: ModelConfig) -> TransformerConfig:
        """See ``Transformer``."""
        common = read_common(config, _FIELDS)
        window = config.optional_integer("sliding_window")
        experts = read_experts(config, common.layers, "intermediate_size", normalised=True)
        return replace(common, windows=(window,) * common.layers, experts=experts)
