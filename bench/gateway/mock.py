"""A replica that answers at once: raw protocol, no framework, so that it costs next to nothing.

    python bench/gateway/mock.py --port 19000 [--slow-port 19001] [--deltas 64] [--delta-ms 20]

Answers chat completions, whole or streamed, in the form that cloudlm's workers use (usage in every
chunk), and counts what it answered under GET /_stats. What comes in at the slow port is answered
after 20 ms. Loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections import Counter
from typing import ClassVar

try:
    from uvloop import run
except ImportError:
    from asyncio import run

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_PROMPT_TOKENS = 42
TOKENS = 64
SLOW_S = 0.02


def usage(tokens: int) -> dict[str, int]:
    total = _PROMPT_TOKENS + tokens
    return {
        "prompt_tokens": _PROMPT_TOKENS,
        "completion_tokens": tokens,
        "total_tokens": total,
    }


def http(body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def chunk(delta: dict[str, str], finish: str | None, tokens: int, *, last: bool = False) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    body = {
        "id": "chatcmpl-bench",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "bench",
        "choices": [] if last else [choice],
        "usage": usage(tokens),
    }
    return framed(b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n")


def framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_ANSWER = http(
    json.dumps(
        {
            "id": "chatcmpl-bench",
            "object": "chat.completion",
            "created": 1700000000,
            "model": "bench",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "The quick brown fox. " * 12},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": usage(TOKENS),
        }
    ).encode()
)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


class Replica(asyncio.Protocol):
    """One connection."""

    deltas = 64
    delta_s = 0.02
    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.buffer = b""
        self.closed = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(self.buffer, 0, end + 2)
        whole = end + 4 + (int(length[1]) if length else 0)
        if len(self.buffer) < whole:
            return
        request, self.buffer = self.buffer[:whole], self.buffer[whole:]
        self.answer(request)

    def answer(self, request: bytes) -> None:
        if b"/_stats " in request[:40]:
            self.transport.write(http(json.dumps(self.counts).encode()))
        elif b'"stream":true' in request or b'"stream": true' in request:
            self.counts["requests"] += 1
            self.transport.write(_STREAM_HEAD + chunk({"role": "assistant"}, None, 0))
            self.tick(0)
        else:
            self.counts["requests"] += 1
            self.counts["tokens"] += TOKENS
            if self.delay_s:
                asyncio.get_running_loop().call_later(self.delay_s, self.transport.write, _ANSWER)
            else:
                self.transport.write(_ANSWER)

    def tick(self, number: int) -> None:
        if self.closed:
            self.counts["dropped"] += 1
        elif number < self.deltas:
            self.counts["tokens"] += 1
            self.transport.write(chunk({"content": f"zqx{number} "}, None, number + 1))
            asyncio.get_running_loop().call_later(self.delta_s, self.tick, number + 1)
        else:
            end = chunk({}, "stop", number) + chunk({}, None, number, last=True)
            self.transport.write(end + framed(b"data: [DONE]\n\n") + b"0\r\n\r\n")


async def serve(port: int, slow_port: int | None) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Replica(0.0), "127.0.0.1", port, backlog=2048)
    if slow_port is not None:
        await loop.create_server(lambda: Replica(SLOW_S), "127.0.0.1", slow_port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slow-port", type=int)
    parser.add_argument("--deltas", type=int, default=64)
    parser.add_argument("--delta-ms", type=float, default=20.0)
    arguments = parser.parse_args()
    Replica.deltas, Replica.delta_s = arguments.deltas, arguments.delta_ms / 1000
    run(serve(arguments.port, arguments.slow_port))
