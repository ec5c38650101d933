"""uvicorn with what a gateway needs besides: heads that must arrive in time and in bounds, a way to
drop a connection whose client reads nothing, and an end that tells running streams why they end.

The only file of the gateway that knows uvicorn. Must not know models or keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import signal
import socket
from asyncio.events import TimerHandle
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cloudlm.core.errors import BadSetting
from cloudlm.telemetry.logs import get_logger

ABORT = "cloudlm.abort"
HEAD_TIMEOUT_S = 15.0
MAX_HEAD_BYTES = 64 * 1024
_LISTEN_BACKLOG = 2048
_CUT_GRACE_S = 2.0

_log = get_logger(__name__)


class GatewayProtocol(HttpToolsProtocol):
    """One connection of a client. The scope's ``extensions`` hold ABORT, a function that drops the
    connection at once, unsent bytes included."""

    _head_timer: TimerHandle | None = None
    _head_bytes = 0
    _head_open = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_complete()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: {"call": self.transport.abort}}
        self._await_head()

    def on_headers_complete(self) -> None:
        self._head_complete()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        was_open = self._head_open
        super().data_received(data)
        if was_open and self._head_open:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.abort()

    def _await_head(self) -> None:
        self._head_complete()
        self._head_open = True
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _head_complete(self) -> None:
        self._head_open = False
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class GatewayServer(uvicorn.Server):
    """Ends on SIGTERM or SIGINT: takes no more connections, lets running requests finish for
    ``drain_timeout_s``, then calls ``cut`` so that streams end with a reason; returns normally."""

    def __init__(
        self, config: uvicorn.Config, *, drain_timeout_s: float, cut: Callable[[], object]
    ):
        super().__init__(config)
        self._drain_timeout_s = drain_timeout_s
        self._cut = cut

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        kept = {sig: signal.signal(sig, self.handle_exit) for sig in uvicorn.server.HANDLED_SIGNALS}
        try:
            yield
        finally:
            for sig, handler in kept.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            _log.info("gateway_draining", extra={"fields": {"signal": signal.Signals(sig).name}})
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self._drain_timeout_s, self._cut)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises BadSetting in one clear sentence if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(_LISTEN_BACKLOG)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise BadSetting(
                f"port {port} on {host} is in use by another process: stop it, or give the gateway "
                "another port with CLOUDLM_GATEWAY_PORT",
                param="gateway.port",
            ) from None
        raise BadSetting(
            f"the gateway cannot listen on {host} port {port}: {error.strerror}. Check "
            "gateway.host and gateway.port",
            param="gateway.host",
        ) from None
    return bound


def make_server(app: Any, *, drain_timeout_s: float, cut: Callable[[], object]) -> GatewayServer:
    """The server of an ASGI app; hand it a socket from ``listen``."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app,
        http=GatewayProtocol,
        loop="auto",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_LISTEN_BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=math.ceil(drain_timeout_s + _CUT_GRACE_S),
    )
    return GatewayServer(config, drain_timeout_s=drain_timeout_s, cut=cut)
