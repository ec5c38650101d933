"""The gateway behind its real web server, on loopback sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from typing import Any

import pytest
from served_gateway import close, connect, served, talk, wire

from cloudlm.core.errors import BadSetting
from cloudlm.core.tenant import Outcome
from cloudlm.gateway import connection as connection_module
from cloudlm.gateway.server import listen
from cloudlm.security.hosts import host_name, is_loopback


async def test_health_and_metrics(kit: Any) -> None:
    async with served(kit) as rig:
        _, _, body = await talk(rig, wire(rig, method="GET", path="/livez"))
        assert body == b"ok"
        for path in ("/readyz", "/health"):
            status, _, body = await talk(rig, wire(rig, method="GET", path=path))
            assert (status, json.loads(body)) == (
                200,
                {"ready": True, "status": "ready", "notes": []},
            )
        rig.gateway.stopping = True
        status, _, body = await talk(rig, wire(rig, method="GET", path="/readyz"))
        assert (status, json.loads(body)["status"]) == (503, "stopping")
        rig.gateway.stopping = False
        await talk(rig, wire(rig, kit.chat_body()))
        await talk(rig, wire(rig, kit.chat_body(model="made-up-by-a-client")))
        _, headers, text = await talk(rig, wire(rig, method="GET", path="/metrics"))
        assert headers["content-type"].startswith("text/plain")
        wanted = b'requests_total{model="tiny",outcome="finished",status="200"} 1.0'
        assert wanted in text
        assert b"made-up-by-a-client" not in text
        assert b'requests_total{model="",outcome="refused",status="404"} 1.0' in text


async def test_stream_over_the_wire(kit: Any) -> None:
    async with served(kit) as rig:
        status, headers, body = await talk(rig, wire(rig, kit.chat_body(stream=True)))
        assert status == 200
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert kit.Result(200, headers, body).tokens == 5
        assert body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("given", "kept"),
    [("ok-1._Z", True), ("x" * 65, False), ("a b", False), ("<script>", False), ("é", False)],
)
async def test_request_id(kit: Any, given: str, kept: bool) -> None:
    async with served(kit) as rig:
        _, headers, _ = await talk(rig, wire(rig, kit.chat_body(), x_request_id=given))
        assert (headers["x-request-id"] == given) is kept
        assert len(headers["x-request-id"]) > 5


@pytest.mark.promise(18)
async def test_body_limit(kit: Any) -> None:
    async with served(kit, max_body_bytes=10_000) as rig:
        big = kit.chat_body(messages=[{"role": "user", "content": "x" * 20_000}])
        began = time.perf_counter()
        # Refused on the stated length alone, before any of the body is sent.
        head = wire(rig, content_length="10000000")
        status, headers, body = await talk(rig, head)
        assert time.perf_counter() - began < 5.0
        assert status == 413
        assert headers["connection"] == "close"
        assert json.loads(body)["error"]["code"] == "payload_too_large"
        chunked = wire(rig, transfer_encoding="chunked").replace(b"content-length: 0\r\n", b"")
        raw = json.dumps(big).encode()
        pieces = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (raw[:9000], raw[9000:]))
        assert (await talk(rig, chunked + pieces))[0] == 413
        assert not rig.replicas[0].requests


@pytest.mark.promise(35)
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("", 403),
    ],
)
async def test_host_allow_list(kit: Any, host: str, status: int) -> None:
    async with served(kit) as rig:
        for method, path in (("GET", "/v1/models"), ("GET", "/readyz")):
            answer = await talk(rig, wire(rig, method=method, path=path, host=host))
            assert answer[0] == status
        answer = await talk(rig, wire(rig, method="OPTIONS", origin="http://evil.example"))
        assert answer[0] == 403
        assert not [name for name in answer[1] if name.startswith("access-control")]


def test_hosts() -> None:
    assert is_loopback("127.9.9.9")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("gateway.internal")
    assert host_name("[::1]:80") == "::1"
    assert host_name("A.b:80") == "a.b"


@pytest.mark.promise(2)
@pytest.mark.parametrize("stream", [True, False])
async def test_client_that_drops_frees_the_replica(kit: Any, stream: bool) -> None:
    async with served(kit) as rig:
        replica = rig.replicas[0]
        replica.default = kit.Plan(stall_at=3, pause_s=0 if stream else 30)
        _, writer = await connect(rig)
        writer.write(wire(rig, kit.chat_body(stream=stream)))
        await kit.until(lambda: replica.active)
        await asyncio.sleep(0.02)
        began = time.monotonic()
        await close(writer)
        await kit.until(lambda: not replica.active)
        assert replica.dropped_at[0] - began < 5.0
        (row,) = await rig.rows()
        assert row.outcome is Outcome.CANCELLED
        rig.assert_nothing_open()


@pytest.mark.promise(2)
async def test_clients_that_drop_at_any_byte_leave_nothing(kit: Any) -> None:
    async with served(kit, max_ongoing_requests=1) as rig:
        replica = rig.replicas[0]
        replica.default = kit.Plan(pause_s=0.002)
        request = wire(rig, kit.chat_body(stream=True))
        for number in range(0, 40):
            reader, writer = await connect(rig)
            writer.write(request[: len(request) - 5 + number % 7])
            if number % 7 >= 5:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1 + number * 10), 0.05)
            await close(writer)
        await kit.until(lambda: rig.gateway.admission.total == 0 and not replica.active)
        rig.assert_nothing_open()
        assert (await talk(rig, wire(rig, kit.chat_body())))[0] == 200
        assert len(await rig.rows()) == len(replica.requests)


@pytest.mark.promise(10)
@pytest.mark.known_failure("private-ai-gateway#44")
async def test_stuck_reader_is_dropped(kit: Any) -> None:
    async with served(kit, idle_timeout_s=2.0) as rig:
        replica = rig.replicas[0]
        replica.default = kit.Plan(tokens=8_000, pad=4_000)
        small = socket.create_connection(("127.0.0.1", rig.port))
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        _, writer = await asyncio.open_connection(sock=small, limit=1024)
        writer.write(wire(rig, kit.chat_body(stream=True)))
        await kit.until(lambda: replica.active)
        await kit.until(lambda: not replica.active)
        assert replica.tokens_sent < 8_000  # the replica was slowed down, not drained
        (row,) = await rig.rows()
        assert row.outcome is Outcome.CANCELLED
        assert row.completion_tokens < replica.tokens_sent
        await kit.until(lambda: not rig.server.connections)
        rig.assert_nothing_open()
        await close(writer)


@pytest.mark.promise(10)
async def test_slow_heads_are_dropped(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "HEAD_TIMEOUT_S", 0.05)
    async with served(kit) as rig:
        for begun in (b"", b"POST /v1/chat", b"GET / HTTP/1.1\r\nhost: x\r\nx: "):
            reader, writer = await connect(rig)
            writer.write(begun)
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 9.0) == b""
            await close(writer)
        assert (await talk(rig, wire(rig, kit.chat_body())))[0] == 200


async def test_huge_heads_are_refused(kit: Any) -> None:
    async with served(kit) as rig:
        reader, writer = await connect(rig)
        writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                writer.write(b"x: " + b"y" * 10_000 + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0)
            said = await asyncio.wait_for(reader.read(), 60.0)
            assert said.startswith(b"HTTP/1.1 431 ")
            assert b'"code":"head_too_large"' in said
        await close(writer)


async def test_stop_lets_requests_finish(kit: Any) -> None:
    async with served(kit, drain_timeout_s=5.0) as rig:
        rig.replicas[0].default = kit.Plan(tokens=6, pause_s=0.03)
        asking = asyncio.create_task(talk(rig, wire(rig, kit.chat_body(stream=True))))
        await kit.until(lambda: rig.replicas[0].active)
        rig.server.stop()
        status, _, body = await asking
        assert status == 200
        assert body.endswith(b"data: [DONE]\n\n")


async def test_stop_cuts_what_does_not_finish(kit: Any) -> None:
    async with served(kit, drain_timeout_s=0.1) as rig:
        rig.replicas[0].default = kit.Plan(stall_at=3)
        asking = asyncio.create_task(talk(rig, wire(rig, kit.chat_body(stream=True))))
        await kit.until(lambda: rig.replicas[0].active)
        await asyncio.sleep(0.02)
        rig.server.stop()
        status, headers, body = await asyncio.wait_for(asking, 60)
        result = kit.Result(status, headers, body)
        assert result.tokens == 2
        assert result.error["code"] == "unavailable"
        assert b"[DONE]" not in body


def test_port_in_use_is_said_clearly() -> None:
    bound = listen("127.0.0.1", 0)
    port = bound.getsockname()[1]
    try:
        with pytest.raises(BadSetting, match=f"port {port} on 127.0.0.1 is in use"):
            listen("127.0.0.1", port)
    finally:
        bound.close()
    with pytest.raises(BadSetting, match="cannot listen"):
        listen("192.0.2.1", 8000)


async def test_a_known_answer_is_told_without_its_body_on_a_kept_connection(kit: Any) -> None:
    async with served(kit, cache_models="*") as rig:
        body = kit.chat_body(temperature=0)
        status, headers, first = await talk(rig, wire(rig, body))
        assert (status, headers["x-cloudlm-cache"]) == (200, "miss")
        reader, writer = await connect(rig)
        try:
            writer.write(wire(rig, body, if_none_match=headers["etag"]))
            head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).decode().lower()
            assert head.startswith("http/1.1 304")
            assert "content-length" not in head and "transfer-encoding" not in head
            assert f"etag: {headers['etag']}" in head
            writer.write(wire(rig, {**body, "stream": True}))
            head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).decode().lower()
            assert head.startswith("http/1.1 200")
            assert "x-cloudlm-cache: miss" in head
        finally:
            await close(writer)
        status, headers, again = await talk(rig, wire(rig, body))
        assert (status, headers["x-cloudlm-cache"], again) == (200, "hit", first)
