"""SageMaker's ``POST /invocations``: one address for what a container can do, told by the body.

``messages`` is a chat, ``prompt`` a completion, ``input`` an embedding, all as in OpenAI's API, and
``inputs`` a text generation as in TGI's. ``model`` may be left out where one model is deployed.
Must not do I/O.
"""

from __future__ import annotations

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.requests import decode_body
from cloudlm.gateway.dialects import openai, tgi
from cloudlm.gateway.dialects.base import Asker, Dialect
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.exchange import GatewayRequest

DIALECT = Dialect("SageMaker", lambda error: error.body())
_KINDS = {
    "messages": Operation.CHAT,
    "prompt": Operation.COMPLETION,
    "input": Operation.EMBEDDING,
}


def parse(request: GatewayRequest, name: str, asker: Asker) -> Call:
    """A call out of an invocation. Raises InvalidRequest and NotSupported."""
    body = decode_body(request.body)
    if "inputs" in body:
        return tgi.parse_either(request, name, asker)
    for field, operation in _KINDS.items():
        if field in body:
            if body.get("model") is None:
                body["model"] = asker.only_model()
            return openai.parse_body(operation, body, asker.salted, may_lead=asker.may_lead)
    raise InvalidRequest("the body must hold messages, prompt, input or inputs", param="messages")
