"""Responses as bytes on the wire, HTTP/1.1. Refuses what could break out of a header. No I/O."""

from __future__ import annotations

import time
from email.utils import formatdate
from http import HTTPStatus

from cloudlm.gateway.exchange import GatewayResponse

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
_PHRASES = {status.value: status.phrase for status in HTTPStatus}
_MAX_KNOWN = 2048
_SIZES = [b"%x\r\n" % size for size in range(_MAX_KNOWN)]
_BODILESS = frozenset({204, 304})


class _Date:
    """The ``date`` header, made once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = ""

    def text(self) -> str:
        second = int(time.time())
        if second != self._second:
            self._second, self._text = second, formatdate(second, usegmt=True)
        return self._text


_date = _Date()


def render_head(
    response: GatewayResponse, length: int | None, *, keep: bool, modern: bool = True
) -> bytes:
    """The head of ``response``. ``length`` is its body's size in bytes, None for a stream; ``keep``
    says whether the connection stays open, ``modern`` whether the client speaks HTTP/1.1.

    Raises ValueError if a header holds a line end or NUL.
    """
    status, headers = response.status, response.headers
    if "connection" in headers:  # said below, by what is true of this one
        headers = {name: value for name, value in headers.items() if name != "connection"}
    lines = [
        f"HTTP/1.1 {status} {_PHRASES.get(status, 'Unknown')}",
        f"date: {_date.text()}",
        *map(": ".join, headers.items()),
    ]
    if length is None:
        if modern:
            lines.append("transfer-encoding: chunked")
    elif status not in _BODILESS:
        lines.append(f"content-length: {length}")
    if not keep:
        lines.append("connection: close")
    elif not modern:
        lines.append("connection: keep-alive")
    text = "\r\n".join(lines)
    ends = len(lines) - 1
    if text.count("\r") != ends or text.count("\n") != ends or "\0" in text:
        raise ValueError("a response header holds a line end")
    return text.encode("latin-1") + b"\r\n\r\n"


def chunk(piece: bytes) -> bytes:
    """A piece of a stream, framed; ``piece`` must not be empty."""
    size = len(piece)
    return (_SIZES[size] if size < _MAX_KNOWN else b"%x\r\n" % size) + piece + b"\r\n"
