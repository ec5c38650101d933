"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 whose MLPs are mixtures of experts with a shared expert.

Source: Yang et al., "Qwen2 Technical Report", 2024.
"""

from __future__ import annotations

from dataclasses import replace

from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.transformer import Transformer
from cloudlm.engine.architectures.transformer_config import (
    Experts,
    Fields,
    TransformerConfig,
    read_common,
    read_experts,
    read_sliding,
)

_FIELDS = Fields(context=32768)


def read_qwen_experts(config: ModelConfig, layers: int) -> Experts:
    """The experts of a Qwen; dense layers are listed in ``mlp_only_layers``, and but every
    ``decoder_sparse_step``-th layer is dense. Raises BrokenModel."""
    experts = read_experts(
        config,
        layers,
        "moe_intermediate_size",
        normalised=config.flag("norm_topk_prob", False),
    )
    step = config.integer("decoder_sparse_step", 1)
    between = (layer for layer in range(layers) if (layer + 1) % step)
    dense = config.indices("mlp_only_layers", layers).union(between)
    return replace(experts, dense_layers=dense)


class Qwen2MoeForCausalLM(Transformer):
    """All tokens see the shared expert, weighted by a gate of its own."""

    @classmethod
    def read(cls, config: ModelConfig) -> TransformerConfig:
        """See ``Transformer``."""
        common = read_common(config, _FIELDS)
        experts = replace(
            read_qwen_experts(config, common.layers),
            shared_size=config.integer("shared_expert_intermediate_size"),
        )
        return replace(
            common,
            qkv_bias=config.flag("qkv_bias", True),
            experts=experts,
            windows=_windows(config, common.layers),
        )


def _windows(config: ModelConfig, layers: int) -> tuple[int | None, ...]:
    """By ``layer_types`` if given, else every other layer before ``max_window_layers`` slides;
    none does unless ``use_sliding_window`` is set."""
    if not config.flag("use_sliding_window", False):
        return (None,) * layers
    window = config.optional_integer("sliding_window", 4096)
    sliding = read_sliding(config, layers)
    if sliding is None:
        end = config.integer("max_window_layers", 28, low=0)
        sliding = tuple(layer % 2 == 0 and layer < end for layer in range(layers))
    return tuple(window if slides else None for slides in sliding)
