"""``make bench-fleet``: policies against each other in the simulator, and real processes.

    python bench/fleet/run.py                      print
    python bench/fleet/run.py --record             also write it into bench/RESULTS.md
    python bench/fleet/run.py --only reality       one part alone
    python bench/fleet/run.py --only processes --json

``routing``, ``autoscaling`` and ``spot`` are simulated throughout, with replicas' figures that were
measured (``cloudlm/sim/figures.yaml``); each is a module whose ``section`` gives its text.
``reality`` and ``processes`` run real processes, which is why nothing else should use the machine
meanwhile; their ``measure`` gives data, for ``--json`` too, and ``text`` makes the section of it.
Exits 1 if a part could not be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import autoscaling
import processes
import reality
import routing
import spot
from results import record
from stack import BenchFailed

TRACES = Path(__file__).parent / "traces"
SIMULATED: Mapping[str, Callable[[argparse.Namespace], str]] = {
    "routing": routing.section,
    "autoscaling": autoscaling.section,
    "spot": spot.section,
}
MEASURED: Mapping[str, ModuleType] = {"reality": reality, "processes": processes}
PARTS = (*SIMULATED, *MEASURED)


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--traces", type=Path, default=TRACES, help="folder of the recorded traces")
    ask.add_argument("--requests", type=int, default=800, help="requests of a drawn pattern")
    ask.add_argument("--seeds", type=int, default=2, help="how many seeds a pattern is drawn from")
    ask.add_argument("--short", action="store_true", help="less of the longest parts")
    ask.add_argument("--only", choices=sorted(PARTS), help="one part alone")
    ask.add_argument("--json", action="store_true", help="data instead of tables")
    ask.add_argument("--record", action="store_true", help="write into bench/RESULTS.md")
    asked = ask.parse_args()
    wanted = [name for name in PARTS if asked.only in (None, name)]
    if asked.json:
        wanted = [name for name in wanted if name in MEASURED]
        if not wanted:
            ask.error(f"--json is for {' and '.join(MEASURED)}; name one with --only")
    try:
        for name in wanted:
            run(name, asked)
    except BenchFailed as failed:
        print(f"{name}: {failed}", file=sys.stderr)
        return 1
    return 0


def run(name: str, asked: argparse.Namespace) -> None:
    """One part: measure, print, and record if that was asked for."""
    began = time.perf_counter()
    if name in MEASURED:
        found = MEASURED[name].measure(asked)
        section = MEASURED[name].text(found)
    else:
        section = SIMULATED[name](asked)
    took_s = time.perf_counter() - began
    if asked.json:
        print(json.dumps({"part": name, "seconds": round(took_s, 1), **found}))
    else:
        print(section)
        print(f"{name}: {took_s:.0f} s")
    if asked.record:
        record(f"bench-fleet {name}", section)


if __name__ == "__main__":
    sys.exit(main())
