"""Fields that would give a replica orders instead of a question: refused, whoever asks.

Bodies are passed on as clients wrote them, and servers of models read more than OpenAI's fields:
some say where to ask, which file to load, or which program renders the prompt. What is for the
operator to decide is not for a request. Must not know what a replica is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloudlm.core.errors import InvalidRequest

ADDRESSES = (
    "api_base",
    "base_url",
    "api_key",
    "custom_llm_provider",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "kv_transfer_params",
    "vllm_xargs",  # holds the like of it
)
"""Where to ask, and with whose credential."""
PROGRAMS = ("chat_template",)
"""Code that a replica would run."""
TENSORS = ("prompt_embeds", "input_embeds", "custom_logit_processor")
"""Bytes that a replica would unpack: serialised tensors and functions."""
NAMES = ("request_id", "rid", "session_params", "mm_hashes", "multi_modal_uuids", "lora_path")
"""What a replica would know requests, conversations, media or adapters by: tenants share a replica,
and a name that one of them chose could be another's (PYSEC-2026-4198, CVE-2026-105754)."""
TEMPLATE_ARGUMENTS = frozenset(
    {"chat_template", "continue_final_message", "conversation", "return_dict", "return_tensors",
     "tokenize", "tokenizer_kwargs"}
)  # fmt: skip
"""Arguments for the template that are arguments of what calls the template."""
_WHY = {
    **dict.fromkeys(ADDRESSES, "a request does not choose where it is answered; 'model' does"),
    **dict.fromkeys(PROGRAMS, "a model brings its own chat template"),
    **dict.fromkeys(TENSORS, "prompts are texts or token ids"),
    **dict.fromkeys(NAMES, "what a replica knows by name is not for a request to name"),
}


def refuse_orders(body: Mapping[str, Any]) -> None:
    """Raises InvalidRequest naming the first such field; null is as good as absent."""
    for name, why in _WHY.items():
        if body.get(name) is not None:
            raise InvalidRequest(f"{name} is not taken from a request: {why}", param=name)
    arguments = body.get("chat_template_kwargs")
    if arguments is None:
        return
    if not isinstance(arguments, dict):
        raise InvalidRequest("chat_template_kwargs must be an object", param="chat_template_kwargs")
    reserved = sorted(TEMPLATE_ARGUMENTS & arguments.keys())
    if reserved:
        raise InvalidRequest(
            f"chat_template_kwargs may not hold {reserved[0]}: it is no argument of a template",
            param="chat_template_kwargs",
        )
