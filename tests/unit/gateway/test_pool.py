"""The client side: lines to replicas that break, lie, are silent or are used again."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cloudlm.core.errors import InternalError, UpstreamFailed, UpstreamTimeout
from cloudlm.gateway import pool as pool_module
from cloudlm.gateway.pool import header_lines, read_url
from cloudlm.gateway.upstream import Answer, ReplicaRefused, Upstream

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


class Peer:
    """A server that writes the same bytes after each request. ``close`` ends each answer."""

    def __init__(self, answer: bytes, *, close: bool = False, linger_s: float = 0.0) -> None:
        self.answer, self.close, self.linger_s = answer, close, linger_s
        self.connections = 0
        self.heads: list[bytes] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                await reader.readexactly(2)
                writer.write(self.answer)
                await writer.drain()
                if self.linger_s:
                    await asyncio.sleep(self.linger_s)
                if self.close:
                    break
        writer.close()


@contextlib.asynccontextmanager
async def asking(peer: Peer, **how: Any) -> AsyncIterator[Callable[..., Any]]:
    """A function that sends one request to ``peer`` and returns its whole answer."""
    async with sending(peer, **how) as send:

        async def ask(timeout_s: float = 2.0, headers: dict[str, str] | None = None) -> bytes:
            answer = await send(timeout_s, headers)
            try:
                return bytes(await answer.whole(timeout_s))
            finally:
                answer.close()

        yield ask


@contextlib.asynccontextmanager
async def sending(peer: Peer, **how: Any) -> AsyncIterator[Callable[..., Any]]:
    """A function that sends one request to ``peer`` and returns its answer, to be closed."""
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0, **how)
    port = server.sockets[0].getsockname()[1]
    upstream = Upstream(token="t" * 20, connect_timeout_s=1.0)
    await upstream.open()
    scheme = "https" if how else "http"

    async def send(timeout_s: float = 2.0, headers: dict[str, str] | None = None) -> Answer:
        url = f"{scheme}://127.0.0.1:{port}/v1/x"
        return await upstream.send(
            url, b"{}", headers or {}, replica="r", timeout_s=timeout_s, now=0.0
        )

    try:
        yield send
    finally:
        await upstream.close()
        server.close()
        for writer in peer.writers:
            writer.transport.abort()
        await asyncio.sleep(0.01)


async def test_a_line_is_used_again() -> None:
    peer = Peer(OK + b"Content-Length: 2\r\n\r\nhi")
    async with asking(peer) as ask:
        assert [await ask() for _ in range(5)] == [b"hi"] * 5
        assert peer.connections == 1
        assert b"authorization: Bearer tttttttttttttttttttt\r\n" in peer.heads[0]
        assert peer.heads[0].startswith(b"POST /v1/x HTTP/1.1\r\nhost: 127.0.0.1:")


@pytest.mark.parametrize(
    ("answer", "close", "kept"),
    [
        (b"Transfer-Encoding: chunked\r\n\r\n1\r\nh\r\n1;x\r\ni\r\n0\r\nA: b\r\n\r\n", False, True),
        (b"\r\nhi", True, False),  # ends with the connection
        (b"Connection: close\r\nContent-Length: 2\r\n\r\nhi", False, False),
        (b"Content-Length: 2\r\n\r\nhi" + OK + b"Content-Length: 4\r\n\r\nevil", False, False),
        (b"Content-Length: 2\r\n\r\nhiHTTP/1.1 200", False, False),
    ],
)
async def test_every_framing(answer: bytes, close: bool, kept: bool) -> None:
    peer = Peer(OK + answer, close=close)
    async with asking(peer) as ask:
        assert [await ask(), await ask()] == [b"hi", b"hi"]
        assert peer.connections == (1 if kept else 2)


async def test_interim_answers_are_passed_over() -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    async with asking(Peer(interim + OK + b"Content-Length: 2\r\n\r\nhi")) as ask:
        assert await ask() == b"hi"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        OK + b"Content-Length: 5\r\n\r\nhi",
        OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nhi",
        OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nhi",
        OK + b"Transfer-Encoding: gzip\r\n\r\nhi",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhi",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhi",
        OK + b"X: a\r\n folded\r\nContent-Length: 2\r\n\r\nhi",
        OK + b"X: " + b"y" * 100_000 + b"\r\nContent-Length: 2\r\n\r\nhi",
    ],
)
async def test_broken_answers(answer: bytes) -> None:
    peer = Peer(answer, close=True)
    async with asking(peer) as ask:
        with pytest.raises(UpstreamFailed):
            await ask()
        assert peer.connections == 1  # a fresh line that fails is no reason to send again unseen


@pytest.mark.parametrize("arrived", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
async def test_the_largest_answer_and_one_byte_more(arrived: bool, chunked: bool) -> None:
    """Also of one that has arrived to its end when it is asked for, which is the quicker way."""
    size = 2000
    framed = b"%x\r\n%s\r\n0\r\n\r\n" % (size, b"x" * size)
    plain = OK + b"Content-Length: %d\r\n\r\n" % size + b"x" * size
    peer = Peer(OK + b"Transfer-Encoding: chunked\r\n\r\n" + framed if chunked else plain)
    async with sending(peer) as send:
        for limit, fits in ((size, True), (size - 1, False)):
            answer = await send()
            while arrived and not answer._line.is_whole:
                await asyncio.sleep(0)
            if fits:
                assert await answer.whole(30.0, limit) == b"x" * size
            else:
                with pytest.raises(UpstreamFailed, match="too large"):
                    await answer.whole(30.0, limit)
            answer.close()


async def test_a_kept_line_that_died_is_replaced_unseen() -> None:
    peer = Peer(OK + b"Content-Length: 2\r\n\r\nhi")
    async with asking(peer) as ask:
        assert await ask() == b"hi"
        peer.answer, peer.close = b"", True  # the next request on it meets a closing server
        asked = asyncio.create_task(ask())
        await asyncio.sleep(0.02)
        with contextlib.suppress(UpstreamFailed):
            await asked
        assert peer.connections == 2  # tried once more, on a new line, and not again
        peer.answer, peer.close = OK + b"Content-Length: 2\r\n\r\nhi", False
        assert await ask() == b"hi"
        peer.writers[-1].close()  # dies while idle
        await asyncio.sleep(0.02)
        assert await ask() == b"hi"


async def test_no_second_try_once_a_byte_came_back() -> None:
    peer = Peer(OK + b"Content-Length: 2\r\n\r\nhi")
    async with asking(peer) as ask:
        assert await ask() == b"hi"
        peer.answer, peer.close = b"HTTP/1.1 2", True
        with pytest.raises(UpstreamFailed):
            await ask()
        assert peer.connections == 1


@pytest.mark.promise(10)
async def test_silence() -> None:
    async with asking(Peer(b"", linger_s=5)) as ask:
        with pytest.raises(UpstreamTimeout):
            await ask(0.1)
    async with asking(Peer(OK + b"Content-Length: 9\r\n\r\nhi", linger_s=5)) as ask:
        with pytest.raises(UpstreamTimeout):
            await ask(0.1)


async def test_idle_lines_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "KEEP_IDLE_S", 0.1)
    peer = Peer(OK + b"Content-Length: 2\r\n\r\nhi")
    async with asking(peer) as ask:
        await ask()
        await asyncio.sleep(0.25)
        await ask()
        assert peer.connections == 2


async def test_nobody_there() -> None:
    upstream = Upstream(token=None, connect_timeout_s=0.5)
    await upstream.open()
    for url in (
        "http://127.0.0.1:1/",
        "http://a b/",
        "ftp://a/",
        "http://u:p@a/",
        "http://a/\r\nx",
    ):
        with pytest.raises(UpstreamFailed):
            await upstream.send(url, b"", {}, replica="r", timeout_s=1, now=0.0)
    await upstream.close()


async def test_errors_come_with_their_body() -> None:
    body = b'{"error":{"message":"no","type":"t","param":null,"code":"c"}}'
    head = b"HTTP/1.1 429 Slow\r\nRetry-After: 7\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with asking(Peer(head + body)) as ask:
        with pytest.raises(ReplicaRefused) as caught:
            await ask()
        assert (caught.value.answered_status, caught.value.retry_after_s) == (429, 7.0)


@pytest.mark.promise(15)
@pytest.mark.parametrize("value", ["a\r\nX: y", "a\nb", "a\rb", "a\0b"])
async def test_headers_cannot_be_injected(value: str) -> None:
    async with asking(Peer(OK + b"Content-Length: 0\r\n\r\n")) as ask:
        with pytest.raises(InternalError):
            await ask(headers={"x": value})
    for name in ("a b", "a\r\nb", "a:b"):
        with pytest.raises(ValueError, match="a header's name"):
            header_lines({name: "x"})


def test_urls() -> None:
    place, host, target = read_url("https://Example.com/v1/x?q=1")
    assert (place.host, place.port, place.tls) == ("example.com", 443, True)
    assert (host, target) == ("example.com", "/v1/x?q=1")
    assert read_url("http://[::1]:8100/x")[1] == "[::1]:8100"


def certificate(folder: Path) -> ssl.SSLContext:
    """A context for 127.0.0.1 with a certificate of its own, which is at ``folder``/own.pem."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    (folder / "own.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "own.pem", folder / "key.pem")
    return context


@pytest.mark.promise(37)
async def test_tls_to_replicas_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = certificate(tmp_path)
    async with asking(Peer(OK + b"Content-Length: 2\r\n\r\nhi"), ssl=context) as ask:
        with pytest.raises(UpstreamFailed):
            await ask()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "own.pem"))
    async with asking(Peer(OK + b"Content-Length: 2\r\n\r\nhi"), ssl=context) as ask:
        assert [await ask(), await ask()] == [b"hi", b"hi"]


async def test_a_line_given_back_while_it_pours_is_not_touched_by_who_poured() -> None:
    """An answer that is ended in the middle of a piece which holds its end too: the line goes to
    the next request before the first one's task runs again."""
    body = b"5\r\nhello\r\n"
    peer = Peer(OK + b"Transfer-Encoding: chunked\r\n\r\n" + body)
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    upstream = Upstream(token="t" * 20, connect_timeout_s=1.0)
    await upstream.open()
    next_ones: list[asyncio.Task[Any]] = []

    async def ask() -> Any:
        url = f"http://127.0.0.1:{port}/v1/x"
        return await upstream.send(url, b"{}", {}, replica="r", timeout_s=60.0, now=0.0)

    try:
        first = await ask()
        assert await first.piece(60.0) == b"hello"

        def end(_: bytes) -> bool:
            next_ones.append(asyncio.create_task(ask()))
            first.close()
            return False

        pouring = asyncio.create_task(first.flow(end, 60.0))
        await asyncio.sleep(0)
        peer.writers[0].write(body + b"0\r\n\r\n")
        await pouring
        second = await asyncio.wait_for(next_ones[0], 60.0)
        assert await second.piece(60.0) == b"hello"
        assert peer.connections == 1
        second.close()
    finally:
        await upstream.close()
        server.close()
        for writer in peer.writers:
            writer.transport.abort()
        await asyncio.sleep(0.01)
