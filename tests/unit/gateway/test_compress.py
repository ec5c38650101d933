"""Compression: who gets it, what it says, what is left alone."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.gateway import compress
from cloudlm.gateway.app import make_server
from cloudlm.gateway.compress import accepts_gzip, compressed
from cloudlm.gateway.exchange import GatewayResponse
from cloudlm.gateway.server import listen

JSON = {"content-type": "application/json"}
LONG = json.dumps({"text": "so long " * 1000}).encode()


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("gzip", True),
        ("gzip, deflate, br, zstd", True),
        ("br;q=1.0, GZIP;q=0.5", True),
        ("x-gzip", True),
        ("*", True),
        ("*;q=0.1", True),
        ("", False),
        ("identity", False),
        ("gzip;q=0", False),
        ("gzip; q=0.000, *", False),
        ("gzip;q=zero", False),
        ("br", False),
        ("gzipped", False),
    ],
)
def test_who_accepts(header: str, wanted: bool) -> None:
    assert accepts_gzip(header) is wanted


@given(st.text(alphabet="gzip*;q=0.1, -x\x00é", max_size=40))
def test_no_header_is_a_fault(header: str) -> None:
    assert accepts_gzip(header) in (True, False)


async def test_what_is_compressed_says_so() -> None:
    given = GatewayResponse(200, {**JSON, "etag": '"a"', "vary": "authorization"}, LONG)
    done = await compressed(given, "gzip", 1000)
    assert isinstance(done.body, bytes)
    assert gzip.decompress(done.body) == LONG
    assert dict(done.headers) == {
        **JSON,
        "etag": 'W/"a"',
        "vary": "authorization, accept-encoding",
        "content-encoding": "gzip",
    }
    assert given.headers["etag"] == '"a"'  # others may hold the same answer
    plain = await compressed(given, "identity", 1000)
    assert (plain.body, plain.headers["etag"]) == (LONG, '"a"')
    assert plain.headers["vary"] == "authorization, accept-encoding"


@pytest.mark.parametrize(
    ("headers", "body", "min_bytes"),
    [
        (JSON, LONG[:900], 1000),
        ({"content-type": "text/event-stream"}, LONG, 1000),
        ({"content-type": "image/png"}, LONG, 1000),
        ({**JSON, "content-encoding": "br"}, LONG, 1000),
        ({**JSON, "cache-control": "no-transform"}, LONG, 1000),
        (JSON, random.Random(1).randbytes(2048), 1000),  # would grow
        ({}, LONG, 1000),
    ],
)
async def test_what_is_left_alone(headers: dict[str, str], body: bytes, min_bytes: int) -> None:
    done = await compressed(GatewayResponse(200, headers, body), "gzip", min_bytes)
    assert done.body == body
    assert done.headers.get("content-encoding", "") != "gzip"


async def test_a_large_answer_is_compressed_beside_the_loop() -> None:
    body = LONG * 100
    assert len(body) > compress._IN_THREAD_BYTES
    done = await compressed(GatewayResponse(200, JSON, body), "gzip", 1)
    assert isinstance(done.body, bytes)
    assert gzip.decompress(done.body) == body


@pytest.fixture
async def port(kit: Any, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    async with kit.open_rig(compress_min_bytes=getattr(request, "param", 200)) as rig:
        bound = listen("127.0.0.1", 0)
        server = make_server(rig.gateway)
        rig.port = bound.getsockname()[1]
        task = asyncio.create_task(server.run(bound))
        yield rig
        server.stop()
        await asyncio.wait_for(task, 60)


async def ask(rig: Any, body: Any, accept: str) -> tuple[dict[str, str], bytes]:
    raw = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        + f"authorization: Bearer {rig.key}\r\naccept-encoding: {accept}\r\n".encode()
        + b"content-length: %d\r\n\r\n%s" % (len(raw), raw)
    )
    head, _, rest = (await asyncio.wait_for(reader.read(), 60)).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    lines = (line.partition(": ") for line in head.decode().split("\r\n")[1:])
    return {name: value for name, _, value in lines}, rest


async def test_on_the_wire(kit: Any, port: Any) -> None:
    headers, body = await ask(port, kit.chat_body(), "gzip")
    assert headers["content-encoding"] == "gzip"
    assert int(headers["content-length"]) == len(body)
    assert json.loads(gzip.decompress(body))["choices"]
    headers, body = await ask(port, kit.chat_body(), "identity")
    assert "content-encoding" not in headers
    assert headers["vary"] == "accept-encoding"
    assert json.loads(body)["choices"]
    headers, body = await ask(port, kit.chat_body(stream=True), "gzip")
    assert "content-encoding" not in headers
    assert b"data: [DONE]" in body


@pytest.mark.parametrize("port", [0, 100_000], indirect=True)
async def test_off_and_too_small(kit: Any, port: Any) -> None:
    headers, body = await ask(port, kit.chat_body(), "gzip")
    assert not {"content-encoding", "vary"} & headers.keys()
    assert json.loads(body)["choices"]
