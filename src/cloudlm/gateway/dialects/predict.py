"""``POST /v1/models/{name}:predict`` of TensorFlow Serving, KServe's V1 protocol and Vertex AI:
``instances`` in, ``predictions`` out, one for each.

An instance is a text, an object with ``prompt``, or one conversation with ``messages``; the
``parameters`` (Vertex AI's field) are those of ``/v1/completions``. Must not do I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloudlm.core.errors import CloudlmError, InvalidRequest, NotSupported
from cloudlm.core.fields import Fields, kind_of
from cloudlm.core.requests import MAX_PROMPTS, decode_body
from cloudlm.gateway.dialects.base import Asker, Dialect
from cloudlm.gateway.dialects.generation import (
    chat_call,
    parameters,
    texts_call,
    vectors_call,
    wants_vectors,
)
from cloudlm.gateway.dialects.heard import Heard, refuse
from cloudlm.gateway.dialects.openai import Call
from cloudlm.gateway.exchange import GatewayRequest

DIALECT = Dialect("TensorFlow Serving and KServe V1", lambda error: {"error": error.message})
_REFUSED = {
    "inputs": "send instances, one for each prediction",
    "signature_name": "a language model has no signatures",
}


def parse(request: GatewayRequest, name: str, asker: Asker) -> Call:
    """A call out of a predict request. Raises InvalidRequest and NotSupported."""
    fields = Fields(decode_body(request.body), "a predict request")
    refuse(fields, _REFUSED)
    instances = fields.items("instances", max_entries=MAX_PROMPTS)
    given = fields.raw("parameters", None)
    fields.end()
    task = given.pop("task", None) if isinstance(given, dict) else None
    embeds = wants_vectors(task, "parameters.task")
    sampling = parameters(given, "parameters")
    talks = [isinstance(one, dict) and "messages" in one for one in instances]
    if any(talks):
        if len(instances) > 1:
            raise NotSupported(
                "one request can hold one instance with messages; send each conversation alone",
                param="instances",
            )
        return chat_call(name, instances[0]["messages"], sampling, asker, _predictions)
    texts = [_prompt(one, f"instances[{number}]") for number, one in enumerate(instances)]
    if embeds:
        return vectors_call(name, texts, asker, lambda v: {"predictions": v}, "instances")
    return texts_call(name, texts, sampling, asker, _predictions, "instances")


def no_such_verb(path: str) -> CloudlmError:
    """Why a verb other than predict, or a version in the path, is refused."""
    return NotSupported(
        f"{path[:120]} is not offered: a language model has /v1/models/{{name}}:predict, and its "
        "version is chosen by its deployment"
    )


def _prompt(instance: Any, param: str) -> str:
    text: Any = instance
    if isinstance(instance, Mapping):
        fields = Fields(instance, param, path=f"{param}.")
        text = fields.raw("prompt")
        fields.end()
    if not isinstance(text, str):
        raise InvalidRequest(
            f"{param} must be a text or an object with prompt or messages, not {kind_of(text)}",
            param=param,
        )
    return text


def _predictions(choices: list[Heard]) -> dict[str, Any]:
    said = [{"generated_text": one.text, "finish_reason": one.finish} for one in choices]
    return {"predictions": said}
