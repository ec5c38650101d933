"""OpenAI's requests as the address of a GET, so that any HTTP cache can keep their answers.

``GET /v1/chat/completions?request=<base64url of the JSON body, no padding>`` is the POST of that
body. Only what has the same answer each time can be asked like this. Must not do I/O.
"""

from __future__ import annotations

import base64
import binascii

from cloudlm.core.errors import HeadTooLarge, InvalidRequest
from cloudlm.core.requests import decode_body
from cloudlm.gateway.cache import deterministic
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.base import Asker, Route
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.exchange import GatewayRequest

MAX_CHARACTERS = 16_384
"""What ``request`` may have; much of what stands between a client and here takes no more."""
OPERATIONS = {
    operation.value: operation
    for operation in (Operation.CHAT, Operation.COMPLETION, Operation.EMBEDDING)
}
_FORM = "send it as 'request=' and the JSON body in base64url, without padding"


def route(operation: Operation) -> Route:
    """The GET beside an operation's POST."""

    def parse(request: GatewayRequest, _: str, asker: Asker) -> Call:
        if operation is not Operation.EMBEDDING and not deterministic(decode_body(request.body)):
            raise InvalidRequest(
                "a request by GET must have the same answer each time, so that caches may keep "
                "it: set temperature to 0 or give a seed, or ask by POST",
                param="temperature",
            )
        return openai.parse(operation, request.body, asker.salted, may_lead=asker.may_lead)

    return Route(openai.DIALECT, "GET", parse=parse, unfold=unfold)


def unfold(request: GatewayRequest) -> GatewayRequest:
    """The request with its body out of the address. Raises InvalidRequest and HeadTooLarge."""
    if request.body:
        raise InvalidRequest(f"a request by GET has no body; {_FORM}, or ask by POST")
    name, _, text = request.query.partition("=")
    if name != "request" or not text or "&" in text:
        raise InvalidRequest(
            f"a request by GET has one parameter; {_FORM}, or ask by POST", param="request"
        )
    if len(text) > MAX_CHARACTERS:
        raise HeadTooLarge(
            f"a request by GET may have {MAX_CHARACTERS} characters, this one has {len(text)}; "
            "ask by POST",
            param="request",
        )
    try:
        if "+" in text or "/" in text:  # base64, but not what may stand in an address
            raise ValueError
        body = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"request is not base64url; {_FORM}", param="request") from None
    return GatewayRequest(
        request.method,
        request.path,
        request.headers,
        body,
        request.disconnected,
        peer=request.peer,
    )
