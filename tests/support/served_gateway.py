"""A gateway behind its real server on a loopback socket, and a client that speaks bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from cloudlm.gateway.app import make_server
from cloudlm.gateway.server import listen


@contextlib.asynccontextmanager
async def served(kit: Any, **settings: Any) -> AsyncIterator[Any]:
    """A rig behind a server; ``rig.port`` is its port."""
    async with kit.open_rig(**settings) as rig:
        bound = listen("127.0.0.1", 0)
        server = make_server(rig.gateway)
        rig.port, rig.server = bound.getsockname()[1], server
        task = asyncio.create_task(server.run(bound))
        try:
            await kit.until(lambda: server.started)
            yield rig
        finally:
            server.stop()
            await asyncio.wait_for(task, 60)


async def connect(rig: Any, **how: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", rig.port, **how)


def wire(rig: Any, body: Any = None, *, method: str = "POST", path: str = "", **more: str) -> bytes:
    raw = b"" if body is None else json.dumps(body).encode()
    headers = {
        "host": "localhost",
        "authorization": f"Bearer {rig.key}",
        "content-length": str(len(raw)),
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    lines = [f"{method} {path or '/v1/chat/completions'} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + raw


async def talk(rig: Any, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own."""
    reader, writer = await connect(rig)
    try:
        writer.write(request)
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).decode()
        status = int(head.split()[1])
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head.splitlines()[1:] if line)
        }
        if "content-length" in headers:
            return status, headers, await reader.readexactly(int(headers["content-length"]))
        body = b""
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        return status, headers, body
    finally:
        await close(writer)


async def close(writer: asyncio.StreamWriter) -> None:
    """Drop a connection and wait until it is gone."""
    writer.transport.abort()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
