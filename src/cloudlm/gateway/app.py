"""The gateway's process, assembled in sight, and the door between ASGI and the handler.

``Gateway`` makes every part and says who gets what; ``make_app`` puts the routes around it. The
handler itself knows nothing of ASGI. Must not hold rules of its own about models or keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cloudlm.core.clock import Clock, SystemClock
from cloudlm.core.errors import (
    CloudlmError,
    InvalidRequest,
    PayloadTooLarge,
    PermissionDenied,
    RequestCancelled,
    Unavailable,
)
from cloudlm.core.settings import GatewaySettings
from cloudlm.core.tenant import read_weights
from cloudlm.gateway.admission import Admission
from cloudlm.gateway.chat import Handler, Rooms, refusal
from cloudlm.gateway.demand import DemandReporter
from cloudlm.gateway.exchange import BodyStream, GatewayRequest, GatewayResponse, request_id
from cloudlm.gateway.ledger import Ledger, open_journal
from cloudlm.gateway.meter import Meter
from cloudlm.gateway.refusals import Refusals
from cloudlm.gateway.router import Loads
from cloudlm.gateway.server import ABORT
from cloudlm.gateway.upstream import Upstream
from cloudlm.gateway.view import View
from cloudlm.state.base import State
from cloudlm.telemetry.logs import get_logger

BODY_TIMEOUT_S = 60.0
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

_log = get_logger(__name__)


class Gateway:
    """All parts of one gateway. ``home`` holds the ledger's journal, ``pepper`` opens key digests,
    ``worker_token`` opens workers."""

    def __init__(
        self,
        settings: GatewaySettings,
        state: State,
        *,
        home: Path,
        pepper: bytes,
        worker_token: str | None,
        clock: Clock | None = None,
    ) -> None:
        clock = clock or SystemClock()
        self.settings = settings
        self.view = View(state, clock)
        self.admission = Admission(settings.max_ongoing_requests)
        self.loads = Loads()
        self.meter = Meter()
        self.ledger = Ledger(open_journal(home), state, clock)
        self.upstream = Upstream(token=worker_token, connect_timeout_s=settings.connect_timeout_s)
        name = f"{socket.gethostname()}:{settings.port}"
        self.demand = DemandReporter(name, state, self.view, self.admission, self.loads, clock)
        self.refusals = Refusals(state, clock)
        self.handler = Handler(
            Rooms(
                settings=settings,
                pepper=pepper,
                clock=clock,
                view=self.view,
                admission=self.admission,
                loads=self.loads,
                demand=self.demand,
                upstream=self.upstream,
                ledger=self.ledger,
                meter=self.meter,
                weights=read_weights(settings.tenant_weights),
                refused=self.refusals.note,
            )
        )
        self.stopping = False
        self.meter.watch(
            "cloudlm_gateway_state_age_seconds",
            "Seconds since the state was last read.",
            lambda: self.view.age_s,
        )
        self.meter.watch(
            "cloudlm_gateway_ledger_rows_waiting",
            "Ledger rows in memory that the state does not have yet.",
            lambda: self.ledger.rows_in_memory,
        )
        self.meter.watch(
            "cloudlm_gateway_ledger_rows_dropped",
            "Ledger rows lost because neither state nor disk took them.",
            lambda: self.ledger.rows_dropped,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The gateway's tasks, from start to a flushed ledger. Raises StorageFailed."""
        self.ledger.open()
        await self.upstream.open()
        await self.view.refresh()
        tasks = [
            asyncio.create_task(part(), name=part.__qualname__)
            for part in (self.view.run, self.ledger.run, self.demand.run, self.refusals.run)
        ]
        try:
            yield
        finally:
            self.stopping = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.demand.report()
            await self.refusals.flush()
            await self.ledger.close()
            await self.upstream.close()

    def cut(self) -> None:
        """End every running request, telling its client why."""
        count = self.handler.cut_all(Unavailable("the gateway is stopping", retry_after_s=1.0))
        if count:
            _log.warning("requests_cut", extra={"fields": {"count": count}})


class Door:
    """ASGI on one side, the handler on the other: reads the body within bounds, watches for the
    client going away, writes the answer no faster than it is read."""

    def __init__(self, gateway: Gateway) -> None:
        self._handle = gateway.handler.handle
        self._max_body_bytes = gateway.settings.max_body_bytes
        self._stuck_after_s = gateway.settings.idle_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        try:
            body = await self._body(headers, receive)
        except CloudlmError as error:
            if not isinstance(error, RequestCancelled):
                await _refuse(error, headers, send)
            return
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        watch = asyncio.create_task(_watch(receive, gone))
        try:
            request = GatewayRequest(
                scope["method"], scope["path"], headers, body, gone, _peer(scope)
            )
            response = await self._handle(request)
            await self._write(response, scope, send)
        finally:
            watch.cancel()

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        stated = headers.get("content-length", "")
        if stated.isascii() and stated.isdigit() and len(stated) < 20:
            self._check_size(int(stated))
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestCancelled("the client went away")
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    self._check_size(size)
                    if not message.get("more_body"):
                        return b"".join(pieces)
        except TimeoutError:
            raise InvalidRequest(f"the body did not arrive in {BODY_TIMEOUT_S:g} s") from None

    def _check_size(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise PayloadTooLarge(
                f"the body has more than {self._max_body_bytes} bytes, the limit of this server "
                "(gateway.max_body_bytes)"
            )

    async def _write(self, response: GatewayResponse, scope: Scope, send: Send) -> None:
        if isinstance(response.body, bytes):
            await _send_whole(response, send)
            return
        try:
            await self._stream(response, response.body, send)
        except TimeoutError:
            _log.info("stuck_reader_dropped", extra={"fields": {"after_s": self._stuck_after_s}})
            abort = scope.get("extensions", {}).get(ABORT)
            if abort is None:
                raise
            abort["call"]()
            await asyncio.sleep(0)  # let the server learn that the connection is lost
        finally:
            await response.body.aclose()

    async def _stream(self, response: GatewayResponse, body: BodyStream, send: Send) -> None:
        await _send_start(response, None, send)
        async for piece in body:
            async with asyncio.timeout(self._stuck_after_s):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


async def _watch(receive: Receive, gone: asyncio.Future[None]) -> None:
    """Set ``gone`` when the client closes its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not gone.done():
        gone.set_result(None)


async def _send_start(response: GatewayResponse, length: int | None, send: Send) -> None:
    headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in response.headers.items()]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})


async def _send_whole(response: GatewayResponse, send: Send) -> None:
    assert isinstance(response.body, bytes)
    await _send_start(response, len(response.body), send)
    await send({"type": "http.response.body", "body": response.body, "more_body": False})


async def _refuse(error: CloudlmError, headers: dict[str, str], send: Send) -> None:
    """Refuse before the body was read; the rest of it is not waited for."""
    answer = {"x-request-id": request_id(headers), "connection": "close"}
    await _send_whole(refusal(error, answer), send)


class HostGuard:
    """A gateway on loopback answers only to its own names, so that no web page can reach it through
    a name of its own that resolves to this machine (DNS rebinding)."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._names = _LOCAL_NAMES | {host.lower()} if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._names is not None and scope["type"] == "http":
            named = next((v for k, v in scope["headers"] if k == b"host"), b"")
            if host_name(named.decode("latin-1")) not in self._names:
                error = PermissionDenied(
                    "this server listens on this machine only and answers to 'localhost' and "
                    "'127.0.0.1'; set gateway.host to serve others"
                )
                await _refuse(error, {}, send)
                return
        await self._app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Whether ``host`` is an address of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def host_name(header: str) -> str:
    """The name in a ``Host`` header, without its port, in lower case."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def make_app(gateway: Gateway) -> Starlette:
    """The ASGI app of a gateway. Serve it inside ``gateway.running()``."""
    return Starlette(
        routes=_routes(gateway),
        middleware=[Middleware(HostGuard, host=gateway.settings.host)],
    )


def _routes(gateway: Gateway) -> list[Route]:
    async def livez(_: Request) -> Response:
        return Response()

    async def readyz(_: Request) -> Response:
        ready = gateway.view.ready and not gateway.stopping
        return Response(status_code=200 if ready else 503)

    async def metrics(_: Request) -> Response:
        return Response(gateway.meter.exposition(), media_type=gateway.meter.content_type)

    door = Door(gateway)
    return [
        Route("/v1/{path:path}", door),
        Route("/livez", livez),
        Route("/readyz", readyz),
        Route("/health", readyz),
        Route("/metrics", metrics),
        Route("/{path:path}", door),
    ]
