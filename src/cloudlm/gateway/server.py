"""Listening, and ending well: no more connections are taken, running requests may finish for a
while, then streams are told why they end. Must not know models or keys."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import ssl
from collections.abc import Callable, Iterator

from cloudlm.core.errors import BadSetting
from cloudlm.gateway.connection import LINGER_S, Connection, Site
from cloudlm.security.tls import HANDSHAKE_TIMEOUT_S
from cloudlm.telemetry.logs import get_logger

_LISTEN_BACKLOG = 2048
_CUT_GRACE_S = 2.0
_POLL_S = 0.02
ACCEPTS_AT_ONCE = 64
ACCEPTS_SHARED = 4
"""Where several processes accept: few, so that a burst is spread over them."""
_ACCEPT_PAUSE_S = 0.2
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = get_logger(__name__)


class GatewayServer:
    """Ends on SIGTERM or SIGINT: takes no more connections, lets running requests finish for
    ``drain_timeout_s``, then calls ``cut`` so that streams end with a reason; returns normally. A
    second signal cuts at once. With ``tls`` nothing else is spoken."""

    def __init__(
        self,
        site: Site,
        *,
        drain_timeout_s: float,
        cut: Callable[[], object],
        tls: ssl.SSLContext | None = None,
        accepts_at_once: int = ACCEPTS_AT_ONCE,
    ) -> None:
        self._accepts_at_once = accepts_at_once
        self._site = site
        self._tls = tls
        self._tls_times = {
            "ssl_handshake_timeout": HANDSHAKE_TIMEOUT_S if tls else None,
            "ssl_shutdown_timeout": LINGER_S if tls else None,
        }
        self._drain_timeout_s = drain_timeout_s
        self._cut = cut
        self._asked_to_stop = asyncio.Event()
        self._connecting: set[asyncio.Task[None]] = set()
        self.started = False

    @property
    def connections(self) -> int:
        """Connections that are open or whose request still ends."""
        return len(self._site.connections)

    def stop(self) -> None:
        """Ask the server to end; asked again, it does not wait for running requests."""
        if self._asked_to_stop.is_set():
            self._cut()
        self._asked_to_stop.set()

    async def serve(self, bound: socket.socket) -> None:
        """Serve a socket from ``listen`` until a signal comes."""
        with self._signals():
            await self.run(bound)

    async def run(self, bound: socket.socket) -> None:
        """Serve until ``stop`` is called; returns when all requests have ended."""
        loop = asyncio.get_running_loop()
        bound.setblocking(False)
        loop.add_reader(bound, self._accept, bound)
        self.started = True
        try:
            await self._asked_to_stop.wait()
        finally:
            loop.remove_reader(bound)
            bound.close()
            await self._drain()

    def _accept(self, bound: socket.socket) -> None:
        """Take what waits. libuv's own listener takes one connection per turn of the loop, which
        under load lets new clients wait for seconds behind those that are served."""
        loop = asyncio.get_running_loop()
        for _ in range(self._accepts_at_once):
            try:
                accepted, _ = bound.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptors left: those who wait are taken later
                _log.warning("accept_failed", extra={"fields": {"reason": repr(error)}})
                loop.remove_reader(bound)
                loop.call_later(_ACCEPT_PAUSE_S, self._accept_again, bound)
                return
            accepted.setblocking(False)
            task = loop.create_task(self._connect(accepted))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    def _accept_again(self, bound: socket.socket) -> None:
        if bound.fileno() >= 0:
            asyncio.get_running_loop().add_reader(bound, self._accept, bound)

    async def _connect(self, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                lambda: Connection(self._site), accepted, ssl=self._tls, **self._tls_times
            )
        except OSError:  # gone already, or no TLS
            accepted.close()

    async def _drain(self) -> None:
        site, loop = self._site, asyncio.get_running_loop()
        site.closing = True
        if self._connecting:
            _, still = await asyncio.wait(self._connecting, timeout=_CUT_GRACE_S)
            for handshake in still:
                handshake.cancel()
        for connection in list(site.connections):
            connection.close_if_idle()
        timer = loop.call_later(self._drain_timeout_s, self._cut)
        deadline = loop.time() + self._drain_timeout_s + _CUT_GRACE_S
        aborted = False
        while site.connections and loop.time() < deadline + _CUT_GRACE_S:
            if loop.time() >= deadline and not aborted:
                aborted = True
                for connection in list(site.connections):
                    connection.abort()
            await asyncio.sleep(_POLL_S)
        timer.cancel()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        _log.info("gateway_draining", extra={"fields": {"signal": number.name}})
        self.stop()


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises BadSetting in one clear sentence if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit both: no answer waits for another's acknowledgement, and a
        # client whose machine vanished is noticed while its answer is still being computed.
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
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
