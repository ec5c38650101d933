"""More work than the replicas can do, and replicas that do none.

    python bench/gateway/overload.py [--seconds 20] [--slots 16] [--service-ms 100] [--times 2,10]
        [--before PATH/src]

A mock of known capacity (slots / service time) stands behind our gateway with all its duties and a
queue of half as many requests as there are slots. Requests come in an open loop: at their own
moments, whether or not others were answered. The gateway is pinned to one CPU, mock and load to
another. With ``--before`` another checkout's gateway takes turns with ours. Prints one JSON line
per scenario:

- ``unloaded``: at half the capacity; its p99 is what the others are compared with.
- ``overload_2``, ``overload_10``: at so many times the capacity. ``goodput``: answers from the
  second second to the last, as a share of what as many clients as keep it busy got out of the mock
  itself just before and just after (``capacity_per_s``). ``refused_ms``: from the moment that a
  request is written (or its connection asked for) to its 503 or 429, which must say when to come
  back (``advised``); ``refused_from_due_ms_p99`` counts the lateness of the load as well.
  ``accepted_ms``, from the moment a request was due; ``accepted_ms_p99_ratio``: against
  ``unloaded``. ``replica_most``: requests at the mock at once, waiting ones too, never more than
  its slots.
- In all: ``gateway_cpu`` and ``load_cpu``, shares of a CPU (the mock's is not in them), and
  ``stolen``, the share of all CPUs that other guests of the machine took: where these are high, the
  figures are not the gateway's.
- ``outage``: three replicas refuse everything. ``attempts_per_request`` is what the gateway makes
  of each request, in a minute's budget.

Loopback only; ends by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gateways import Contender, deployed, free_port
from hard_mock import stats
from load import closed_loop, request
from open_loop import OpenLoop
from run import _CPUS, cpu_s, get, run_loop, running, wait_for

_HERE = Path(__file__).parent


def mock_stats(port: int) -> Counter[str]:
    return stats(get(f"http://127.0.0.1:{port}/_stats"))


def all_cpus_s() -> tuple[float, float]:
    """What all CPUs did, and what of it was stolen."""
    ticks = [int(one) for one in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return float(sum(ticks)), float(ticks[7])


class Bench:
    """One gateway's turn. ``mocks`` are the limited one's port and that of a refusing one."""

    def __init__(
        self, contender: Contender, pid: int, args: argparse.Namespace, mocks: tuple[int, int]
    ) -> None:
        self.contender, self.pid, self.args = contender, pid, args
        self.slots, self.refusing = mocks
        self.unloaded_ms = 0.0

    def say(self, scenario: str, result: dict[str, Any]) -> None:
        fields = {"bench": "gateway", "gateway": self.contender.name, "scenario": scenario}
        print(json.dumps({**fields, **result}), flush=True)

    def open_loop(self, model: str, rate: float, seed: int) -> dict[str, Any]:
        """Requests at this rate, and what they cost whom."""
        wire = request(model, self.contender.key)
        loop = OpenLoop(self.contender.port, wire, rate, self.args.seconds, seed)
        began, used, mine = time.perf_counter(), cpu_s(self.pid), time.process_time()
        everything, stolen = all_cpus_s()
        result = run_loop(loop.run())
        wall_s = time.perf_counter() - began
        everything_now, stolen_now = all_cpus_s()
        result["gateway_cpu"] = round((cpu_s(self.pid) - used) / wall_s, 2)
        result["load_cpu"] = round((time.process_time() - mine) / wall_s, 2)
        share = (stolen_now - stolen) / max(everything_now - everything, 1.0)
        return {**result, "stolen": round(share, 3)}

    def capacity(self) -> float:
        """What the mock itself answers in a second, asked by twice as many as it has slots."""
        wire = request("slots", "nobody's")
        clients = 2 * self.args.slots
        return float(run_loop(closed_loop(self.slots, wire, clients, 2.0))["requests_per_s"])

    def overloaded(self, times: float, seed: int) -> bool:
        """So many times the capacity; False if the replica got more than it can hold."""
        rate = times * self.args.slots / (self.args.service_ms / 1000)
        first = self.capacity()
        mock_stats(self.slots)  # begins to count its most anew
        result = self.open_loop("slots", rate, seed)
        result["replica_most"] = mock_stats(self.slots)["most"]
        capacity = (first + self.capacity()) / 2
        result["capacity_per_s"] = round(capacity, 1)
        result["goodput"] = round(result["in_time_per_s"] / capacity, 3)
        if times < 1:
            self.unloaded_ms = result["accepted_ms_p99"]
        else:
            ratio = result["accepted_ms_p99"] / self.unloaded_ms
            result["accepted_ms_p99_ratio"] = round(ratio, 2)
        self.say("unloaded" if times < 1 else f"overload_{times:g}", result)
        return bool(result["replica_most"] <= self.args.slots)

    def outage(self) -> None:
        """Every replica refuses."""
        before = mock_stats(self.refusing)["requests"]
        result = self.open_loop("refusing", 100.0, 99)
        attempts = mock_stats(self.refusing)["requests"] - before
        result["attempts_per_request"] = round(attempts / result["asked"], 3)
        self.say("outage", result)


def measure(benches: Sequence[Bench], times: Sequence[float]) -> bool:
    """All scenarios, each with every gateway in turn."""
    good = True
    for number, load in enumerate([0.5, *times]):
        for bench in benches:
            good = bench.overloaded(load, number) and good
            time.sleep(1.0)
    for bench in benches:
        bench.outage()
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each scenario")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--service-ms", type=float, default=100.0)
    parser.add_argument("--times", default="2,10", help="loads as multiples of the capacity")
    parser.add_argument("--before", default="", help="src of another checkout, measured as well")
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
        contextlib.ExitStack() as started,
    ):
        wait_for(f"http://127.0.0.1:{slots}/_stats", limited)
        wait_for(f"http://127.0.0.1:{refusing[0]}/_stats", failing)
        models = {"slots": [slots], "refusing": refusing}
        sources = {"cloudlm": "", **({"before": args.before} if args.before else {})}
        benches = []
        for name, source in sources.items():
            home = Path(folder, name)
            contender = deployed(name, home, models, source=source, settings=settings)
            ours = running(contender.command, contender.environment, _CPUS[0])
            process = started.enter_context(ours)
            wait_for(f"http://127.0.0.1:{contender.port}{contender.ready}", process)
            benches.append(Bench(contender, process.pid, args, (slots, refusing[0])))
        return 0 if measure(benches, args.times) else 1


if __name__ == "__main__":
    sys.exit(main())
