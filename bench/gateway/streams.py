"""How many streams at once go through a gateway without a stall.

    python bench/gateway/streams.py [--only cloudlm,nginx] [--rungs 64,128,192,256,…] [--runs 2]

Each stream has 64 deltas, one every 20 ms; they begin evenly spread over the length of one. A rung
of the ladder is *passed* if every stream brought all its deltas and ``[DONE]``, no pause between
two deltas was longer than 200 ms (ten times what it should be), and the 99th percentile of the time
to the first delta is at most one second. If the mock itself or the client was more than 60 ms late,
the rung says nothing about the gateway: it is tried once more and then reported as
``inconclusive``. The ladder is climbed until a rung is not passed, each rung ``--runs`` streams
long on every connection.

Our gateway has all its duties on; peers are those that are installed (see ``gateways``). A gateway
is pinned to one CPU, mock and load to another. Prints one JSON line per rung, and ``ladder`` with
the largest that was passed. Loopback only; ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gateways import FAST, Contender, free_port, ours, peers
from hard_mock import stats
from load import percentile, request
from run import _CPUS, cpu_s, get, resident_mb, run_loop, running, wait_for

_HERE = Path(__file__).parent
DELTAS, DELTA_S = 64, 0.02
LONGEST_GAP_S = 10 * DELTA_S
LONGEST_FIRST_S = 1.0
LATE_MS = 60.0
_MARK, _DONE, _END = b"zqx", b"data: [DONE]", b"0\r\n\r\n"
RUNGS = "64,128,192,256,320,384,448,512,640,768,896,1024"


class Stream(asyncio.Protocol):
    """One connection that reads streams and notes when their deltas come."""

    def __init__(self) -> None:
        self.over: asyncio.Future[bool] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def ask(self, wire: bytes) -> asyncio.Future[bool]:
        self.deltas, self.gap_s, self.tail = 0, 0.0, b""
        self.began = self.last = time.perf_counter()
        self.first_s = 0.0
        self.over = asyncio.get_running_loop().create_future()
        self.transport.write(wire)
        return self.over

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        text = self.tail[-2:] + data  # a mark may lie on the edge of two pieces
        found = text.count(_MARK)
        if found:
            if self.deltas:
                self.gap_s = max(self.gap_s, now - self.last)
            else:
                self.first_s = now - self.began
            self.deltas += found
            self.last = now
        self.tail = (self.tail + data)[-600:]
        if self.tail.endswith(_END):
            self.end(self.deltas == DELTAS and _DONE in self.tail)

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(False)

    def end(self, good: bool) -> None:
        if self.over is not None and not self.over.done():
            self.over.set_result(good)


class Rung:
    """So many connections, each with so many streams one after the other."""

    def __init__(self, port: int, wire: bytes, count: int, runs: int) -> None:
        self.port, self.wire, self.count, self.runs = port, wire, count, runs
        self.good = self.bad = 0
        self.gaps_s: list[float] = []
        self.firsts_s: list[float] = []
        self.late_ms = 0.0

    async def run(self) -> dict[str, Any]:
        watch = asyncio.create_task(self.watch())
        length_s = DELTAS * DELTA_S
        clients = [self.client(number * length_s / self.count) for number in range(self.count)]
        limit_s = (self.runs + 1) * length_s * 3 + 10
        done, late = await asyncio.wait([asyncio.create_task(c) for c in clients], timeout=limit_s)
        for task in late:
            task.cancel()
        watch.cancel()
        self.bad += len(late) + sum(task.exception() is not None for task in done)
        firsts_ms = [first * 1000 for first in self.firsts_s]
        return {
            "streams": self.count,
            "whole": self.good,
            "broken": self.bad,
            "stalled": sum(gap > LONGEST_GAP_S for gap in self.gaps_s),
            "gap_ms_max": round(max(self.gaps_s, default=0.0) * 1000, 1),
            "first_ms_p50": percentile(firsts_ms, 50),
            "first_ms_p99": percentile(firsts_ms, 99),
            "client_late_ms": round(self.late_ms, 1),
        }

    async def client(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        loop = asyncio.get_running_loop()
        stream = None
        for _ in range(self.runs):
            if stream is None or stream.transport.is_closing():
                _, stream = await loop.create_connection(Stream, "127.0.0.1", self.port)
            whole = await stream.ask(self.wire)
            self.good += whole
            self.bad += not whole
            self.gaps_s.append(stream.gap_s)
            self.firsts_s.append(stream.first_s)
        if stream is not None:
            stream.transport.close()

    async def watch(self) -> None:
        """How late this process is itself."""
        while True:
            asleep = time.perf_counter()
            await asyncio.sleep(0.01)
            self.late_ms = max(self.late_ms, (time.perf_counter() - asleep - 0.01) * 1000)


def say(gateway: str, scenario: str, result: dict[str, Any]) -> None:
    fields = {"bench": "gateway", "gateway": gateway, "scenario": scenario}
    print(json.dumps({**fields, **result}), flush=True)


def climb(contender: Contender, pid: int, args: argparse.Namespace, mock: list[str]) -> None:
    """Every rung with a mock of its own, so that lateness is that rung's."""
    wire = request(FAST, contender.key, stream=True)
    passed, verdict = 0, ""
    for count in args.rungs:
        for _ in range(2):
            result = rung(contender, pid, wire, count, args, mock)
            verdict = result["verdict"]
            say(contender.name, "rung", result)
            if verdict != "inconclusive":
                break
        if verdict != "passed":
            break
        passed = count
    say(contender.name, "ladder", {"streams": passed, "next": verdict})


def rung(
    contender: Contender,
    pid: int,
    wire: bytes,
    count: int,
    args: argparse.Namespace,
    mock: list[str],
) -> dict[str, Any]:
    port = int(mock[-1])
    with running(mock, {}, _CPUS[-1]) as replica:
        wait_for(f"http://127.0.0.1:{port}/_stats", replica)
        time.sleep(1.2)  # a gateway that distrusts the last mock for its end trusts this one
        used_s, began = cpu_s(pid), time.perf_counter()
        result = run_loop(Rung(contender.port, wire, count, args.runs).run())
        used_s, wall_s = cpu_s(pid) - used_s, time.perf_counter() - began
        result["mock_late_ms"] = stats(get(f"http://127.0.0.1:{port}/_stats"))["late_ms"]
    result["gateway_cpu"] = round(used_s / wall_s, 2)
    result["gateway_cpu_us_per_delta"] = round(used_s * 1e6 / (count * args.runs * DELTAS), 1)
    result["gateway_resident_mb"] = resident_mb(pid)
    result["verdict"] = judge(result)
    return result


def judge(result: dict[str, Any]) -> str:
    """Whether a rung was passed, by the rule above."""
    good = not result["broken"] and not result["stalled"] and result["first_ms_p99"] is not None
    if good and result["first_ms_p99"] <= LONGEST_FIRST_S * 1000:
        return "passed"
    late_ms = max(result["mock_late_ms"], result["client_late_ms"])
    return "inconclusive" if late_ms > LATE_MS and not result["broken"] else "failed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="cloudlm", help="gateways, with commas; or all")
    parser.add_argument("--rungs", default=RUNGS)
    parser.add_argument("--runs", type=int, default=2, help="streams on each connection")
    args = parser.parse_args()
    args.rungs = [int(one) for one in args.rungs.split(",")]
    only = set(args.only.split(","))
    os.sched_setaffinity(0, {_CPUS[-1]})
    port = free_port()
    mock = [sys.executable, str(_HERE / "hard_mock.py"), "--kind", "streams", "--port", str(port)]
    with tempfile.TemporaryDirectory(prefix="cloudlm-bench-") as folder:
        contenders = [ours("cloudlm", Path(folder, "ours"), port, port)]
        contenders += peers(Path(folder, "peers"), port, port)
        for contender in contenders:
            if contender.name not in only and "all" not in only:
                continue
            with running(contender.command, contender.environment, _CPUS[0]) as process:
                ready = contender.ready if contender.ready != "/_stats" else ""
                if ready:
                    wait_for(f"http://127.0.0.1:{contender.port}{ready}", process)
                climb(contender, process.pid, args, mock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
