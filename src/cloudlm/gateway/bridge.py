"""An ASGI application behind the gateway's own server: for what is rare, so that it can use a
framework, on the same port as what is not.

Takes the same ``GatewayRequest`` and gives the same ``GatewayResponse`` as the handler. The request
was read whole; the answer goes out as the application makes it, one piece at a time. Must not
decide which requests come here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

from starlette.types import ASGIApp, Message, Scope

from cloudlm.core.errors import InternalError
from cloudlm.gateway.exchange import GatewayRequest, GatewayResponse
from cloudlm.telemetry.logs import get_logger

_log = get_logger(__name__)


class Bridge:
    """Answers requests with an ASGI application; no lifespan, no websockets."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, request: GatewayRequest) -> GatewayResponse:
        """The application's response. Raises InternalError if it makes none."""
        run = _Run(self._app, request)
        try:
            start = await run.next()
            first = await run.next() if start is not None else None
        except BaseException:
            await run.aclose()
            raise
        if start is None or first is None:
            await run.aclose()
            raise InternalError("the application behind this path failed")
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in start.get("headers", [])}
        if first.get("more_body"):
            run.put_back(first)
            headers.pop("content-length", None)  # a stream is framed by the server
            return GatewayResponse(start["status"], headers, run)
        await run.aclose()
        headers.pop("content-length", None)
        return GatewayResponse(start["status"], headers, first.get("body", b""))


class _Run:
    """One run of the application; the body of its response."""

    def __init__(self, app: ASGIApp, request: GatewayRequest) -> None:
        self._request = request
        self._asked = False
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue(1)
        self._held: Message | None = None
        self._over = False
        self._task = asyncio.create_task(self._drive(app, _scope(request)))

    async def _drive(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self._receive, self._messages.put)
        except Exception:
            _log.exception("application_failed", extra={"fields": {"path": scope["path"]}})
        await self._messages.put(None)

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._request.body, "more_body": False}
        await asyncio.wait({self._request.disconnected})
        return {"type": "http.disconnect"}

    async def next(self) -> Message | None:
        """The next message, None after the last."""
        if self._held is not None:
            message, self._held = self._held, None
            return message
        return None if self._over else await self._messages.get()

    def put_back(self, message: Message) -> None:
        """Have ``next`` return this one again."""
        self._held = message

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._over:
            message = await self.next()
            if message is None:
                self._over = True
                raise RuntimeError("the application ended in the middle of its answer")
            self._over = not message.get("more_body")
            if message.get("body"):
                return bytes(message["body"])
        raise StopAsyncIteration

    async def pump(self, write: Callable[[bytes], bool]) -> None:
        """Nothing: the application's messages are pulled."""

    async def aclose(self) -> None:
        """End the application, whatever it does."""
        self._over = True
        self._task.cancel()
        await asyncio.wait({self._task})


def _scope(request: GatewayRequest) -> Scope:
    headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in request.headers.items()]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query.encode("latin-1"),
        "root_path": "",
        "headers": headers,
    }
