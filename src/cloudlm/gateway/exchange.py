"""The words between a web server and the handler: one request in, one response out.

Plain data, so that the handler depends on no framework: whoever speaks HTTP fills a
``GatewayRequest`` and writes a ``GatewayResponse``; neither is changed afterwards (they are not
frozen because making frozen ones takes four times as long). Must not import a web framework.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_UNSAFE_IN_HEADER = re.compile(r"[^\x21-\x7e]")


@dataclass(slots=True)
class GatewayRequest:
    """One HTTP request, read whole. Header names are lower-case.

    ``disconnected`` is done as soon as the client has gone away; the server sets it at any time
    until the response's body is closed. ``peer`` is the address that the connection came from.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    disconnected: asyncio.Future[None]
    query: str = ""
    peer: str = ""


class BodyStream(Protocol):
    """A body in pieces. The server pulls one piece, writes it, and only then pulls the next; it
    must call ``aclose`` once it will pull no more, whatever happened, even if it never began."""

    def __aiter__(self) -> BodyStream: ...

    async def __anext__(self) -> bytes: ...

    async def pump(self, write: Callable[[bytes], bool]) -> None:
        """A shortcut between two pulls: hand pieces to ``write`` as they come, until it returns
        False or something happens that only the next pull can tell. May do nothing."""

    async def aclose(self) -> None: ...


@dataclass(slots=True)
class GatewayResponse:
    """Status, headers and a body that is either whole or a stream."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | BodyStream = b""


def request_id(headers: Mapping[str, str]) -> str:
    """The client's ``x-request-id`` if it is a sane token, else a new one."""
    given = headers.get("x-request-id")
    if given is not None and _SANE_REQUEST_ID.fullmatch(given):
        return given
    return f"req-{unique()}"


def unique() -> str:
    """An id that no other has, 24 hex digits. Nothing secret hangs on it, and asking the system
    for random bytes costs more than the rest of an exchange's bookkeeping."""
    return random.randbytes(12).hex()  # noqa: S311 (see above)


def header_safe(text: str) -> str:
    """``text`` as a header may hold it: printable ASCII without spaces, at most 200 characters."""
    return _made_safe(text[:200])


@lru_cache(1024)
def _made_safe(text: str) -> str:
    return _UNSAFE_IN_HEADER.sub("_", text)
