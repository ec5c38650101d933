"""What several gateway processes on one port say to their parent, over a socket each of them was
born with: one JSON line per message, an answer to each that carries a number; and what one has to
tell the others, which the parent passes on.

The socket is a lifeline too: its end tells either side that the other has died. Must not know what
is said.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from cloudlm.core.errors import Unavailable

T = TypeVar("T")
MAX_LINE_BYTES = 32 * 1024 * 1024
ANSWER_TIMEOUT_S = 5.0


class _Line(msgspec.Struct, array_like=True):
    """``number`` 0 wants no answer, and is news if the parent says it; ``what`` is empty in an
    answer."""

    number: int
    what: str
    data: msgspec.Raw


_lines = msgspec.json.Decoder(_Line)
_encoder = msgspec.json.Encoder()


def _encoded(number: int, what: str, data: Any) -> bytes:
    return _encoder.encode(_Line(number, what, msgspec.Raw(_encoder.encode(data)))) + b"\n"


class Channel:
    """The side of a process. Made inside the event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self.on_news: Callable[[str, msgspec.Raw], None] = lambda *_: None
        """Called with what other processes tell all."""
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def open(cls, end: socket.socket) -> Channel:
        """Speak over ``end``."""
        return cls(*await asyncio.open_connection(sock=end, limit=MAX_LINE_BYTES))

    async def ask(self, what: str, data: Any, kind: type[T]) -> T:
        """The parent's answer. Raises Unavailable if there is none."""
        if self._listening.done():
            raise _gone()
        number = next(self._numbers)
        future: asyncio.Future[msgspec.Raw] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._writer.write(_encoded(number, what, data))
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                raw = await future
        except (TimeoutError, OSError):
            raise _gone() from None
        finally:
            self._waiting.pop(number, None)
        return msgspec.json.decode(raw, type=kind)

    def tell(self, what: str, data: Any) -> None:
        """Say something that needs no answer; never waits."""
        if not self._writer.is_closing():
            self._writer.write(_encoded(0, what, data))

    async def ended(self) -> None:
        """Returns when the parent is gone."""
        await asyncio.wait({self._listening})

    async def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while text := await self._reader.readline():
                line = _lines.decode(text)
                if not line.number:
                    self.on_news(line.what, line.data)
                    continue
                future = self._waiting.get(line.number)
                if future is not None and not future.done():
                    future.set_result(line.data)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(_gone())

    async def close(self) -> None:
        """Hang up."""
        self._listening.cancel()
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def _gone() -> Unavailable:
    return Unavailable("the gateway's parent process does not answer", retry_after_s=1.0)


Tell = Callable[[str, Any], None]


async def attend(
    end: socket.socket,
    hear: Callable[[str, msgspec.Raw], Awaitable[Any]],
    seated: Callable[[Tell], None] = lambda _: None,
) -> None:
    """The parent's side: have ``hear`` take what one process says, in order, until it is gone.
    ``seated`` is given what tells that process news."""
    reader, writer = await asyncio.open_connection(sock=end, limit=MAX_LINE_BYTES)

    def tell(what: str, data: Any) -> None:
        if not writer.is_closing():
            writer.write(_encoded(0, what, data))

    seated(tell)
    try:
        with contextlib.suppress(OSError, ValueError):
            while text := await reader.readline():
                line = _lines.decode(text)
                answer = await hear(line.what, line.data)
                if line.number:
                    writer.write(_encoded(line.number, "", answer))
                    await writer.drain()
    finally:
        writer.close()
