"""The words between a web server and the handler: one request in, one response out.

Plain data, so that the handler depends on no framework: whoever speaks HTTP fills a
``GatewayRequest`` and writes a ``GatewayResponse``; neither is changed afterwards (they are not
frozen because making frozen ones takes four times as long, and their ``__init__`` is written out
because one that ``dataclass`` makes is not compiled). Must not import a web framework.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_UNSAFE_IN_HEADER = re.compile(r"[^\x21-\x7e]")
_ID_BYTES: Final = 12
_IDS_AT_ONCE: Final = 256
_ids: Final[list[str]] = []  # drawn, and given to nobody yet
os.register_at_fork(after_in_child=_ids.clear)


@dataclass(slots=True, init=False)
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
    query: str
    peer: str

    def __init__(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        disconnected: asyncio.Future[None],
        query: str = "",
        peer: str = "",
    ) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self.disconnected = disconnected
        self.query = query
        self.peer = peer


class BodyStream(Protocol):
    """A body in pieces. The server pulls one piece, writes it, and only then pulls the next; it
    must call ``aclose`` once it will pull no more, whatever happened, even if it never began."""

    def __aiter__(self) -> BodyStream: ...

    async def __anext__(self) -> bytes: ...

    async def pump(self, write: Callable[[bytes], bool]) -> None:
        """A shortcut between two pulls: hand pieces to ``write`` as they come, until it returns
        False or something happens that only the next pull can tell. May do nothing."""

    async def aclose(self) -> None: ...


@dataclass(slots=True, init=False)
class GatewayResponse:
    """Status, headers and a body that is either whole or a stream."""

    status: int
    headers: Mapping[str, str]
    body: bytes | BodyStream

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str] | None = None,
        body: bytes | BodyStream = b"",
    ) -> None:
        self.status = status
        self.headers = {} if headers is None else headers
        self.body = body


def request_id(headers: Mapping[str, str]) -> str:
    """The client's ``x-request-id`` if it is a sane token, else a new one."""
    given = headers.get("x-request-id")
    if given is not None and _SANE_REQUEST_ID.fullmatch(given):
        return given
    return f"req-{unique()}"


def unique() -> str:
    """An id that no other has, 24 hex digits. Nothing secret hangs on it, and asking the system
    for random bytes costs more than the rest of an exchange's bookkeeping; so does drawing them
    one by one."""
    while True:
        try:
            return _ids.pop()
        except IndexError:
            digits = random.randbytes(_ID_BYTES * _IDS_AT_ONCE).hex()  # noqa: S311 (see above)
            size = 2 * _ID_BYTES
            _ids.extend([digits[at : at + size] for at in range(0, len(digits), size)])


def header_safe(text: str) -> str:
    """``text`` as a header may hold it: printable ASCII without spaces, at most 200 characters."""
    return _made_safe(text[:200])


@lru_cache(1024)
def _made_safe(text: str) -> str:
    return _UNSAFE_IN_HEADER.sub("_", text)
