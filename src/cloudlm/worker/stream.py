"""Server-sent events out, and noticing that the client is gone while an answer is in the making.

``data: {json}`` events, the last ``data: [DONE]``. A stream that fails ends with one
``data: {"error": …}`` event and no ``[DONE]``, so that nobody takes half an answer for a whole one.
Knows nothing of chat or completions.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cloudlm.core.errors import CloudlmError, InternalError, RequestCancelled

T = TypeVar("T")
SEND_TIMEOUT_S = 60.0
DONE = b"data: [DONE]\n\n"
_encoder = msgspec.json.Encoder()


def event(body: Mapping[str, Any]) -> bytes:
    """One event; JSON never holds a raw line break, so one ``data:`` line is enough."""
    return b"data: " + _encoder.encode(body) + b"\n\n"


def error_event(error: CloudlmError) -> bytes:
    """The event that ends a failed stream."""
    return event(error.body())


async def gone(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``. Raises RequestCancelled, after cancelling ``work`` and waiting for
    its clean-up, as soon as the client has gone away."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestCancelled("the client closed the connection")
        return task.result()
    finally:
        await _settle(task, watch)


async def _settle(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Sends what ``events`` yields until it ends or the client goes.

    The first event is awaited before the status line is sent: what fails until then is raised to
    the caller's error handling and answered with its true status. The events are closed in every
    case, which cancels what feeds them. ``on_failure`` is told of every error after the first byte.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        on_failure: Callable[[Exception], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._on_failure = on_failure
        self.init_headers(
            {"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            await unless_gone(receive, self._pump(send))

    async def _pump(self, send: Send) -> None:
        first = await anext(self._events, DONE)
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        await _send(send, first)
        try:
            async for data in self._events:
                await _send(send, data)
        except RequestCancelled:
            raise
        except CloudlmError as error:
            self._on_failure(error)
            await _send(send, error_event(error))
        except Exception as error:  # the client must learn of any failure
            self._on_failure(error)
            await _send(send, error_event(InternalError("the server failed while answering")))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, data: bytes) -> None:
    try:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await send({"type": "http.response.body", "body": data, "more_body": True})
    except TimeoutError:
        raise RequestCancelled(f"the client read nothing for {SEND_TIMEOUT_S:g} s") from None
