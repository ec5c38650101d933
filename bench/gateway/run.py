"""What the gateway costs: added latency and requests per second, with all its duties on.

    python bench/gateway/run.py [--seconds 5] [--clients 64]

Starts the real gateway process (keys, admission, routing, ledger in SQLite in a temporary home)
before a mock replica that answers at once, and prints one JSON line per scenario:

- ``one_at_a_time``: pairs of a direct exchange and one through the gateway; the difference is what
  the gateway adds, in milliseconds.
- ``whole``: closed loop of whole answers; ``gateway_cpu_us_per_request`` hardly depends on what
  else the machine does, so compare by it.
- ``streams``: closed loop of streams of 64 deltas, one every 20 ms.
- ``accounts``: ledger rows and tokens against what the mock counted; exits 1 if they differ.

Loopback only; ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from load import closed_loop, one_at_a_time, request

from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.tenant import Role
from cloudlm.security.keys import mint
from cloudlm.state.home import Home, load_settings
from cloudlm.state.open import open_state

try:
    from uvloop import run as run_loop
except ImportError:
    from asyncio import run as run_loop

MODEL = "bench"
_HERE = Path(__file__).parent
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return bytes(answer.read())


def wait_for(url: str, process: subprocess.Popen[bytes], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(OSError):
            get(url)
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{url} did not answer in time")
        time.sleep(0.05)


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


async def prepare(home: Home, replica_port: int) -> str:
    """Deploy the mock and make a key; the key."""
    settings, _ = load_settings({"home": str(home.path)}, {})
    state = await open_state(home.state_url(settings))
    now = time.time()
    await state.put_deployment(DeploymentSpec(MODEL, "models:/bench/1"), now=now)
    url = f"http://127.0.0.1:{replica_port}"
    await state.put_endpoints(MODEL, [Endpoint(MODEL, "bench-r1-0", url, 1)])
    minted = mint("bench", Role.USER, home.pepper(), now)
    await state.put_key(minted.record)
    await state.close()
    return minted.text


async def ledger_totals(home: Home) -> tuple[int, int]:
    settings, _ = load_settings({"home": str(home.path)}, {})
    state = await open_state(home.state_url(settings))
    rows = await state.list_ledger(limit=10_000_000)
    await state.close()
    return len(rows), sum(row.completion_tokens for row in rows)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def say(scenario: str, result: dict[str, Any]) -> None:
    print(json.dumps({"bench": "gateway", "scenario": scenario, **result}), flush=True)


def measure_loop(
    scenario: str, process: subprocess.Popen[bytes], port: int, wire: bytes, clients: int, s: float
) -> None:
    before = cpu_s(process.pid)
    result = run_loop(closed_loop(port, wire, clients, s))
    used_us = (cpu_s(process.pid) - before) * 1e6
    result["gateway_cpu_us_per_request"] = round(used_us / max(result["requests"], 1))
    if result["deltas"]:
        result["gateway_cpu_us_per_delta"] = round(used_us / result["deltas"], 1)
    result["gateway_resident_mb"] = resident_mb(process.pid)
    say(scenario, result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each scenario")
    parser.add_argument("--clients", type=int, default=64)
    arguments = parser.parse_args()
    seconds = min(max(arguments.seconds, 0.5), 60.0)
    mock_port, port = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="cloudlm-bench-") as folder:
        home = Home(folder).ensure()
        key = asyncio.run(prepare(home, mock_port))
        environment = {
            "CLOUDLM_HOME": folder,
            "CLOUDLM_GATEWAY_PORT": str(port),
            "CLOUDLM_LOG_LEVEL": "warning",
        }
        mock = [sys.executable, str(_HERE / "mock.py"), "--port", str(mock_port)]
        gateway = [sys.executable, "-m", "cloudlm.gateway"]
        with running(mock, {}) as replica:
            wait_for(f"http://127.0.0.1:{mock_port}/_stats", replica)
            with running(gateway, environment) as process:
                wait_for(f"http://127.0.0.1:{port}/readyz", process)
                wire = request(MODEL, key)
                say("one_at_a_time", one_at_a_time(mock_port, port, wire, seconds))
                direct = json.loads(get(f"http://127.0.0.1:{mock_port}/_stats"))
                measure_loop("whole", process, port, wire, arguments.clients, seconds)
                wire = request(MODEL, key, stream=True)
                measure_loop("streams", process, port, wire, arguments.clients, seconds)
            counted = json.loads(get(f"http://127.0.0.1:{mock_port}/_stats"))
        rows, tokens = asyncio.run(ledger_totals(home))
    # Half of the first scenario's exchanges went past the gateway.
    past = direct["requests"] // 2
    wanted = (counted["requests"] - past, counted["tokens"] - past * 64)
    say("accounts", {"rows": rows, "tokens": tokens, "agree": (rows, tokens) == wanted})
    return 0 if (rows, tokens) == wanted else 1


if __name__ == "__main__":
    sys.exit(main())
