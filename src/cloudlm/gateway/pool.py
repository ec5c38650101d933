"""Connections to replicas: bare protocols over llhttp, kept open and used again.

A ``Line`` carries one exchange at a time; ``Pool`` keeps idle lines, the last used first. An answer
whose end could be read in two ways makes its line unusable. Follows no redirect, knows no cookies.
Must not know models, keys or what an answer means.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import urlsplit

import httptools

from cloudlm.gateway.deadlines import NEVER, Sweep

MAX_ANSWER_HEAD_BYTES = 64 * 1024
# Shorter than the 5 s for which common servers keep an idle connection, so that few of ours are
# closed by the other side at the moment we use them.
KEEP_IDLE_S = 4.0
_READ_AHEAD_BYTES = 256 * 1024
_JOINED_BYTES = 64 * 1024
_NAMES = {
    form: name
    for name in ("connection", "content-length", "content-type", "date", "server")
    for form in (name.encode(), name.title().encode())
}
_SIZE_LINE = re.compile(rb"([1-9a-f][0-9a-f]{0,4})\r\n")
_MAX_KNOWN = 2048


def _size_lines() -> list[bytes]:
    """By the length of a whole chunk the line that it begins with; empty where there is none."""
    lines = [b""] * _MAX_KNOWN
    for size in range(1, _MAX_KNOWN):
        line = b"%x\r\n" % size
        length = len(line) + size + 2
        if length < _MAX_KNOWN:
            lines[length] = line
    return lines


_SIZE_LINES = _size_lines()
_BREAKS_OUT = re.compile(r"[\x00-\x20\x7f]")


class Broken(Exception):
    """The line was lost or the answer is no HTTP. ``untouched``: not one byte had come back."""

    def __init__(self, *, untouched: bool = False) -> None:
        super().__init__()
        self.untouched = untouched


class Silent(Exception):
    """Nothing came within the time given."""


class Place(NamedTuple):
    """Where a line leads to."""

    host: str
    port: int
    tls: bool


@lru_cache(4096)
def read_url(url: str) -> tuple[Place, str, str]:
    """The place, the ``Host`` header and the target of a URL. Raises ValueError."""
    if _BREAKS_OUT.search(url):
        raise ValueError("the address holds a space or a control character")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ValueError("the address must be http://host… or https://host…, without a user")
    tls = parts.scheme == "https"
    host = (
        parts.hostname.encode("idna").decode() if not parts.hostname.isascii() else parts.hostname
    )
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not target.isascii():
        raise ValueError("the address must be ASCII; percent-encode the rest")
    shown = f"[{host}]" if ":" in host else host
    given = f":{parts.port}" if parts.port is not None else ""
    return Place(host, parts.port or (443 if tls else 80), tls), shown + given, target


def header_lines(headers: dict[str, str]) -> bytes:
    """Headers on the wire. Raises ValueError if one could break out of its line."""
    text = "".join([f"{_sound(name)}: {value}\r\n" for name, value in headers.items()])
    ends = len(headers)
    if text.count("\r") != ends or text.count("\n") != ends or "\0" in text:
        raise ValueError("a header holds a line end")
    return text.encode("latin-1")


@lru_cache(256)
def _sound(name: str) -> str:
    """``name`` as it is. Raises ValueError if it could break out of its line."""
    if _BREAKS_OUT.search(name) or ":" in name:
        raise ValueError("a header's name holds a space, a colon or a control character")
    return name


def _header_name(name: bytes) -> str:
    """In lower case. Replicas name the same few again and again; what others may make up is not
    kept."""
    return _NAMES.get(name) or name.decode("latin-1").lower()


class Line(asyncio.Protocol):
    """One connection to a replica."""

    def __init__(self, pool: Pool, place: Place) -> None:
        self.place = place
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._due = NEVER
        self._busy = self._lost = False
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._pieces: list[bytes] = []
        self._held_bytes = 0
        self._sink: Callable[[bytes], bool] | None = None
        self._silence_s = 0.0
        self._head_bytes = self._unread_bytes = 0
        self._touched = self._has_head = self._interim = False
        self._complete = self._broken = self._silent = False
        self._surplus = self._paused = False
        self._keep = False
        self._chunk_ended = self._between = False

    # The transport's calls ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._pool.sweep.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._pool.forget(self)
        if self._has_head and not self._complete and exc is None and not self._framed():
            self._complete = True
        elif not self._complete:
            self._broken = True
        self._wake()

    def _framed(self) -> bool:
        """Whether the answer says itself where it ends."""
        return "content-length" in self.headers or "transfer-encoding" in self.headers

    def data_received(self, data: bytes) -> None:
        if not self._busy or self._complete:  # nobody asked: what follows could be anybody's answer
            self._surplus = True
            if not self._busy:
                self.drop()
            return
        sink = self._sink
        if self._between and sink is not None and not self._pieces:
            data = self._unframed(data)
            if not data:
                self._pour(sink)
                return
        self._touched = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserUpgrade, httptools.HttpParserError):
            self._broken = not self._complete
            self._surplus = True
        ended = self._chunk_ended and data.endswith(b"\n")
        self._between = ended and not (self._broken or self._complete or self._surplus)
        if not self._has_head:
            self._unread_bytes += len(data)
            self._broken = self._broken or self._unread_bytes > MAX_ANSWER_HEAD_BYTES
        if self._held_bytes > _READ_AHEAD_BYTES and not self._paused and self._transport:
            self._paused = True
            self._transport.pause_reading()
        if self._sink is not None and self._pieces:
            self._pour(self._sink)
        elif self._pieces or self._has_head or self._broken:
            self._wake()

    def _unframed(self, data: bytes) -> bytes:
        """Take whole chunks in the plain form out of the front of ``data``, while the parser
        stands between two chunks, where it need not see them; the rest, which it must see. They
        are not counted as held: a sink takes them at once."""
        size_line = _SIZE_LINES[len(data)] if len(data) < _MAX_KNOWN else b""
        begin = len(size_line)
        if begin and data[:begin] == size_line and data[-2:] == b"\r\n":
            self._pieces.append(data[begin:-2])
            return b""
        at = 0
        while True:
            found = _SIZE_LINE.match(data, at)
            if found is None:
                return data[at:] if at else data
            begin = found.end()
            end = begin + int(found[1], 16)
            if data[end : end + 2] != b"\r\n":
                return data[at:] if at else data
            self._pieces.append(data[begin:end])
            at = end + 2

    # The parser's calls ---------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:
            self._surplus = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > MAX_ANSWER_HEAD_BYTES:
            self._broken = True
        elif not self._has_head and not self._surplus:  # else a trailer
            self.headers.setdefault(_header_name(name), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        if self._surplus:
            return
        status = self._parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            self._interim = True
            self.headers = {}
            return
        self.status, self._has_head = status, True
        coding = self.headers.get("transfer-encoding", "chunked").strip().lower()
        if coding != "chunked":
            self._broken = True

    def on_body(self, piece: bytes) -> None:
        if not self._surplus:
            self._pieces.append(piece)
            self._held_bytes += len(piece)

    def on_chunk_header(self) -> None:
        self._chunk_ended = False

    def on_chunk_complete(self) -> None:
        self._chunk_ended = True

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        elif not self._surplus:
            self._complete = True
            self._keep = self._parser.should_keep_alive()

    # An exchange ----------------------------------------------------------------------------------

    def begin(self, head: bytes, body: bytes) -> None:
        """Send a request. The line must be idle."""
        assert self._transport is not None
        assert not self._busy
        self._reset()
        self._busy = True
        if self._lost:
            self._broken = True
        elif len(body) <= _JOINED_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)

    async def head(self, due: float) -> None:
        """Wait until ``status`` and ``headers`` are there; ``due`` is in the loop's seconds. Raises
        Broken and Silent."""
        while not self._has_head:
            if self._broken:
                raise Broken(untouched=not self._touched)
            await self._wait(due)
        if self._broken:
            raise Broken

    async def piece(self, due: float) -> bytes:
        """The next bytes of the body, empty at its end. Raises Broken and Silent."""
        while not self._pieces:
            if self._complete:
                return b""
            if self._broken:
                raise Broken
            await self._wait(due)
        return self._taken()

    async def flow(self, sink: Callable[[bytes], bool], silence_s: float) -> None:
        """Hand pieces of the body to ``sink`` as they arrive, with no task between, until it
        returns False or there is something that ``piece`` must tell. Raises Silent after
        ``silence_s`` without a piece, and what ``sink`` raises."""
        if self._pieces or self._complete or self._broken:
            return
        self._sink, self._silence_s = sink, silence_s
        try:
            await self._wait(self._loop.time() + silence_s)
        finally:
            if self._sink is sink:
                self._sink = None

    def _pour(self, sink: Callable[[bytes], bool]) -> None:
        self._due = self._loop.time() + self._silence_s
        try:
            more = sink(self._taken())
        except Exception as error:  # for whoever waits in ``flow``, not for the transport
            self._sink = None
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_exception(error)
            return
        if not more or self._complete or self._broken:
            self._sink = None
            self._wake()

    def _taken(self) -> bytes:
        """All pieces that have arrived, as one; there is at least one."""
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._held_bytes = 0
        if self._paused and self._transport is not None and not self._lost:
            self._paused = False
            self._transport.resume_reading()
        return data

    @property
    def is_whole(self) -> bool:
        """Whether the answer has arrived to its end."""
        return self._complete

    @property
    def held_bytes(self) -> int:
        """Bytes that have arrived and were not handed out."""
        return self._held_bytes

    def rest(self) -> bytes:
        """All that was not handed out, of an answer that is whole."""
        return self._taken() if self._pieces else b""

    @property
    def ended(self) -> bool:
        """Whether the answer was received and handed out to its end."""
        return self._complete and not self._pieces

    async def _wait(self, due: float) -> None:
        waiter = self._waiter = self._loop.create_future()
        self._due = due
        try:
            await waiter
        finally:
            mine = self._waiter is waiter
            if mine:  # else the line was released meanwhile, and is perhaps another's
                self._waiter = None
                self._due = NEVER
        if mine and self._silent:
            self._silent = False
            raise Silent

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def look(self, now: float) -> None:
        """Act on the limit of time; called by the sweep."""
        if self._due <= now:
            if self._busy:
                self._silent = True
                self._wake()
            else:
                self.drop()

    def release(self) -> None:
        """The exchange is over: keep the line if its answer was read to its end."""
        transport = self._transport
        self._wake()
        self._waiter = self._sink = None  # whoever waits still, waits no longer for this line
        self._busy = False
        unsent = transport is not None and transport.get_write_buffer_size() > 0
        if self.ended and self._keep and not (self._surplus or self._lost or unsent):
            self._due = self._loop.time() + KEEP_IDLE_S
            self._pool.keep(self)
        else:
            self.drop()

    def drop(self) -> None:
        """Close at once, which also tells the replica to stop working."""
        self._busy = False
        self._due = NEVER
        self._pool.forget(self)
        if self._transport is not None:
            self._transport.abort()


Find = Callable[[Place], Awaitable[Sequence[str]]]


class Pool:
    """All lines. Make it inside the event loop. ``tls`` is spoken to https places. ``find`` says
    at which IP addresses a place may be connected to (without it, where the system finds it)."""

    def __init__(
        self, *, connect_timeout_s: float, tls: ssl.SSLContext, find: Find | None = None
    ) -> None:
        self._tls = tls
        self._find = find
        self.sweep = Sweep()
        self._connect_timeout_s = connect_timeout_s
        self._idle: dict[Place, list[Line]] = {}
        self._lines: set[Line] = set()

    def take(self, place: Place) -> Line | None:
        """An idle line, if there is one."""
        idle = self._idle.get(place)
        return idle.pop() if idle else None

    async def connect(self, place: Place) -> Line:
        """A new line. Raises OSError, of which TimeoutError and ssl.SSLError are kinds, and what
        ``find`` raises."""
        line = Line(self, place)
        async with asyncio.timeout(self._connect_timeout_s):
            hosts = [place.host] if self._find is None else await self._find(place)
            await self._dial(line, hosts)
        self._lines.add(line)
        return line

    async def _dial(self, line: Line, hosts: Sequence[str]) -> None:
        """Connect to the first of ``hosts`` that accepts; one that says nothing gets its share of
        the time that is left."""
        loop, place = asyncio.get_running_loop(), line.place
        due = loop.time() + self._connect_timeout_s
        for left in reversed(range(len(hosts))):
            try:
                async with asyncio.timeout((due - loop.time()) / (left + 1)):
                    await loop.create_connection(
                        lambda: line,
                        hosts[-1 - left],
                        place.port,
                        ssl=self._tls if place.tls else None,
                        server_hostname=place.host if place.tls else None,
                    )
            except OSError:  # TimeoutError is one
                if not left:
                    raise
            else:
                return

    def keep(self, line: Line) -> None:
        """``line`` may be used again."""
        self._idle.setdefault(line.place, []).append(line)

    def forget(self, line: Line) -> None:
        """``line`` is of no use any more."""
        self.sweep.remove(line)
        self._lines.discard(line)
        idle = self._idle.get(line.place)
        if idle is not None and line in idle:
            idle.remove(line)
        if not idle:
            self._idle.pop(line.place, None)

    async def close(self) -> None:
        """Drop every line."""
        for line in list(self._lines):
            line.drop()
        await asyncio.sleep(0)
