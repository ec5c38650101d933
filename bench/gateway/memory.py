"""What the gateway's memory does over many requests, a fifth of which go wrong.

    python bench/gateway/memory.py [--requests 300000] [--warm 100000] [--clients 32]

Our gateway with all its duties before two mocks that fail in every way they can (see
``hard_mock --kind faults``). Clients ask for whole answers and short streams, each with a question,
a user and a request id of its own; some leave in the middle, some have a wrong key or an unknown
model. After ``--warm`` requests the resident memory is read every five thousand. By then all that
fills up to a bound has done so: beginnings of prompts (5.6 MB for each replica at most; prompts are
longer than a block, so each is remembered), pages of the database (half a megabyte for each of four
connections), remembered names and verdicts, and what the search for garbage has not come to yet.
Prints one JSON line per reading and at the end:

- ``memory``: ``slope_mb_per_100k``, the line of least squares through the readings after the
  warm-up, with ``low`` and ``high``, its 95 % interval by bootstrap over the readings; descriptors
  and threads at both ends; the goal is below 1 MB.

The gateway is pinned to one CPU, mock and load to another. Loopback only; ends by itself.
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
from collections import Counter
from pathlib import Path
from typing import Any

from gateways import Contender, deployed, free_port
from hard_mock import stats
from load import _complete
from run import _CPUS, family, get, resident_mb, run_loop, running, wait_for

_HERE = Path(__file__).parent
_EVERY = 5_000
_PATIENCE_S = 20.0
_MODEL = "faulty"


def wire(key: str, number: int, draw: random.Random) -> bytes:
    """One request on the wire; nearly all are good."""
    model = _MODEL if draw.random() > 0.01 else f"unknown{number}"
    key = key if draw.random() > 0.01 else f"clm_live_wrong{number}"
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": f"Question {number}: " + "why? " * 250}],
            "max_tokens": 64,
            "user": f"user{number}",
            "stream": draw.random() < 0.4,
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nAuthorization: Bearer {key}\r\n"
        f"X-Request-Id: request-{number}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Crowd:
    """Clients that ask without a pause until so many requests were sent."""

    def __init__(self, contender: Contender, pid: int, args: argparse.Namespace) -> None:
        self.contender, self.pid, self.args = contender, pid, args
        self.draw = random.Random(40)
        self.sent = 0
        self.ends: Counter[str] = Counter()
        self.readings: list[tuple[int, float]] = []

    async def run(self) -> None:
        reading = asyncio.create_task(self.read_memory())
        await asyncio.gather(*(self.client() for _ in range(self.args.clients)))
        reading.cancel()

    async def client(self) -> None:
        reader = writer = None
        while self.sent < self.args.requests:
            self.sent += 1
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.contender.port)
            assert reader is not None
            raw = wire(self.contender.key, self.sent, self.draw)
            leaves = self.draw.random() < 0.02
            writer.write(raw[: self.draw.randrange(len(raw))] if leaves else raw)
            end = "left" if leaves else await self.answer(reader)
            self.ends[end] += 1
            if not end.startswith("2"):
                writer.transport.abort()
                reader = writer = None
        if writer is not None:
            writer.close()

    async def answer(self, reader: asyncio.StreamReader) -> str:
        """The status of an answer; streams that break are told by what they end with."""
        buffer = b""
        leaves_after = self.draw.randrange(1, 4000) if self.draw.random() < 0.02 else 1 << 30
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while not _complete(buffer):
                    piece = await reader.read(65536)
                    if not piece:
                        return "closed"
                    buffer += piece
                    if len(buffer) > leaves_after:
                        return "left"
        except (TimeoutError, ConnectionError) as error:
            return type(error).__name__
        broken = b"text/event-stream" in buffer[:500] and b"[DONE]" not in buffer[-64:]
        return "stream error" if broken else buffer[9:12].decode("latin-1")

    async def read_memory(self) -> None:
        due = self.args.warm
        while True:
            await asyncio.sleep(0.05)
            if self.sent >= due:
                due += _EVERY
                found = resident_mb(self.pid)
                self.readings.append((self.sent, found))
                say("reading", {"requests": self.sent, "resident_mb": found})


def slope(readings: list[tuple[int, float]]) -> float:
    """MB per 100,000 requests, by least squares."""
    count = len(readings)
    mean_x = sum(x for x, _ in readings) / count
    mean_y = sum(y for _, y in readings) / count
    spread = sum((x - mean_x) ** 2 for x, _ in readings)
    if not spread:
        return 0.0
    return sum((x - mean_x) * (y - mean_y) for x, y in readings) / spread * 100_000


def interval(readings: list[tuple[int, float]], seed: int = 1) -> tuple[float, float]:
    """The middle 95 % of slopes through readings that were drawn again."""
    draw = random.Random(seed)
    slopes = sorted(slope(draw.choices(readings, k=len(readings))) for _ in range(1000))
    return slopes[25], slopes[974]


def say(scenario: str, result: dict[str, Any]) -> None:
    fields = {"bench": "gateway", "gateway": "cloudlm", "scenario": scenario}
    print(json.dumps({**fields, **result}), flush=True)


def open_now(pid: int) -> dict[str, int]:
    """Descriptors and threads of the gateway's processes."""
    pids = family(pid)
    return {
        "descriptors": sum(len(list(Path(f"/proc/{one}/fd").iterdir())) for one in pids),
        "threads": sum(len(list(Path(f"/proc/{one}/task").iterdir())) for one in pids),
    }


def measure(contender: Contender, pid: int, mocks: list[int], args: argparse.Namespace) -> None:
    first = Crowd(contender, pid, argparse.Namespace(**{**vars(args), "requests": 500, "warm": 0}))
    run_loop(first.run())
    time.sleep(2.0)
    before, began = open_now(pid), time.perf_counter()
    crowd = Crowd(contender, pid, args)
    run_loop(crowd.run())
    wall_s = time.perf_counter() - began
    time.sleep(3.0)
    faults = sum(stats(get(f"http://127.0.0.1:{port}/_stats"))["faults"] for port in mocks)
    low, high = interval(crowd.readings) if len(crowd.readings) > 3 else (None, None)
    result = {
        "requests": crowd.sent,
        "requests_per_s": round(crowd.sent / wall_s, 1),
        "ends": dict(crowd.ends),
        "faults_of_replicas": faults,
        "resident_mb_first": crowd.readings[0][1] if crowd.readings else None,
        "resident_mb_last": crowd.readings[-1][1] if crowd.readings else None,
        "slope_mb_per_100k": round(slope(crowd.readings), 3) if len(crowd.readings) > 1 else None,
        "low": None if low is None else round(low, 3),
        "high": None if high is None else round(high, 3),
        "before": before,
        "after": open_now(pid),
    }
    say("memory", result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=300_000)
    parser.add_argument("--warm", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=32)
    args = parser.parse_args()
    os.sched_setaffinity(0, {_CPUS[-1]})
    ports = [free_port(), free_port()]
    mock = [sys.executable, str(_HERE / "hard_mock.py"), "--kind", "faults", "--deltas", "4"]
    for port in ports:
        mock += ["--port", str(port)]
    with (
        tempfile.TemporaryDirectory(prefix="cloudlm-bench-") as folder,
        running([*mock, "--delta-ms", "1"], {}, _CPUS[-1]) as failing,
    ):
        wait_for(f"http://127.0.0.1:{ports[0]}/_stats", failing)
        contender = deployed(
            "cloudlm",
            Path(folder, "home"),
            {_MODEL: ports},
            settings={"CLOUDLM_LOG_LEVEL": "error"},  # faults are lines of the log otherwise
        )
        with running(contender.command, contender.environment, _CPUS[0]) as process:
            wait_for(f"http://127.0.0.1:{contender.port}{contender.ready}", process)
            measure(contender, process.pid, ports[:1], args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
