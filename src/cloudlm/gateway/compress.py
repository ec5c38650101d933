"""Whole answers compressed for clients that accept it (RFC 9110, 12.5.3), just before they are
written.

Only gzip, which every client has; only from a size on, because what fits into a connection's first
flight arrives no sooner when it is smaller; never a stream, whose events must not wait for each
other. Length tells a listener on the wire something of the text with and without compression; for
it to tell a secret (BREACH), somebody must be able to send many requests in the victim's name, and
no browser attaches our keys to a request by itself. Must not know what an answer means.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping

from cloudlm.gateway.exchange import GatewayResponse

_LEVEL = 1
"""The higher levels make JSON a tenth smaller, and take three times as long."""
_GZIP_WBITS = 31
_IN_THREAD_BYTES = 128 * 1024
_KINDS = ("application/json", "application/x-ndjson", "text/plain", "text/csv", "application/xml")


def accepts_gzip(header: str) -> bool:
    """Whether an ``Accept-Encoding`` takes gzip: named with a weight above zero, or else by ``*``.
    What cannot be read does not."""
    weights: dict[str, float] = {}
    for part in header.lower().split(","):
        name, _, parameter = part.partition(";")
        key, _, value = parameter.partition("=")
        try:
            weight = float(value) if key.strip() == "q" else 1.0
        except ValueError:
            weight = 0.0
        weights[name.strip().removeprefix("x-")] = weight
    return weights.get("gzip", weights.get("*", 0.0)) > 0


async def compressed(
    response: GatewayResponse, accept_encoding: str, min_bytes: int
) -> GatewayResponse:
    """``response``, its body compressed if it is whole, has ``min_bytes``, and that is allowed and
    makes it smaller."""
    body = response.body
    if not isinstance(body, bytes) or len(body) < min_bytes:
        return response
    headers = response.headers
    kind = headers.get("content-type", "").partition(";")[0].strip()
    if kind not in _KINDS or "content-encoding" in headers:
        return response
    told = {**headers, "vary": _with_encoding(headers)}
    if not accepts_gzip(accept_encoding) or "no-transform" in headers.get("cache-control", ""):
        return GatewayResponse(response.status, told, body)
    smaller = await asyncio.to_thread(_gzip, body) if len(body) > _IN_THREAD_BYTES else _gzip(body)
    if len(smaller) >= len(body):
        return GatewayResponse(response.status, told, body)
    told["content-encoding"] = "gzip"
    tag = told.get("etag", "")
    if tag and not tag.startswith("W/"):
        told["etag"] = f"W/{tag}"  # other bytes, the same meaning
    return GatewayResponse(response.status, told, smaller)


def _gzip(body: bytes) -> bytes:
    return zlib.compress(body, _LEVEL, _GZIP_WBITS)


def _with_encoding(headers: Mapping[str, str]) -> str:
    """``Vary`` with what we look at: a cache must not hand a compressed answer to everybody."""
    known = headers.get("vary", "")
    names = [name.strip().lower() for name in known.split(",")]
    if "accept-encoding" in names or "*" in names:
        return known
    return f"{known}, accept-encoding" if known else "accept-encoding"
