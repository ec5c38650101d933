"""Replicas that are limited, that fail, or whose streams keep their time exactly.

    python bench/gateway/hard_mock.py --kind slots --port 19000 [--slots 16] [--service-ms 100]
    python bench/gateway/hard_mock.py --kind faults|refuse|streams --port 19000 [--port 19001]

- ``slots``: so many requests at once, each of so many milliseconds; more wait for a slot, so the
  capacity is known: slots / service. Counts the most that were there at once, waiting ones too,
  since that was last read.
- ``faults``: two in ten requests meet a fault: refused, cut, garbled, broken off or an error.
- ``refuse``: every request is answered 503.
- ``streams``: every delta at its own moment after the first, whatever happened before; counts how
  late the mock itself was at worst (``late_ms``).

Counts are under GET /_stats, as those of ``mock``. Loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter, deque
from typing import ClassVar

from mock import _ANSWER, _STREAM_HEAD, TOKENS, Replica, chunk, framed, http, run  # noqa: UP026

_ERROR = b'{"error":{"message":"made to fail","type":"server_error","code":null}}'


def refusal(status: int) -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(_ERROR)}\r\n\r\n".encode() + _ERROR


def is_stream(request: bytes) -> bool:
    return b'"stream":true' in request or b'"stream": true' in request


class Slots(Replica):
    """So many at once, as an engine; those that come to a full one wait their turn."""

    slots = 16
    service_s = 0.1
    inside: ClassVar[int] = 0
    waiting: ClassVar[deque[Slots]] = deque()

    def __init__(self) -> None:
        super().__init__(0.0)

    def answer(self, request: bytes) -> None:
        if b"/_stats " in request[:40]:
            super().answer(request)
            self.counts["most"] = 0
            return
        self.counts["requests"] += 1
        Slots.waiting.append(self)
        self.counts["most"] = max(self.counts["most"], Slots.inside + len(Slots.waiting))
        self.next()

    def next(self) -> None:
        while Slots.waiting and Slots.inside < self.slots:
            one = Slots.waiting.popleft()
            Slots.inside += 1
            asyncio.get_running_loop().call_later(self.service_s, one.end)

    def end(self) -> None:
        Slots.inside -= 1
        if self.closed:
            self.counts["dropped"] += 1
        else:
            self.counts["tokens"] += TOKENS
            self.transport.write(_ANSWER)
        self.next()


class Faults(Replica):
    """Two in ten requests meet a fault, each kind in its turn."""

    number: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__(0.0)

    def answer(self, request: bytes) -> None:
        if b"/_stats " in request[:40]:
            super().answer(request)
            return
        Faults.number += 1
        if Faults.number % 5:
            super().answer(request)
            return
        self.counts["requests"] += 1
        self.counts["faults"] += 1
        self.fail(Faults.number // 5 % 6, stream=is_stream(request))

    def fail(self, kind: int, *, stream: bool) -> None:
        if kind == 0:
            self.transport.abort()
        elif kind in (1, 2):
            self.transport.write(refusal((500, 429)[kind - 1]))
        elif not stream:
            self.transport.write(http(b'{"choices": 1}') if kind == 3 else _ANSWER[:200])
            if kind != 3:
                self.transport.close()
        else:
            ends = [framed(b"data: {not\n\n"), chunk({"content": "zqx "}, None, 1)[:40], b""]
            begun = chunk({"role": "assistant"}, None, 0) + chunk({"content": "zqx "}, None, 1)
            self.transport.write(_STREAM_HEAD + begun + ends[kind - 3])
            self.transport.close()


class Refuse(Replica):
    """Nothing is answered."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def answer(self, request: bytes) -> None:
        if b"/_stats " in request[:40]:
            super().answer(request)
            return
        self.counts["requests"] += 1
        self.transport.write(refusal(503))


class Streams(Replica):
    """Every delta at its own moment."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.begun = 0.0

    def tick(self, number: int) -> None:
        now = asyncio.get_running_loop().time()
        if number == 0:
            self.begun = now
        late_ms = (now - self.begun - number * self.delta_s) * 1000
        self.counts["late_ms"] = max(self.counts["late_ms"], round(late_ms))
        if self.closed or number >= self.deltas:
            super().tick(number)
            return
        self.counts["tokens"] += 1
        self.transport.write(chunk({"content": f"zqx{number} "}, None, number + 1))
        due = self.begun + (number + 1) * self.delta_s
        asyncio.get_running_loop().call_at(due, self.tick, number + 1)


KINDS = {"slots": Slots, "faults": Faults, "refuse": Refuse, "streams": Streams}


async def serve(kind: str, ports: list[int]) -> None:
    loop = asyncio.get_running_loop()
    made = KINDS[kind]
    servers = [
        await loop.create_server(lambda: made(), "127.0.0.1", port, backlog=4096) for port in ports
    ]
    await asyncio.gather(*(server.serve_forever() for server in servers))


def stats(raw: bytes) -> Counter[str]:
    """What /_stats said."""
    return Counter(json.loads(raw))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", choices=sorted(KINDS), required=True)
    parser.add_argument("--port", type=int, action="append", required=True)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--service-ms", type=float, default=100.0)
    parser.add_argument("--deltas", type=int, default=64)
    parser.add_argument("--delta-ms", type=float, default=20.0)
    arguments = parser.parse_args()
    Slots.slots, Slots.service_s = arguments.slots, arguments.service_ms / 1000
    Replica.deltas, Replica.delta_s = arguments.deltas, arguments.delta_ms / 1000
    run(serve(arguments.kind, arguments.port))
