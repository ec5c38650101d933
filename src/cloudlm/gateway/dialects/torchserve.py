"""TorchServe's ``POST /predictions/{name}``: a text, or a JSON object with ``prompt`` or
``messages`` beside the parameters of ``/v1/completions``. Must not do I/O.
"""

from __future__ import annotations

from typing import Any

from cloudlm.core.errors import CloudlmError, InvalidRequest
from cloudlm.core.requests import decode_body
from cloudlm.gateway.account import status_of
from cloudlm.gateway.dialects.base import Asker, Dialect
from cloudlm.gateway.dialects.generation import chat_call, parameters, texts_call
from cloudlm.gateway.dialects.heard import Heard
from cloudlm.gateway.dialects.openai import Call
from cloudlm.gateway.exchange import GatewayRequest

_TYPES = {
    400: "BadRequestException",
    404: "ResourceNotFoundException",
    405: "MethodNotAllowedException",
    503: "ServiceUnavailableException",
}


def error_body(error: CloudlmError) -> dict[str, Any]:
    """An error in TorchServe's shape."""
    status = status_of(error)
    other = "BadRequestException" if status < 500 else "InternalServerException"
    return {"code": status, "type": _TYPES.get(status, other), "message": error.message}


DIALECT = Dialect("TorchServe", error_body)


def parse(request: GatewayRequest, name: str, asker: Asker) -> Call:
    """A call out of a prediction request. Raises InvalidRequest."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        try:
            text = request.body.decode()
        except UnicodeDecodeError:
            raise InvalidRequest("the body must be UTF-8 text or JSON") from None
        return texts_call(name, [text], parameters(None, "body"), asker, _said, "body")
    body = decode_body(request.body)
    messages, prompt = body.pop("messages", None), body.pop("prompt", None)
    if (messages is None) == (prompt is None):
        raise InvalidRequest("the body must hold either prompt or messages", param="prompt")
    sampling = parameters(body, "body")
    if messages is not None:
        return chat_call(name, messages, sampling, asker, _said)
    return texts_call(name, [prompt], sampling, asker, _said, "prompt")


def _said(choices: list[Heard]) -> dict[str, Any]:
    return {"text": choices[0].text, "finish_reason": choices[0].finish}
