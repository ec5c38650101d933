"""How the gateway says who answered, and why not: headers of every answer, and refusals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import msgspec

from cloudlm.core.errors import AuthenticationFailed, CloudlmError
from cloudlm.gateway.account import Exchange, status_of
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.base import Dialect
from cloudlm.gateway.exchange import GatewayResponse, header_safe

JSON: Final = {"content-type": "application/json"}


def headers_of(exchange: Exchange, more: Mapping[str, str]) -> dict[str, str]:
    """Who served the request, for every answer."""
    headers = {"x-request-id": exchange.request_id, **exchange.headers, **more}
    if exchange.model:
        headers["x-cloudlm-model"] = header_safe(exchange.model)
    if exchange.replica:
        headers["x-cloudlm-replica"] = header_safe(exchange.replica)
        headers["x-cloudlm-attempts"] = str(exchange.attempts)
        headers["x-cloudlm-route"] = exchange.route
    return headers


def refusal(
    error: CloudlmError, headers: dict[str, str], dialect: Dialect = openai.DIALECT
) -> GatewayResponse:
    """The response that says ``error``."""
    headers["content-type"] = "application/json"
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, AuthenticationFailed):
        headers["www-authenticate"] = "Bearer"
    return GatewayResponse(
        status_of(error), headers, msgspec.json.encode(dialect.error_body(error))
    )
