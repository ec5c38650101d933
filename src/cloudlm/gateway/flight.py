"""One answer on its way to many: a flight, on which equal requests wait for the one that leads, and
the leader's stream, written down while its client reads it. Must not know what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import Self

from cloudlm.gateway.account import Exchange
from cloudlm.gateway.cache import Answer
from cloudlm.gateway.exchange import BodyStream
from cloudlm.gateway.sse import PING

LONGEST_WAIT_S = 30.0
"""A leader's client that reads slowly must not hold up the others for ever."""


class Turn(Enum):
    """What becomes of those who wait for an answer that does not come."""

    NEXT = "one of them leads"
    ALONE = "each asks for itself"


class Flight:
    """One question on its way, and those who wait for its answer."""

    def __init__(self) -> None:
        self._end: asyncio.Future[Answer | Turn] = asyncio.get_running_loop().create_future()

    def end(self, how: Answer | Turn) -> None:
        """Tell all who wait. Only the first call counts."""
        if not self._end.done():
            self._end.set_result(how)

    async def wait(self, exchange: Exchange) -> Answer | Turn:
        """How it ended. Raises what cuts the exchange."""
        with exchange.interrupt:
            await asyncio.wait({self._end}, timeout=LONGEST_WAIT_S)
        return self._end.result() if self._end.done() else Turn.ALONE


class Recorded:
    """A stream on its way to the leader's client, written down beside. ``whole`` is told the body,
    once and not before ``done`` says that it is complete, or None if there will be none."""

    def __init__(
        self,
        stream: BodyStream,
        whole: Callable[[bytes | None], None],
        limit_bytes: int,
        done: Callable[[], bool],
    ) -> None:
        self._stream = stream
        self._whole: Callable[[bytes | None], None] | None = whole
        self._left_bytes = limit_bytes
        self._done = done
        self._pieces: list[bytes] = []

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        piece = await self._stream.__anext__()
        self._note(piece)
        return piece

    async def pump(self, write: Callable[[bytes], bool]) -> None:
        """As the stream does, written down beside."""

        def noted(piece: bytes) -> bool:
            self._note(piece)
            return write(piece)

        await self._stream.pump(noted)

    def _note(self, piece: bytes) -> None:
        if self._whole is not None and piece != PING:  # which is of this stream, not of its answer
            self._pieces.append(piece)
            self._left_bytes -= len(piece)
            if self._left_bytes < 0:
                self._tell(None)
            elif self._done():
                self._tell(b"".join(self._pieces))

    async def aclose(self) -> None:
        """End the stream; what is not complete now is forgotten."""
        await self._stream.aclose()
        self._tell(None)

    def _tell(self, body: bytes | None) -> None:
        whole, self._whole = self._whole, None
        self._pieces.clear()
        if whole is not None:
            whole(body)
