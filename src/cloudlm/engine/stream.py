"""The one bridge between the engine's thread and event loops.

The thread posts events into an ``Outbox`` and flushes it once per step, which wakes each event
loop once however many sequences moved. A consumer reads a ``TokenStream``; dropping or closing it
cancels the sequence. Must not know what the events mean beyond which one is the last.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from cloudlm.core.errors import CloudlmError
from cloudlm.engine.api import TokenEvent

Item = TokenEvent | CloudlmError


class Mailbox:
    """Events of one sequence that wait for its consumer. Touched by its event loop's thread only.

    Unread events do not hold up the engine; their number is bounded by the sequence's length.
    """

    __slots__ = ("_waiter", "items", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.items: deque[Item] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        self.items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Item:
        while not self.items:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.items.popleft()


class TokenStream(AsyncIterator[TokenEvent]):
    """A consumer's end: yields events up to the one with a ``finish_reason``, or raises the error
    that ended the sequence.

    The engine holds the mailbox but not the stream, so that a stream that nobody holds any more is
    collected and cancels its sequence. ``cancel`` may be called from any thread, at any time.
    """

    def __init__(self, mailbox: Mailbox, cancel: Callable[[], None]) -> None:
        self._mailbox = mailbox
        self._cancel = cancel
        self._ended = False

    async def __anext__(self) -> TokenEvent:
        if self._ended:
            raise StopAsyncIteration
        item = await self._mailbox.get()
        if isinstance(item, CloudlmError):
            self._ended = True
            raise item
        self._ended = item.finish_reason is not None
        return item

    async def aclose(self) -> None:
        """Cancel the sequence unless it has ended; nothing is yielded afterwards."""
        self._close()

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            self._cancel()

    def __del__(self) -> None:
        self._close()


class Outbox:
    """The engine thread's end: collects what a step produced and hands it over per event loop."""

    def __init__(self) -> None:
        self._pending: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, Item]]] = {}

    def post(self, mailbox: Mailbox, item: Item) -> None:
        self._pending.setdefault(mailbox.loop, []).append((mailbox, item))

    def flush(self) -> list[Mailbox]:
        """Wake the loops. Returns the mailboxes whose loop is closed: nobody can read them."""
        pending, self._pending = self._pending, {}
        lost: list[Mailbox] = []
        for loop, letters in pending.items():
            try:
                loop.call_soon_threadsafe(_deliver, letters)
            except RuntimeError:  # the loop is closed
                lost.extend(mailbox for mailbox, _ in letters)
        return lost


def _deliver(letters: list[tuple[Mailbox, Item]]) -> None:
    for mailbox, item in letters:
        mailbox.put(item)
