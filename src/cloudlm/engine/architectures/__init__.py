"""The networks that the engine runs, by the name in ``config.json``; imported when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cloudlm.core.errors import UnsupportedModel

if TYPE_CHECKING:
    from cloudlm.engine.architectures.base import Decoder

_MODULES = {
    "FalconForCausalLM": "falcon",
    "GPT2LMHeadModel": "gpt2",
    "GPTNeoXForCausalLM": "gpt_neox",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
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
SUPPORTED = tuple(sorted(_MODULES))


def find_architecture(names: Any) -> tuple[str, type[Decoder]]:
    """The first architecture of a configuration's list ``architectures`` that the engine runs.

    Raises UnsupportedModel naming what was asked for and what there is.
    """
    listed = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    for name in listed:
        if name in _MODULES:
            module = import_module(f"{__name__}.{_MODULES[name]}")
            return name, getattr(module, name)
    asked = ", ".join(listed)[:200] or "none"
    raise UnsupportedModel(
        f"config.json: architectures is {asked}, which the engine does not run; "
        f"supported: {', '.join(SUPPORTED)}"
    )
