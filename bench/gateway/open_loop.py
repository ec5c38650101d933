"""Requests that come at their own moments, whether or not others were answered."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from typing import Any

from load import _complete, percentile

_PATIENCE_S = 10.0
_RAMP_S = 1.0


class Asker(asyncio.Protocol):
    """A connection that asks when it is told to; it may be told before it is there."""

    def __init__(self, loop: OpenLoop) -> None:
        self.loop = loop
        self.transport: asyncio.Transport | None = None
        self.buffer = b""
        self.due = self.asked_at = 0.0
        self.busy = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.write(self.loop.wire)

    def ask(self, due: float) -> None:
        self.buffer, self.due, self.busy = b"", due, True
        self.asked_at = time.perf_counter()
        if self.transport is not None:
            self.transport.write(self.loop.wire)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.busy and _complete(self.buffer):
            self.busy = False
            self.loop.answered(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.busy:
            self.busy = False
            self.loop.statuses["lost"] += 1


class OpenLoop:
    """Requests at their own moments, by Poisson's rule, over as many connections as it takes. One
    timer and no task for each, so that the load is not what is measured."""

    def __init__(self, port: int, wire: bytes, rate: float, seconds: float, seed: int) -> None:
        self.port, self.wire, self.rate, self.seconds = port, wire, rate, seconds
        self.draw = random.Random(seed)
        self.idle: deque[Asker] = deque()
        self.connecting: set[asyncio.Task[None]] = set()
        self.connections = self.asked = self.advised = self.in_time = 0
        self.statuses: Counter[str] = Counter()
        self.accepted_ms: list[float] = []
        self.refused_ms: list[float] = []
        self.from_due_ms: list[float] = []
        self.behind_ms: list[float] = []
        self.due = self.counts_from = self.ends = 0.0

    def answered(self, asker: Asker) -> None:
        now = time.perf_counter()
        status = asker.buffer[9:12].decode("latin-1")
        self.statuses[status] += 1
        if status == "200":
            self.accepted_ms.append((now - asker.due) * 1000)
            self.in_time += self.counts_from <= now <= self.ends
        else:
            self.refused_ms.append((now - asker.asked_at) * 1000)
            self.from_due_ms.append((now - asker.due) * 1000)
            self.advised += b"\nretry-after:" in asker.buffer[:2000].lower()
        assert asker.transport is not None
        if b"\nconnection: close" in asker.buffer[:2000].lower():
            asker.transport.close()
        else:
            self.idle.append(asker)

    def ask(self, due: float) -> None:
        self.asked += 1
        while self.idle:
            asker = self.idle.pop()
            if asker.transport is not None and not asker.transport.is_closing():
                asker.ask(due)
                return
        asker = Asker(self)
        asker.ask(due)
        task = asyncio.get_running_loop().create_task(self.connect(asker))
        self.connecting.add(task)
        task.add_done_callback(self.connecting.discard)

    async def connect(self, asker: Asker) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: asker, "127.0.0.1", self.port)
            self.connections += 1
        except OSError:
            self.statuses["unconnected"] += 1

    def tick(self) -> None:
        """Ask all that are due by now."""
        now = time.perf_counter()
        while self.due <= now and self.due < self.ends:
            self.behind_ms.append((now - self.due) * 1000)
            self.ask(self.due)
            self.due += self.draw.expovariate(self.rate)
        if self.due < self.ends:
            asyncio.get_running_loop().call_later(max(self.due - now, 0.0), self.tick)

    async def run(self) -> dict[str, Any]:
        began = time.perf_counter()
        self.ends = began + self.seconds
        self.counts_from = began + min(_RAMP_S, self.seconds / 4)
        self.due = began + self.draw.expovariate(self.rate)
        self.tick()
        await asyncio.sleep(self.seconds)
        deadline = self.ends + _PATIENCE_S
        while sum(self.statuses.values()) < self.asked and time.perf_counter() < deadline:
            await asyncio.sleep(0.02)
        return self.result()

    def result(self) -> dict[str, Any]:
        return {
            "asked": self.asked,
            "rate_per_s": round(self.asked / self.seconds, 1),
            "statuses": dict(self.statuses),
            "unanswered": self.asked - sum(self.statuses.values()),
            "in_time_per_s": round(self.in_time / (self.ends - self.counts_from), 1),
            "accepted_ms_p50": percentile(self.accepted_ms, 50),
            "accepted_ms_p99": percentile(self.accepted_ms, 99),
            "refused_ms_p50": percentile(self.refused_ms, 50),
            "refused_ms_p99": percentile(self.refused_ms, 99),
            "refused_from_due_ms_p99": percentile(self.from_due_ms, 99),
            "advised": self.advised,
            "connections": self.connections,
            "load_behind_ms_p99": percentile(self.behind_ms, 99),
        }
