"""The client side of the benchmark: raw sockets, so that the client is not what is measured."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from typing import Any

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_DONE = b"data: [DONE]"
_LAST_CHUNK = b"0\r\n\r\n"
_QUESTION = "Tell me about the quick brown fox and the lazy dog, in three short sentences please."


def request(model: str, key: str, *, stream: bool = False) -> bytes:
    """One chat request on the wire."""
    fields: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": _QUESTION},
        ],
        "max_tokens": 64,
        "temperature": 0.7,
    }
    if stream:
        fields["stream"] = True
    body = json.dumps(fields).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def percentile(values: list[float], percent: float) -> float | None:
    """The value below which ``percent`` of ``values`` lie."""
    ordered = sorted(values)
    if not ordered:
        return None
    return round(ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))], 3)


def _complete(buffer: bytes) -> bool:
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return False
    length = _LENGTH.search(buffer, 0, end + 2)
    if length:
        return len(buffer) >= end + 4 + int(length[1])
    return buffer.endswith(_LAST_CHUNK)


def _once(connection: socket.socket, wire: bytes) -> float:
    """Milliseconds of one exchange. Raises OSError if the answer is not 200 with usage."""
    began = time.perf_counter()
    connection.sendall(wire)
    buffer = b""
    while not _complete(buffer):
        data = connection.recv(65536)
        if not data:
            raise OSError("the connection was closed")
        buffer += data
    if not buffer.startswith(b"HTTP/1.1 200") or b'"usage"' not in buffer:
        raise OSError(f"bad answer: {buffer[:200]!r}")
    return (time.perf_counter() - began) * 1000


def one_at_a_time(direct: int, gateway: int, wire: bytes, seconds: float) -> dict[str, Any]:
    """Pairs of one direct exchange and one through the gateway, in alternating order."""
    ports = (direct, gateway)
    connections = [socket.create_connection(("127.0.0.1", port), 10) for port in ports]
    for connection in connections:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(20):
            _once(connection, wire)
    took: tuple[list[float], list[float]] = ([], [])
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        order = (0, 1) if len(took[0]) % 2 else (1, 0)
        for which in order:
            took[which].append(_once(connections[which], wire))
    for connection in connections:
        connection.close()
    added = [through - plain for plain, through in zip(*took, strict=True)]
    return {
        "pairs": len(added),
        "direct_ms_p50": percentile(took[0], 50),
        "gateway_ms_p50": percentile(took[1], 50),
        "gateway_ms_p99": percentile(took[1], 99),
        "added_ms_p50": percentile(added, 50),
        "added_ms_p99": percentile(added, 99),
    }


class _Client(asyncio.Protocol):
    """A connection that asks again as soon as it has its answer."""

    def __init__(self, wire: bytes, deadline: float, tally: dict[str, Any]) -> None:
        self.wire, self.deadline, self.tally = wire, deadline, tally
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        if time.perf_counter() >= self.deadline:
            self.transport.close()
            return
        self.buffer = b""
        self.began = time.perf_counter()
        self.transport.write(self.wire)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not _complete(self.buffer):
            return
        good = self.buffer.startswith(b"HTTP/1.1 200")
        if b"text/event-stream" in self.buffer[:400]:
            good = good and _DONE in self.buffer[-64:]
            self.tally["deltas"] += self.buffer.count(b"zqx")
        if good:
            self.tally["latencies_ms"].append((time.perf_counter() - self.began) * 1000)
        else:
            self.tally["errors"] += 1
        self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self.tally["errors"] += 1
        if not self.finished.done():
            self.finished.set_result(None)


async def closed_loop(port: int, wire: bytes, clients: int, seconds: float) -> dict[str, Any]:
    """``clients`` connections, each asking without a pause for so many seconds."""
    loop = asyncio.get_running_loop()
    tally: dict[str, Any] = {"latencies_ms": [], "errors": 0, "deltas": 0}
    began = time.perf_counter()
    made = [
        await loop.create_connection(
            lambda: _Client(wire, began + seconds, tally), "127.0.0.1", port
        )
        for _ in range(clients)
    ]
    await asyncio.wait([client.finished for _, client in made], timeout=seconds + 30)
    wall_s = time.perf_counter() - began
    latencies = tally["latencies_ms"]
    return {
        "clients": clients,
        "requests": len(latencies),
        "errors": tally["errors"],
        "deltas": tally["deltas"],
        "wall_s": round(wall_s, 3),
        "requests_per_s": round(len(latencies) / wall_s, 1),
        "ms_p50": percentile(latencies, 50),
        "ms_p99": percentile(latencies, 99),
    }
