"""TLS on the gateway's address and towards replicas, on loopback sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpx2Client
from served_gateway import served as served_gateway

from cloudlm.core.deployment import Endpoint
from cloudlm.core.errors import BadSetting, UpstreamFailed
from cloudlm.core.settings import GatewaySettings
from cloudlm.gateway.app import Gateway
from cloudlm.gateway.upstream import Upstream
from cloudlm.security.authority import Authority, Purpose, ensure_self_signed
from cloudlm.security.tls import Pair, server_context
from cloudlm.security.transport import replica_context
from cloudlm.state.memory import MemoryState


def served(kit: Any, home: Path, **settings: Any) -> Any:
    """A gateway on TLS; its certificate lies in ``home``."""
    return served_gateway(kit, home=home, **{"tls": "self-signed", **settings})


def trusting(home: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(home / "tls" / "gateway-cert.pem"))


async def dial(port: int, context: ssl.SSLContext | None) -> tuple[Any, Any]:
    return await asyncio.open_connection("127.0.0.1", port, ssl=context)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        await writer.wait_closed()


async def test_the_official_client_over_tls(kit: Any, tmp_path: Path) -> None:
    async with (
        served(kit, tmp_path) as rig,
        AsyncOpenAI(
            base_url=f"https://127.0.0.1:{rig.port}/v1",
            api_key=rig.key,
            max_retries=0,
            http_client=DefaultAsyncHttpx2Client(trust_env=False, verify=trusting(tmp_path)),
        ) as client,
    ):
        said: Any = [{"role": "user", "content": "hello"}]
        for _ in range(3):
            answer = await client.chat.completions.create(model=kit.MODEL, messages=said)
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 5
        stream = await client.chat.completions.create(model=kit.MODEL, messages=said, stream=True)
        assert len([chunk async for chunk in stream if chunk.choices[0].delta.content]) == 5
        assert rig.server.connections == 1  # kept open over all of them


async def test_plain_and_unknown_are_refused(kit: Any, tmp_path: Path) -> None:
    async with served(kit, tmp_path) as rig:
        reader, writer = await dial(rig.port, None)
        writer.write(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
        said = b""
        with contextlib.suppress(ConnectionError):
            said = await asyncio.wait_for(reader.read(100), 60)
        assert not said.startswith(b"HTTP")
        await hang_up(writer)
        with pytest.raises(ssl.SSLCertVerificationError):
            await dial(rig.port, ssl.create_default_context())
        reader, writer = await dial(rig.port, trusting(tmp_path))
        writer.write(b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), 60)).startswith(b"HTTP/1.1 200")
        await hang_up(writer)


@pytest.mark.promise(10)
async def test_a_handshake_that_never_comes_holds_up_no_end(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudlm.gateway.server._CUT_GRACE_S", 0.05)
    async with served(kit, tmp_path) as rig:
        _, silent = await dial(rig.port, None)
        await asyncio.sleep(0.02)
        began = time.monotonic()
    assert time.monotonic() - began < 30.0
    await hang_up(silent)


@pytest.mark.promise(37)
async def test_a_new_certificate_is_shown_to_the_next_client(kit: Any, tmp_path: Path) -> None:
    names = [socket.gethostname(), "127.0.0.1"]
    ensure_self_signed(tmp_path / "tls", names, time.time() - 3 * 86_400)
    async with served(kit, tmp_path) as rig:
        old = trusting(tmp_path)
        _, kept = await dial(rig.port, old)
        pem = tmp_path / "tls" / "gateway.pem"
        pem.write_text("nonsense")
        assert not rig.gateway.door.context.renew()
        _, writer = await dial(rig.port, old)  # the last good one serves on
        await hang_up(writer)
        before = rig.gateway.door.expires_at
        ensure_self_signed(tmp_path / "tls", ["new.host"], time.time())
        assert rig.gateway.door.context.renew()
        assert rig.gateway.door.expires_at > before + 2 * 86_400
        with pytest.raises(ssl.SSLCertVerificationError):
            await dial(rig.port, old)
        _, writer = await dial(rig.port, trusting(tmp_path))
        await hang_up(writer)
        assert not kept.transport.is_closing()
        await hang_up(kept)


def test_a_bad_certificate_refuses_to_start(kit: Any, tmp_path: Path) -> None:
    wanted = GatewaySettings(tls_cert=str(tmp_path / "none.pem"))
    with pytest.raises(BadSetting, match=r"gateway\.tls_cert"):
        Gateway(wanted, MemoryState(), home=tmp_path, pepper=kit.PEPPER, worker_token=None)


@contextlib.asynccontextmanager
async def a_worker(folder: Path, client_ca: str) -> AsyncIterator[str]:
    """A TLS server that answers everything, at an address."""
    identity = Authority(folder).ensure(Purpose.WORKER, (), time.time())
    context = server_context(Pair("worker.tls", str(identity)), client_ca=client_ca)
    body = json.dumps({"ok": True}).encode()
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n{}")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
            await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0.01)


async def ask(url: str, folder: Path, **settings: Any) -> bytes:
    upstream = Upstream(
        token="t", connect_timeout_s=2.0, tls=replica_context(GatewaySettings(**settings), folder)
    )
    await upstream.open()
    try:
        answer = await upstream.send(url, b"{}", {}, replica="w", timeout_s=2.0, now=0.0)
        try:
            return await answer.whole(2.0)
        finally:
            answer.close()
    finally:
        await upstream.close()


@pytest.mark.promise(37)
async def test_a_worker_elsewhere_wants_this_installations_gateway(tmp_path: Path) -> None:
    """Replicas are reachable with a certificate of their installation only."""
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    for authority in (ours, theirs):
        authority.ensure(Purpose.GATEWAY, (), time.time())
    async with a_worker(ours.folder, str(ours.certificate)) as url:
        assert await ask(url, ours.folder) == b'{"ok": true}'
        with pytest.raises(UpstreamFailed, match="no trusted TLS with replica w"):
            await ask(url, theirs.folder)
        with pytest.raises(UpstreamFailed):  # trusts the worker, and is not trusted by it
            await ask(url, theirs.folder, upstream_ca=str(ours.certificate))
        with pytest.raises(UpstreamFailed):
            await ask(url, tmp_path / "nobody", upstream_ca=str(ours.certificate))
        issued = ours.issue(Purpose.GATEWAY, (), tmp_path / "out", time.time(), days=1)
        other = {"upstream_ca": str(ours.certificate), "upstream_cert": str(issued)}
        assert await ask(url, tmp_path / "nobody", **other) == b'{"ok": true}'


@pytest.mark.promise(37)
async def test_no_prompt_goes_to_another_machine_in_the_clear(kit: Any, tmp_path: Path) -> None:
    async with kit.open_rig() as rig:
        elsewhere = [Endpoint(kit.MODEL, "away", "http://192.0.2.1:8100", 1)]
        await rig.state.put_endpoints(kit.MODEL, elsewhere)
        await kit.until(
            lambda: rig.gateway.view.snapshot().models[kit.MODEL].endpoints == tuple(elsewhere)
        )
        result = await rig.ask(kit.chat_body())
        assert result.status == 502
        assert "upstream_plaintext" in result.json["error"]["message"]
