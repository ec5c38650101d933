"""More work than the replicas can do, and replicas that do none.

    python bench/gateway/overload.py [--seconds 20] [--slots 16] [--service-ms 100] [--times 2,10]

A mock of known capacity (slots / service time) stands behind our gateway with all its duties and a
queue of half as many requests as there are slots. Requests come in an open loop: at their own
moments, whether or not others were answered, each timed from the moment it was due. The gateway is
pinned to one CPU, mock and load to another. Prints one JSON line per scenario:

- ``unloaded``: at half the capacity; its p99 is what the others are compared with.
- ``overload_2``, ``overload_10``: at so many times the capacity. ``goodput``: answers before the
  end, as a share of capacity. ``refused_ms``: from a request's moment to its 503 or 429, which must
  say when to come back (``advised``). ``accepted_ms_p99_ratio``: against ``unloaded``.
  ``replica_most``: requests at the mock at once, never more than its slots.
- ``outage``: three replicas refuse everything. ``attempts_per_request`` is what the gateway makes
  of each request, in a minute's budget.

Loopback only; ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

from gateways import Contender, deployed, free_port
from hard_mock import stats
from load import _complete, percentile, request
from run import _CPUS, get, run_loop, running, wait_for

_HERE = Path(__file__).parent
_PATIENCE_S = 10.0


class Asker(asyncio.Protocol):
    """A connection that asks when it is told to."""

    def __init__(self, loop: OpenLoop) -> None:
        self.loop = loop
        self.buffer = b""
        self.due = 0.0
        self.busy = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def ask(self, wire: bytes, due: float) -> None:
        self.buffer, self.due, self.busy = b"", due, True
        self.transport.write(wire)

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
    """Requests at their own moments, by Poisson's rule, over as many connections as it takes."""

    def __init__(self, port: int, wire: bytes, rate: float, seconds: float, seed: int) -> None:
        self.port, self.wire, self.rate, self.seconds = port, wire, rate, seconds
        self.draw = random.Random(seed)
        self.idle: deque[Asker] = deque()
        self.connections = 0
        self.statuses: Counter[str] = Counter()
        self.advised = 0
        self.accepted_ms: list[float] = []
        self.refused_ms: list[float] = []
        self.asking: set[asyncio.Task[None]] = set()
        self.behind_ms = 0.0
        self.ends = 0.0
        self.in_time = 0

    def answered(self, asker: Asker) -> None:
        took_ms = (time.perf_counter() - asker.due) * 1000
        status = asker.buffer[9:12].decode("latin-1")
        self.statuses[status] += 1
        if status == "200":
            self.accepted_ms.append(took_ms)
            self.in_time += time.perf_counter() <= self.ends
        else:
            self.refused_ms.append(took_ms)
            self.advised += b"\nretry-after:" in asker.buffer[:2000].lower()
        if b"\nconnection: close" in asker.buffer[:2000].lower():
            asker.transport.close()
        else:
            self.idle.append(asker)

    async def ask(self, due: float) -> None:
        while self.idle:
            asker = self.idle.pop()
            if not asker.transport.is_closing():
                asker.ask(self.wire, due)
                return
        loop = asyncio.get_running_loop()
        try:
            _, asker = await loop.create_connection(lambda: Asker(self), "127.0.0.1", self.port)
        except OSError:
            self.statuses["unconnected"] += 1
            return
        self.connections += 1
        asker.ask(self.wire, due)

    async def run(self) -> dict[str, Any]:
        began = due = time.perf_counter()
        asked = 0
        self.ends = began + self.seconds
        while due < began + self.seconds:
            due += self.draw.expovariate(self.rate)
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            self.behind_ms = max(self.behind_ms, (time.perf_counter() - due) * 1000)
            asked += 1
            task = asyncio.create_task(self.ask(due))
            self.asking.add(task)
            task.add_done_callback(self.asking.discard)
        deadline = time.perf_counter() + _PATIENCE_S
        while sum(self.statuses.values()) < asked and time.perf_counter() < deadline:
            await asyncio.sleep(0.02)
        unanswered = asked - sum(self.statuses.values())
        return {
            "asked": asked,
            "rate_per_s": round(asked / self.seconds, 1),
            "statuses": dict(self.statuses),
            "unanswered": unanswered,
            "in_time": self.in_time,
            "accepted_ms_p50": percentile(self.accepted_ms, 50),
            "accepted_ms_p99": percentile(self.accepted_ms, 99),
            "refused_ms_p50": percentile(self.refused_ms, 50),
            "refused_ms_p99": percentile(self.refused_ms, 99),
            "advised": self.advised,
            "connections": self.connections,
            "load_behind_ms_max": round(self.behind_ms, 1),
        }


def say(scenario: str, result: dict[str, Any]) -> None:
    fields = {"bench": "gateway", "gateway": "cloudlm", "scenario": scenario}
    print(json.dumps({**fields, **result}), flush=True)


def mock_stats(port: int) -> Counter[str]:
    return stats(get(f"http://127.0.0.1:{port}/_stats"))


def measure(contender: Contender, args: argparse.Namespace, slots: int, refusing: int) -> bool:
    """All scenarios with one gateway; False if a replica got more than it can hold."""
    capacity = args.slots / (args.service_ms / 1000)
    unloaded_ms = 0.0
    good = True
    for number, times in enumerate([0.5, *args.times]):
        before = mock_stats(slots)
        wire = request("slots", contender.key)
        result = run_loop(
            OpenLoop(contender.port, wire, times * capacity, args.seconds, number).run()
        )
        result["capacity_per_s"] = capacity
        result["goodput"] = round(result["in_time"] / (capacity * args.seconds), 3)
        after = mock_stats(slots)
        result["replica_most"] = after["most"]
        result["replica_requests"] = after["requests"] - before["requests"]
        good = good and after["most"] <= args.slots
        if times < 1:
            unloaded_ms = result["accepted_ms_p99"]
            say("unloaded", result)
            continue
        result["accepted_ms_p99_ratio"] = round(result["accepted_ms_p99"] / unloaded_ms, 2)
        say(f"overload_{times:g}", result)
        time.sleep(1.0)
    before = mock_stats(refusing)["requests"]
    wire = request("refusing", contender.key)
    result = run_loop(OpenLoop(contender.port, wire, 100.0, args.seconds, 99).run())
    attempts = mock_stats(refusing)["requests"] - before
    result["attempts_per_request"] = round(attempts / result["asked"], 3)
    say("outage", result)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each scenario")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--service-ms", type=float, default=100.0)
    parser.add_argument("--times", default="2,10", help="loads as multiples of the capacity")
    args = parser.parse_args()
    args.times = [float(one) for one in args.times.split(",")]
    os.sched_setaffinity(0, {_CPUS[-1]})
    slots, refusing = free_port(), [free_port() for _ in range(3)]
    mock = [sys.executable, str(_HERE / "hard_mock.py")]
    one = [*mock, "--kind", "slots", "--port", str(slots), "--slots", str(args.slots)]
    two = [
        *mock,
        "--kind",
        "refuse",
        *(part for port in refusing for part in ("--port", str(port))),
    ]
    settings = {
        "CLOUDLM_LOG_LEVEL": "error",  # a refusal is a line of the log otherwise
        "CLOUDLM_GATEWAY_REPLICA_CAPACITY": str(args.slots),
        "CLOUDLM_GATEWAY_MAX_QUEUED_REQUESTS": str(args.slots // 2),
    }
    with (
        tempfile.TemporaryDirectory(prefix="cloudlm-bench-") as folder,
        running([*one, "--service-ms", str(args.service_ms)], {}, _CPUS[-1]) as limited,
        running(two, {}, _CPUS[-1]) as failing,
    ):
        wait_for(f"http://127.0.0.1:{slots}/_stats", limited)
        wait_for(f"http://127.0.0.1:{refusing[0]}/_stats", failing)
        models = {"slots": [slots], "refusing": refusing}
        contender = deployed("cloudlm", Path(folder, "home"), models, settings=settings)
        with running(contender.command, contender.environment, _CPUS[0]) as process:
            wait_for(f"http://127.0.0.1:{contender.port}{contender.ready}", process)
            return 0 if measure(contender, args, slots, refusing[0]) else 1


if __name__ == "__main__":
    sys.exit(main())
