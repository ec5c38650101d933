"""The networks that the engine runs itself, by the name in ``config.json``.

Here and not in the engine because the registry goes by it too: what a file says about code of its
own matters only where the network is not ours.
"""

from __future__ import annotations

from typing import Any

ARCHITECTURES = {
    "FalconForCausalLM": "falcon",
    "GPT2LMHeadModel": "gpt2",
    "GPTNeoXForCausalLM": "gpt_neox",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Olmo2ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
"""Name to the engine's module."""

USUAL_CONTEXTS = {"Gemma3ForConditionalGeneration": 131_072}
"""Context lengths, tokens, of architectures whose published files leave them out."""


def own_architecture(names: Any) -> str | None:
    """The first of a configuration's list ``architectures`` that the engine runs, None if none."""
    listed = names if isinstance(names, list) else []
    return next((name for name in listed if isinstance(name, str) and name in ARCHITECTURES), None)
