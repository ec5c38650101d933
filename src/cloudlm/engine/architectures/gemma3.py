"""Gemma 3 (text): Gemma 2 with normed queries and keys in place of capped scores, and rotations of
its own for the layers with a sliding window.

Source: Gemma team, "Gemma 3 Technical Report", 2025.
"""

from __future__ import annotations

import re
from dataclasses import replace

from cloudlm.core.architectures import USUAL_CONTEXTS
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


# What transformers assumes of ``text_config``; published files leave it out.
_USUAL_TEXT = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": USUAL_CONTEXTS["Gemma3ForConditionalGeneration"],
}
_PARTS_FOR_IMAGES = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.")


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """The text part of the model that also sees images; the rest is not loaded."""

    renames = (
        (r"^model\.language_model\.", "model."),
        (r"^language_model\.", ""),
    )

    @classmethod
    def read(cls, config: ModelConfig) -> TransformerConfig:
        """See ``Transformer``."""
        text = config.raw("text_config")
        if not isinstance(text, dict):
            raise config.fault("text_config", "a JSON object")
        return super().read(ModelConfig({**_USUAL_TEXT, **text}, "config.json: text_config"))

    def parameter_name(self, stored: str) -> str | None:
        """See ``Decoder``."""
        return None if _PARTS_FOR_IMAGES.match(stored) else super().parameter_name(stored)


def _ropes(config: ModelConfig, head_dim: int, context: int) -> tuple[Rope, Rope]:
    """The rotations of the layers that see everything and of those that slide: sections of
    ``rope_parameters``, or fields beside ``rope_scaling``, which is for the former only."""
    nested = config.section("rope_parameters")
    local = rope_of(nested.section("sliding_attention"), config, head_dim, context, _SLIDING)
    if "rope_parameters" in config:
        full = nested.section("full_attention")
        return rope_of(full, config, head_dim, context, _FULL), local
    return read_rope(config, head_dim, context, _FULL), local
