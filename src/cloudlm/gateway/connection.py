"""One client's connection: requests in, answers out, in order, each within its time and size.

A bare protocol over llhttp, because a framework between the socket and the handler costs more than
everything that the gateway does. Whatever is malformed, too large or late is refused or dropped
here; a client that goes away is told to the handler at once; a client that reads slowly slows its
stream down, and one that reads nothing is dropped. Must not know models or keys.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import httptools

from cloudlm.core.errors import CloudlmError, InvalidRequest
from cloudlm.gateway.compress import compressed
from cloudlm.gateway.deadlines import NEVER, Sweep
from cloudlm.gateway.exchange import BodyStream, GatewayRequest, GatewayResponse
from cloudlm.gateway.head import (
    MAX_HEAD_BYTES,
    Head,
    Target,
    check,
    check_expect,
    head_too_large,
    read_target,
    too_large,
)
from cloudlm.gateway.render import CONTINUE, LAST_CHUNK, chunk, render_head
from cloudlm.security.hosts import HostGuard
from cloudlm.telemetry.logs import get_logger

HEAD_TIMEOUT_S = 15.0
BODY_TIMEOUT_S = 60.0
KEEP_ALIVE_S = 75.0
LINGER_S = 2.0
MAX_REQUESTS = 10_000
MAX_WAITING_REQUESTS = 32
MAX_WAITING_BYTES = 64 * 1024
HIGH_WATER_BYTES = 256 * 1024
_WIRE_FACTOR = 8
"""How many bytes on the wire one byte of a chunked body may cost, framing included."""

_log = get_logger(__name__)


@dataclass(slots=True)
class Site:
    """What all connections of a server share. ``refuse`` turns an error into a response;
    ``turn_away`` has one at once for a request that need not be asked further."""

    answer: Callable[[GatewayRequest], Awaitable[GatewayResponse]]
    refuse: Callable[[CloudlmError, dict[str, str]], GatewayResponse]
    guard: HostGuard
    max_body_bytes: int
    stuck_after_s: float
    compress_min_bytes: int = 0
    turn_away: Callable[[GatewayRequest], GatewayResponse | None] = lambda _: None
    connections: set[Connection] = field(default_factory=set)
    sweep: Sweep = field(default_factory=Sweep)
    closing: bool = False


@dataclass(slots=True)
class Turn:
    """One request and how its answer must be framed."""

    request: GatewayRequest
    keep: bool
    chunked: bool


class _Refused(Exception):
    """Breaks off the parser."""


class Connection(asyncio.Protocol):
    """The protocol; made once per connection by the server."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._peer = ""
        self._head = Head()
        self._head_open = self._body_open = False
        self._head_wire_bytes = 0
        self._method = ""
        self._target = Target("/", "")
        self._modern = True  # HTTP/1.1
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._wire_bytes = 0
        self._turn: Turn | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiting: deque[Turn] = deque()
        self._ahead = bytearray()
        self._served = 0
        self._fault: CloudlmError | None = None
        self._deaf = False  # nothing more is read as a request
        self._continue = False
        self._lost = False
        self._writable: asyncio.Future[None] | None = None
        self._due = NEVER
        self._stuck_at = NEVER

    # The transport's calls ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        address = transport.get_extra_info("peername")
        self._peer = str(address[0]) if isinstance(address, tuple) else ""
        transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        self._due = self._loop.time() + HEAD_TIMEOUT_S
        self._site.connections.add(self)
        self._site.sweep.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = self._deaf = True
        if self._turn is None:
            self._site.connections.discard(self)
        self._site.sweep.remove(self)
        self._waiting.clear()
        self.resume_writing()
        if self._turn is not None and not self._turn.request.disconnected.done():
            self._turn.request.disconnected.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self._turn is None:
            self._feed(data)
            return
        self._ahead += data
        if len(self._ahead) > MAX_WAITING_BYTES and self._transport is not None:
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()
        self._stuck_at = self._loop.time() + self._site.stuck_after_s

    def resume_writing(self) -> None:
        self._stuck_at = NEVER
        if self._writable is not None:
            writable, self._writable = self._writable, None
            if not writable.done():
                writable.set_result(None)

    # Reading --------------------------------------------------------------------------------------

    def _feed(self, data: bytes) -> None:
        was_open = self._head_open
        if self._body_open:
            self._wire_bytes += len(data)
        try:
            self._parser.feed_data(data)
            if was_open and self._head_open:
                self._head_wire_bytes += len(data)
                if self._head_wire_bytes > MAX_HEAD_BYTES:
                    self._fault = head_too_large()
        except httptools.HttpParserUpgrade:
            self._deaf = True  # answered as if it had not asked; the connection ends after it
        except httptools.HttpParserError as error:
            if self._fault is None:
                self._fault = InvalidRequest(f"the request is not well-formed HTTP: {error}"[:200])
        if self._fault is not None:
            self._deaf = True
            if self._turn is None:
                self._refuse()

    def on_message_begin(self) -> None:
        self._head = Head()
        self._head_open = True
        self._body = []
        self._body_bytes = self._wire_bytes = self._head_wire_bytes = 0
        if self._turn is None:
            self._due = self._loop.time() + HEAD_TIMEOUT_S

    def on_url(self, url: bytes) -> None:
        self._head.target += url
        try:
            self._head.grow(len(url))
        except CloudlmError as error:
            raise self._refusing(error) from None

    def on_header(self, name: bytes, value: bytes) -> None:
        try:
            if self._head_open:
                self._head.add(name, value)
            else:  # a trailer: counted, and never believed
                self._head.grow(len(name) + len(value) + 4)
        except CloudlmError as error:
            raise self._refusing(error) from None

    def _refusing(self, error: CloudlmError) -> Exception:
        """What breaks off the parser, to be raised."""
        self._fault = error
        return _Refused()

    def on_headers_complete(self) -> None:
        self._head_open, self._body_open = False, True
        try:
            self._believe()
        except CloudlmError as error:
            raise self._refusing(error) from None

    def _believe(self) -> None:
        head, parser = self._head, self._parser
        self._site.guard.check(head.headers)
        self._method = parser.get_method().decode("latin-1")
        self._target = read_target(head.target)
        version = parser.get_http_version()
        self._modern = version == "1.1"
        limit = self._site.max_body_bytes
        has_body = check(self._method, version, head, self._target, limit)
        if "expect" in head.headers and check_expect(head.headers) and has_body and self._modern:
            self._continue = True
            if self._turn is None:
                self._say_continue()
        if has_body and self._turn is None:
            self._due = self._loop.time() + BODY_TIMEOUT_S

    def on_body(self, piece: bytes) -> None:
        self._body.append(piece)
        self._body_bytes += len(piece)
        limit = self._site.max_body_bytes
        if self._body_bytes > limit or self._wire_bytes > _WIRE_FACTOR * limit:
            self._fault = too_large(limit)
            raise _Refused

    def on_chunk_header(self) -> None:
        """A chunk begins; its size was checked by the parser."""

    def on_message_complete(self) -> None:
        body = self._body
        whole = body[0] if len(body) == 1 else b"".join(body)
        self._body = []
        self._body_open = self._continue = False
        self._served += 1
        gone: asyncio.Future[None] = self._loop.create_future()
        target = self._target
        request = GatewayRequest(
            self._method, target.path, self._head.headers, whole, gone, target.query, self._peer
        )
        keep = self._parser.should_keep_alive() and self._served < MAX_REQUESTS
        turn = Turn(request, keep, self._modern)
        if not keep:
            self._deaf = True
        if self._turn is None:
            if not (keep and self._turned_away(turn)):
                self._begin(turn)
        elif len(self._waiting) < MAX_WAITING_REQUESTS:
            self._waiting.append(turn)
        else:
            self._fault = InvalidRequest(
                f"more than {MAX_WAITING_REQUESTS} requests were sent without waiting for answers"
            )
            raise _Refused

    # Answering ------------------------------------------------------------------------------------

    def _begin(self, turn: Turn) -> None:
        self._turn = turn
        self._due = NEVER
        self._task = self._loop.create_task(self._serve(turn))

    def _turned_away(self, turn: Turn) -> bool:
        """Answer at once, without a task, whoever is turned away; whether that was so."""
        if self._site.closing or self._writable is not None:  # who does not read has to wait
            return False
        try:
            response = self._site.turn_away(turn.request)
        except Exception:  # here the parser would take it for a fault of the request
            _log.exception("door_failed", extra={"fields": {"path": turn.request.path}})
            return False
        if response is None:
            return False
        self._write_whole(response, turn)
        self._due = self._loop.time() + KEEP_ALIVE_S
        return True

    async def _serve(self, turn: Turn) -> None:
        try:
            response = await self._site.answer(turn.request)
            turn.keep = (
                turn.keep
                and not self._site.closing
                and response.headers.get("connection") != "close"
            )
            if isinstance(response.body, bytes):
                if 0 < self._site.compress_min_bytes <= len(response.body):
                    accepted = turn.request.headers.get("accept-encoding", "")
                    response = await compressed(response, accepted, self._site.compress_min_bytes)
                self._write_whole(response, turn)
                if self._writable is not None:
                    await self._writable
            else:
                await self._write_stream(response, response.body, turn)
        except Exception:
            _log.exception("connection_failed", extra={"fields": {"path": turn.request.path}})
            self.abort()
        finally:
            self._turn = self._task = None
            self._next(turn)

    def _write_whole(self, response: GatewayResponse, turn: Turn) -> None:
        body = response.body
        assert isinstance(body, bytes)
        head = render_head(response, len(body), keep=turn.keep, modern=turn.chunked)
        self._write(head if turn.request.method == "HEAD" else head + body)

    async def _write_stream(self, response: GatewayResponse, body: BodyStream, turn: Turn) -> None:
        turn.keep = turn.keep and turn.chunked  # an older client learns the end by the close
        head = render_head(response, None, keep=turn.keep, modern=turn.chunked)
        transport, chunked = self._transport, turn.chunked

        def pour(piece: bytes) -> bool:
            if not self._lost and transport is not None and not transport.is_closing():
                transport.write(chunk(piece) if chunked else piece)
            return self._writable is None and not self._lost

        try:
            if turn.request.method == "HEAD":
                self._write(head)
                return
            first = True
            async for piece in body:
                framed = chunk(piece) if turn.chunked else piece
                self._write(head + framed if first else framed)
                first = False
                if self._writable is not None:
                    await self._writable
                if self._lost:
                    return
                await body.pump(pour)
            end = LAST_CHUNK if turn.chunked else b""
            self._write(head + end if first else end)
        finally:
            await body.aclose()

    def _write(self, data: bytes) -> None:
        if not self._lost and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _next(self, turn: Turn) -> None:
        """What follows an answer: the next request, a quiet connection, or its end."""
        if self._lost:
            self._site.connections.discard(self)
            return
        if not turn.keep or self._site.closing:
            self._end()
        elif self._waiting:
            self._begin(self._waiting.popleft())
        elif self._fault is not None:
            self._refuse()
        elif self._deaf:
            self._end()
        else:
            self._listen()

    def _listen(self) -> None:
        """Go on with what came in meanwhile."""
        limit_s = KEEP_ALIVE_S
        if self._head_open or self._body_open:
            limit_s = HEAD_TIMEOUT_S if self._head_open else BODY_TIMEOUT_S
        self._due = self._loop.time() + limit_s
        if self._continue:
            self._say_continue()
        if self._ahead:
            data = bytes(self._ahead)
            self._ahead.clear()
            assert self._transport is not None
            self._transport.resume_reading()
            self._feed(data)

    def _say_continue(self) -> None:
        self._continue = False
        self._write(CONTINUE)

    # Ends -----------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        """Answer what cannot be read as a request, and end."""
        assert self._fault is not None
        response = self._site.refuse(self._fault, self._head.headers)
        body = response.body if isinstance(response.body, bytes) else b""
        self._write(render_head(response, len(body), keep=False) + body)
        self._end()

    def _end(self) -> None:
        """Close so that the client still gets the last answer: half first, the rest when it has
        closed too or after a moment. Closing at once with unread bytes would reset the connection
        and take the answer back."""
        self._deaf = True
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._due = self._loop.time() + LINGER_S
        if transport.can_write_eof() and not self._site.closing:
            transport.write_eof()
        else:
            transport.close()

    def close_if_idle(self) -> None:
        """The server ends: close unless a request runs, which then is the last."""
        if self._turn is None:
            self._deaf = True
            if self._transport is not None:
                self._transport.close()

    def abort(self) -> None:
        """Drop the connection, unsent bytes included."""
        if self._transport is not None:
            self._transport.abort()

    def look(self, now: float) -> None:
        """Act on the limits of time; called by the sweep."""
        if self._stuck_at <= now:
            fields = {"after_s": self._site.stuck_after_s}
            _log.info("stuck_reader_dropped", extra={"fields": fields})
            self.abort()
        elif self._due <= now:
            if self._body_open and not self._deaf:
                self._fault = InvalidRequest(f"the body did not arrive in {BODY_TIMEOUT_S:g} s")
                self._deaf = True
                self._refuse()
            else:
                self.abort()
