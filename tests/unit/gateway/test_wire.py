"""Requests that are malformed, smuggled, slow or too large, at the socket of the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from cloudlm.gateway import connection as connection_module
from cloudlm.gateway.app import make_server
from cloudlm.gateway.connection import Site
from cloudlm.gateway.exchange import GatewayRequest, GatewayResponse
from cloudlm.gateway.server import GatewayServer, listen
from cloudlm.security.hosts import HostGuard

GOOD = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Echo:
    """A site that says what it was asked; ``seen`` are the requests that got through."""

    def __init__(self) -> None:
        self.seen: list[GatewayRequest] = []
        self.gate: asyncio.Event | None = None
        self.stream = 0
        self.port = 0
        self.site: Any = None

    async def answer(self, request: GatewayRequest) -> GatewayResponse:
        self.seen.append(request)
        if self.gate is not None:
            await self.gate.wait()
        if self.stream:
            return GatewayResponse(200, {}, Pieces(self.stream))
        told = {"method": request.method, "path": request.path, "body": request.body.decode()}
        return GatewayResponse(200, {"x-path": request.path}, json.dumps(told).encode())

    async def send(self, *pieces: bytes, timeout_s: float = 10.0, count: int = 0) -> bytes:
        """All that comes back until the server closes or is quiet, or so many answers are here."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        got = b""
        try:
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0)
            writer.transport.set_write_buffer_limits(0)
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(timeout_s):
                    while piece := await reader.read(65536):
                        got += piece
                        if count and len(statuses(got)) >= count:
                            break
        finally:
            writer.transport.abort()
        return got


class Pieces:
    """A stream of so many pieces."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.closed = False

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> bytes:
        if not self.left:
            raise StopAsyncIteration
        self.left -= 1
        return b"piece%d;" % self.left

    async def pump(self, write: Callable[[bytes], bool]) -> None:
        """Every other piece goes this way."""
        if self.left:
            write(await self.__anext__())

    async def aclose(self) -> None:
        self.closed = True


def refuse(error: Any, headers: dict[str, str]) -> GatewayResponse:
    return GatewayResponse(error.status, {"x-refused": "yes"}, error.message.encode())


@contextlib.asynccontextmanager
async def echoing(max_body_bytes: int = 10_000, host: str = "0.0.0.0") -> AsyncIterator[Echo]:
    echo = Echo()
    site = Site(
        answer=echo.answer,
        refuse=refuse,
        guard=HostGuard(host),
        max_body_bytes=max_body_bytes,
        stuck_after_s=0.5,
    )
    server = GatewayServer(site, drain_timeout_s=0.1, cut=lambda: None)
    bound = listen("127.0.0.1", 0)
    echo.port, echo.site = bound.getsockname()[1], site
    task = asyncio.create_task(server.run(bound))
    try:
        yield echo
    finally:
        server.stop()
        await asyncio.wait_for(task, 60)


def statuses(got: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z]", got)]


def post(*lines: str, body: bytes = b"") -> bytes:
    head = "\r\n".join(["POST /p HTTP/1.1", "Host: a", *lines])
    return head.encode("latin-1") + b"\r\n\r\n" + body


CHUNKED = "Transfer-Encoding: chunked"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
HOSTILE: dict[str, bytes] = {
    "two lengths": post("Content-Length: 3", "Content-Length: 3", body=b"abc"),
    "other lengths": post("Content-Length: 3", "Content-Length: 30", body=b"abc" + SMUGGLED),
    "list of lengths": post("Content-Length: 3, 3", body=b"abc"),
    "length and chunks": post("Content-Length: 3", CHUNKED, body=b"0\r\n\r\n" + SMUGGLED),
    "chunks and length": post(CHUNKED, "Content-Length: 3", body=b"0\r\n\r\n" + SMUGGLED),
    "signed length": post("Content-Length: +3", body=b"abc"),
    "negative length": post("Content-Length: -3", body=b"abc"),
    "hexadecimal length": post("Content-Length: 0x3", body=b"abc"),
    "no length": post("Content-Length:", body=b"abc"),
    "length with a gap": post("Content-Length: 3 3", body=b"abc"),
    "endless length": post("Content-Length: 99999999999999999999999", body=b"abc"),
    "unknown coding": post("Transfer-Encoding: xchunked", body=b"0\r\n\r\n" + SMUGGLED),
    "two codings": post("Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    "chunked not last": post("Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n"),
    "coding given twice": post(CHUNKED, "Transfer-Encoding: identity", body=b"0\r\n\r\n"),
    "space before the colon": post("Transfer-Encoding : chunked", body=b"0\r\n\r\n"),
    "folded line": post("X: a", " b"),
    "folded coding": post("Transfer-Encoding:", " chunked", body=b"0\r\n\r\n"),
    "space before the first header": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "space in a name": post("X y: z"),
    "empty name": post(": z"),
    "no colon": post("nonsense"),
    "bare line feed": b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    "bare carriage return": b"GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n",
    "only line feeds": b"GET / HTTP/1.1\nHost: a\n\n",
    "NUL": post("X: a\0b"),
    "control character": post("X: a\x01b"),
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "two keys": post("Authorization: Bearer a", "Authorization: Bearer b"),
    "other host in the target": b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "target without a slash": b"GET x HTTP/1.1\r\nHost: a\r\n\r\n",
    "target of bytes": b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    "space in the target": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "small method": b"get / HTTP/1.1\r\nHost: a\r\n\r\n",
    "made-up method": b"SMUGGLE / HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP 0.9": b"GET /\r\n\r\n",
    "HTTP 1.2": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "HTTP 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 50,
    "chunks in HTTP 1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a tunnel": b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n" + SMUGGLED,
    "chunk size 0x": post(CHUNKED, body=b"0x3\r\nabc\r\n0\r\n\r\n"),
    "negative chunk": post(CHUNKED, body=b"-3\r\nabc\r\n0\r\n\r\n"),
    "chunk after a space": post(CHUNKED, body=b" 3\r\nabc\r\n0\r\n\r\n"),
    "chunk before a space": post(CHUNKED, body=b"3 \r\nabc\r\n0\r\n\r\n"),
    "no chunk size": post(CHUNKED, body=b"\r\nabc\r\n0\r\n\r\n"),
    "endless chunk": post(CHUNKED, body=b"fffffffffffffffff\r\nabc"),
    "chunk longer than said": post(CHUNKED, body=b"3\r\nabcd\r\n0\r\n\r\n"),
    "chunk line of a line feed": post(CHUNKED, body=b"3\nabc\r\n0\r\n\r\n"),
    "extension of a line feed": post(CHUNKED, body=b"3;a\nabc\r\n0\r\n\r\n"),
    "unknown expectation": post("Expect: a-pony", "Content-Length: 3", body=b"abc"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_what_could_be_read_in_two_ways_is_refused_and_ends_the_connection(name: str) -> None:
    async with echoing() as echo:
        got = await echo.send(HOSTILE[name] + SMUGGLED)
        assert len(statuses(got)) == 1, got
        assert statuses(got)[0] in (400, 405, 501), got
        assert b"connection: close" in got
        assert not echo.seen
        assert statuses(await echo.send(GOOD, count=1)) == [200]  # still serves


@pytest.mark.parametrize("name", ["length and chunks", "folded line", "negative chunk", "no host"])
async def test_a_hostile_request_behind_a_good_one_waits_for_its_turn(name: str) -> None:
    async with echoing() as echo:
        echo.gate = asyncio.Event()
        asking = asyncio.create_task(echo.send(GOOD + HOSTILE[name] + SMUGGLED))
        await asyncio.sleep(0.05)
        echo.gate.set()
        found = statuses(await asking)
        assert found[0] == 200
        assert found[1:] and found[1] >= 400
        assert [request.path for request in echo.seen] == ["/livez"]


async def test_any_split_is_the_same_request() -> None:
    body = b'{"a": "' + b"x" * 50 + b'"}'
    wires = [
        post("X-Y: z", f"Content-Length: {len(body)}", "Connection: close", body=body),
        post(CHUNKED, "Connection: close", body=b"5\r\n%b\r\n" % body[:5])
        + b"%x;ext=1\r\n%b\r\n0\r\nAuthorization: Bearer evil\r\nX: y\r\n\r\n"
        % (len(body) - 5, body[5:]),
    ]
    async with echoing() as echo:
        for wire in wires:
            for cut in range(1, len(wire), 7):
                got = await echo.send(wire[:cut], wire[cut:])
                assert statuses(got) == [200]
        assert {request.body for request in echo.seen} == {body}
        assert not [r for r in echo.seen if "authorization" in r.headers]  # trailers say nothing


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with echoing() as echo:
        wire = b"".join(
            b"GET /%d HTTP/1.1\r\nHost: a\r\n%b\r\n" % (n, b"Connection: close\r\n" * (n == 19))
            for n in range(20)
        )
        got = await echo.send(wire[:333], wire[333:])
        paths = [line for line in got.split(b"\r\n") if line.startswith(b"x-path")]
        assert paths == [b"x-path: /%d" % n for n in range(20)]
        assert got.count(b"connection: close") == 1


async def test_too_many_pipelined_requests_end_the_connection() -> None:
    async with echoing() as echo:
        echo.gate = asyncio.Event()
        asking = asyncio.create_task(echo.send(GOOD * 100))
        await asyncio.sleep(0.05)
        echo.gate.set()
        found = statuses(await asking)
        limit = connection_module.MAX_WAITING_REQUESTS
        assert found == [200] * (limit + 1) + [400]


async def test_pipelined_flood_is_not_read_while_an_answer_runs() -> None:
    async with echoing() as echo:
        echo.gate = asyncio.Event()
        reader, writer = await asyncio.open_connection("127.0.0.1", echo.port)
        writer.write(GOOD)
        await asyncio.sleep(0.05)
        writer.write(b"GET /x HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 8_000_000)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.drain(), 0.3)
        echo.gate.set()
        got = await asyncio.wait_for(reader.read(), 60)
        assert statuses(got) == [200, 431]
        writer.transport.abort()


@pytest.mark.promise(18)
@pytest.mark.parametrize(
    ("wire", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
        (post(*[f"X{n}: y" for n in range(200)]), 431),
        (post("Content-Length: 10001"), 413),
        (post(CHUNKED, body=b"2711\r\n" + b"x" * 10_001), 413),
        (post(CHUNKED, body=b"1;" + b"x" * 30_000 + b"\r\na\r\n0\r\n\r\n"), 200),
        (post(CHUNKED, body=b"0\r\n" + b"X: y\r\n" * 20_000 + b"\r\n"), 431),
    ],
)
async def test_oversized(wire: bytes, status: int) -> None:
    async with echoing() as echo:
        cut = len(wire) // 2
        assert statuses(await echo.send(wire[:cut], wire[cut:], count=1))[:1] == [status]


@pytest.mark.promise(18)
async def test_chunk_extensions_do_not_hide_a_flood() -> None:
    async with echoing(max_body_bytes=1024) as echo:
        flood = [b"1;" + b"x" * 4000 + b"\r\na\r\n"] * 10
        assert statuses(await echo.send(post(CHUNKED), *flood)) == [413]


async def test_continue_is_said_only_when_a_body_is_awaited() -> None:
    async with echoing() as echo:
        reader, writer = await asyncio.open_connection("127.0.0.1", echo.port)
        writer.write(post("Expect: 100-continue", "Content-Length: 3"))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"abc")
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        writer.write(post("Expect: 100-continue"))
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        writer.write(post("Expect: 100-continue", "Content-Length: 99999"))
        assert (await reader.read(1000)).startswith(b"HTTP/1.1 413")  # not asked for at all
        writer.transport.abort()


async def test_head_has_the_head_alone() -> None:
    async with echoing() as echo:
        got = await echo.send(b"HEAD /h HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert statuses(got) == [200]
        head, _, body = got.partition(b"\r\n\r\n")
        assert b"content-length: 4" in head
        assert body == b""
        echo.stream = 3
        got = await echo.send(b"HEAD /h HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert got.endswith(b"\r\n\r\n")
        assert b"piece" not in got


async def test_old_clients() -> None:
    async with echoing() as echo:
        got = await echo.send(b"GET /old HTTP/1.0\r\n\r\n")
        assert b"connection: close" in got
        assert b'"/old"' in got
        kept = b"GET /old HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
        assert (await echo.send(kept + kept, count=2)).count(b"connection: keep-alive") == 2
        echo.stream = 2
        got = await echo.send(kept)
        assert got.endswith(b"\r\n\r\npiece1;piece0;")
        assert b"transfer-encoding" not in got


async def test_upgrades_are_answered_as_if_not_asked_for() -> None:
    async with echoing() as echo:
        wire = b"GET /u HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
        assert statuses(await echo.send(wire + SMUGGLED)) == [200]
        assert [request.path for request in echo.seen] == ["/u"]


async def test_targets() -> None:
    async with echoing() as echo:
        for target in (b"/a%20b?q=1&x=%41", b"http://a/a%20b?q=1&x=%41", b"HTTP://A/a%20b"):
            await echo.send(b"GET " + target + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert [r.path for r in echo.seen] == ["/a b"] * 3
        assert [r.query for r in echo.seen] == ["q=1&x=%41"] * 2 + [""]


async def test_requests_per_connection_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "MAX_REQUESTS", 3)
    async with echoing() as echo:
        assert statuses(await echo.send(GOOD * 5)) == [200, 200, 200]


@pytest.mark.promise(10)
async def test_a_slow_body_gets_400_and_a_quiet_connection_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection_module, "BODY_TIMEOUT_S", 0.1)
    monkeypatch.setattr(connection_module, "KEEP_ALIVE_S", 0.1)
    async with echoing() as echo:
        got = await echo.send(post("Content-Length: 3", body=b"a"))
        assert statuses(got) == [400]
        assert b"did not arrive" in got
        began = time.monotonic()
        assert statuses(await echo.send(GOOD)) == [200]
        assert time.monotonic() - began < 9
        reader, writer = await asyncio.open_connection("127.0.0.1", echo.port)
        writer.write(GOOD + post("Content-Length: 3", body=b"a"))
        got = await asyncio.wait_for(reader.read(), 60)
        assert statuses(got) == [200, 400]
        writer.transport.abort()


async def test_a_refusal_reaches_a_client_that_still_sends() -> None:
    async with echoing() as echo:
        reader, writer = await asyncio.open_connection("127.0.0.1", echo.port)
        writer.write(post("Content-Length: 5000000"))
        with contextlib.suppress(ConnectionError):
            for _ in range(50):
                writer.write(b"x" * 100_000)
                await asyncio.sleep(0.001)
        got = await asyncio.wait_for(reader.read(), 60)
        assert statuses(got) == [413]
        writer.transport.abort()


@pytest.mark.promise(10)
async def test_a_client_that_reads_no_answer_is_dropped() -> None:
    async with echoing() as echo:
        echo.stream = 2_000_000
        small = socket.create_connection(("127.0.0.1", echo.port))
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.sendall(GOOD)
        deadline = time.monotonic() + 60
        while not echo.seen or echo.site.connections:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        small.close()


async def test_many_who_connect_at_once_are_all_served() -> None:
    async with echoing() as echo:
        wire = GOOD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        answers = await asyncio.gather(*(echo.send(wire) for _ in range(200)))
        assert all(statuses(got) == [200] for got in answers)


async def test_nagle_is_off_and_keepalive_on() -> None:
    async with echoing() as echo:
        _, writer = await asyncio.open_connection("127.0.0.1", echo.port)
        writer.write(GOOD)
        while not echo.seen:
            await asyncio.sleep(0.01)
        (connection,) = echo.site.connections
        accepted = connection._transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        writer.transport.abort()


@pytest.mark.promise(6)
async def test_a_header_cannot_break_out_of_an_answer() -> None:
    async with echoing() as echo:
        got = await echo.send(b"GET /a%0d%0ax:%20y HTTP/1.1\r\nHost: a\r\n\r\n")
        assert got == b""  # x-path would have held a line end: dropped, never sent


async def test_metrics_answer_through_the_bridge(kit: Any) -> None:
    async with kit.open_rig() as rig:
        server, bound = make_server(rig.gateway), listen("127.0.0.1", 0)
        echo = Echo()
        echo.port = bound.getsockname()[1]
        task = asyncio.create_task(server.run(bound))
        wire = b"%b /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        got = await echo.send(wire % b"GET")
        assert b"cloudlm_gateway_state_age_seconds" in got
        assert statuses(await echo.send(wire % b"POST")) == [405]
        assert (await echo.send(wire % b"HEAD")).endswith(b"\r\n\r\n")
        server.stop()
        await asyncio.wait_for(task, 60)
