"""What one request asks of the cache: whether its answer may be used again, and under which keys it
is. Must not look anything up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cloudlm.gateway import cache
from cloudlm.gateway.account import Exchange
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.exchange import GatewayRequest
from cloudlm.gateway.holdings import Place
from cloudlm.gateway.version import Version

LARGEST_QUESTION_BYTES = 256 * 1024


class Asked:
    """What one request asks, and the keys under which its answer may be."""

    def __init__(
        self,
        tenant_key: bytes,
        exchange: Exchange,
        request: GatewayRequest,
        call: Call,
        version: Version,
        body: dict[str, Any],
    ) -> None:
        assert exchange.key is not None
        self.call, self.version, self.path, self.body = call, version, request.path, body
        self._tenant_key = tenant_key
        # Answers are kept as they were written for the client: what a replica is asked says it for
        # OpenAI's own API but for the usage shown, for others nothing less than path and body.
        form = bytes((call.include_usage, call.continuous_usage))
        self._parts = (
            repr(version).encode(),
            call.policy.encode(),
            call.path.encode(),
            request.path.encode("utf-8", "surrogatepass"),
            request.query.encode("utf-8", "surrogatepass"),
            form if request.path == call.path else request.path.encode() + b"\0" + request.body,
        )
        self.place = Place(exchange.key.tenant, self.key((b"exact", cache.canonical(body))))

    def key(self, parts: Iterable[bytes]) -> bytes:
        """The tenant's key of ``parts`` and of all that is no part of the body."""
        return cache.question_key(self._tenant_key, (*parts, *self._parts))


def repeatable(request: GatewayRequest, call: Call) -> dict[str, Any] | None:
    """What a replica is asked, None if its answer must not be used again."""
    if len(request.body) > LARGEST_QUESTION_BYTES or _unwanted(request.headers):
        return None
    if call.private:
        return None
    if not call.generates and call.operation is not Operation.EMBEDDING:
        return None
    body = openai.decode(call.body)
    if body is None or (call.generates and not cache.deterministic(body)):
        return None
    return body


def _unwanted(headers: Mapping[str, str]) -> bool:
    """Whether the client wants a new answer, or none kept."""
    wanted = {one.strip().lower() for one in headers.get("cache-control", "").split(",")}
    return not wanted.isdisjoint({"no-cache", "no-store", "max-age=0"})
