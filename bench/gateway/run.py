"""What gateways cost: added latency and requests per second, ours with all its duties on.

    python bench/gateway/run.py [--seconds 3] [--only cloudlm,nginx] [--before PATH/src]

Starts each gateway in turn (ours: keys with limits and prices, admission, routing, ledger in SQLite
in a temporary home; compiled if ``make native`` was run, and once more from its sources)
before a mock replica. The gateway is pinned to one CPU, mock and load to another. Prints one JSON
line per scenario:

- ``one_at_a_time``: pairs of a direct exchange and one through the gateway; the difference is what
  the gateway adds, in milliseconds.
- ``whole_64``, ``whole_256``: closed loops of whole answers from a mock that answers at once;
  ``gateway_cpu_us_per_request`` hardly depends on what else the machine does, and holds what the
  gateway put off until it was asked no more (``settled_after_s``).
- ``whole_256_20ms``: the same, from a mock that takes 20 ms.
- ``streams_64``: closed loop of streams of 64 deltas, one every 20 ms.
- ``accounts`` (ours): ledger rows and tokens against what the mock counted; exits 1 if they differ.

Loopback only; ends by itself. Where there is but one CPU nothing is pinned.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gateways import FAST, SLOW, Contender, free_port, ours, peers, uncompiled
from load import closed_loop, one_at_a_time, request

from cloudlm.state.home import Home, load_settings
from cloudlm.state.open import open_state

try:
    from uvloop import run as run_loop
except ImportError:
    from asyncio import run as run_loop

_HERE = Path(__file__).parent
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_CPUS = sorted(os.sched_getaffinity(0))
_AT_REST = 0.06  # share of a CPU: what looking around now and then takes


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return bytes(answer.read())


def wait_for(url: str, process: subprocess.Popen[bytes], within_s: float = 90.0) -> None:
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(OSError):
            get(url)
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{url} did not answer in time")
        time.sleep(0.05)


@contextlib.contextmanager
def running(
    command: list[str], environment: dict[str, str], cpu: int
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,  # ours holds results only
        preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


async def ledger_totals(home: Home) -> tuple[int, int]:
    settings, _ = load_settings({"home": str(home.path)}, {})
    state = await open_state(home.state_url(settings))
    rows = await state.list_ledger(limit=10_000_000)
    await state.close()
    return len(rows), sum(row.completion_tokens for row in rows)


def family(pid: int) -> list[int]:
    """A process and its children."""
    kids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid] + [one for kid in kids for one in family(int(kid))]


def cpu_s(pid: int) -> float:
    total = 0
    for one in family(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS_PER_S


def settle(pid: int, within_s: float = 20.0) -> float:
    """Wait until a gateway has done what it put off, as rows that it had not written; how long
    that took, in seconds."""
    began = looked = time.perf_counter()
    used = cpu_s(pid)
    while looked - began < within_s:
        time.sleep(0.25)
        now, now_used = time.perf_counter(), cpu_s(pid)
        if (now_used - used) / (now - looked) < _AT_REST:
            break
        looked, used = now, now_used
    return round(looked - began, 2)


def resident_mb(pid: int) -> float:
    pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in family(pid))
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


class Bench:
    """One gateway's turn."""

    def __init__(
        self,
        contender: Contender,
        fast: subprocess.Popen[bytes],
        slow: subprocess.Popen[bytes],
        seconds: float,
    ) -> None:
        self.contender, self.processes = contender, {FAST: fast, SLOW: slow}
        self.seconds = seconds

    def say(self, scenario: str, result: dict[str, Any]) -> None:
        fields = {"bench": "gateway", "gateway": self.contender.name, "scenario": scenario}
        print(json.dumps({**fields, **result}), flush=True)

    def latency(self, mock_port: int) -> None:
        wire = request(FAST, self.contender.key)
        result = one_at_a_time(mock_port, self.contender.port, wire, self.seconds)
        self.say("one_at_a_time", result)

    def loop(self, scenario: str, clients: int, *, model: str = FAST, stream: bool = False) -> None:
        port = self.contender.slow_port if model == SLOW else self.contender.port
        wire = request(model, self.contender.key, stream=stream)
        process = self.processes[model]
        before, began = cpu_s(process.pid), time.perf_counter()
        result = run_loop(closed_loop(port, wire, clients, self.seconds))
        result["gateway_cpu"] = round(
            (cpu_s(process.pid) - before) / (time.perf_counter() - began), 2
        )
        result["settled_after_s"] = settle(process.pid)
        used_s = cpu_s(process.pid) - before
        result["gateway_cpu_us_per_request"] = round(used_s * 1e6 / max(result["requests"], 1))
        if result["deltas"]:
            result["gateway_cpu_us_per_delta"] = round(used_s * 1e6 / result["deltas"], 1)
        result["gateway_resident_mb"] = resident_mb(process.pid)
        self.say(scenario, result)


def measure(contender: Contender, mock_port: int, seconds: float) -> bool:
    """One gateway through all scenarios; False if its accounts are wrong."""
    before = counts(mock_port)
    with contextlib.ExitStack() as started:
        process = started.enter_context(running(contender.command, contender.environment, _CPUS[0]))
        wait_for(f"http://127.0.0.1:{contender.port}{contender.ready}", process)
        other = process
        if contender.slow_command:
            other = started.enter_context(running(contender.slow_command, {}, _CPUS[0]))
            wait_for(f"http://127.0.0.1:{contender.slow_port}{contender.ready}", other)
        bench = Bench(contender, process, other, seconds)
        run_loop(closed_loop(contender.port, request(FAST, contender.key), 16, 1.0))  # warms up
        warm = counts(mock_port)
        bench.latency(mock_port)
        paired = counts(mock_port)
        bench.loop("whole_64", 64)
        bench.loop("whole_256", 256)
        bench.loop("whole_256_20ms", 256, model=SLOW)
        bench.loop("streams_64", 64, stream=True)
        after = counts(mock_port)
    if contender.home is None:
        return True
    rows, tokens = asyncio.run(ledger_totals(contender.home))
    # Half of the first scenario's exchanges went past the gateway.
    past = (paired["requests"] - warm["requests"]) // 2
    requests = after["requests"] - before["requests"] - past
    wanted = (requests, after["tokens"] - before["tokens"] - past * 64)
    bench.say("accounts", {"rows": rows, "tokens": tokens, "agree": (rows, tokens) == wanted})
    return (rows, tokens) == wanted


def counts(mock_port: int) -> dict[str, int]:
    found = json.loads(get(f"http://127.0.0.1:{mock_port}/_stats"))
    return {"requests": found.get("requests", 0), "tokens": found.get("tokens", 0)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each scenario")
    parser.add_argument("--only", default="", help="gateways to measure, by name, with commas")
    parser.add_argument("--before", default="", help="src of another checkout, measured as well")
    arguments = parser.parse_args()
    seconds = min(max(arguments.seconds, 0.5), 60.0)
    only = set(filter(None, arguments.only.split(",")))
    fast, slow = free_port(), free_port()
    os.sched_setaffinity(0, {_CPUS[-1]})
    mock = [sys.executable, str(_HERE / "mock.py"), "--port", str(fast), "--slow-port", str(slow)]
    good = True
    with (
        tempfile.TemporaryDirectory(prefix="cloudlm-bench-") as folder,
        contextlib.ExitStack() as s,
    ):
        replica = s.enter_context(running(mock, {}, _CPUS[-1]))
        wait_for(f"http://127.0.0.1:{fast}/_stats", replica)
        contenders = [ours("cloudlm", Path(folder, "ours"), fast, slow)]
        contenders += uncompiled(Path(folder, "sources"), fast, slow)
        if arguments.before:
            contenders.append(
                ours("before", Path(folder, "before"), fast, slow, source=arguments.before)
            )
        contenders += peers(Path(folder, "peers"), fast, slow)
        for contender in contenders:
            if not only or contender.name in only:
                good = measure(contender, fast, seconds) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
