"""``make bench-fleet``: policies against each other in the simulator, and real processes.

    python bench/fleet/run.py                      print
    python bench/fleet/run.py --record             also write it into bench/RESULTS.md
    python bench/fleet/run.py --only reality       one part alone
    python bench/fleet/run.py --only processes --json

Every part is a module with a ``section`` that gives its text. ``routing``, ``autoscaling`` and
``spot`` are simulated throughout, with replicas' figures that were measured
(``cloudlm/sim/figures.yaml``). ``reality`` and ``processes`` run real processes, which is why
nothing else should use the machine meanwhile; they give JSON too. Exits 1 if a part could not be
measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import autoscaling
import processes
import reality
import routing
import spot
from stack import BenchFailed

RESULTS = Path(__file__).parents[1] / "RESULTS.md"
TRACES = Path(__file__).parent / "traces"
PARTS: Mapping[str, Callable[[argparse.Namespace], str]] = {
    "routing": routing.section,
    "autoscaling": autoscaling.section,
    "spot": spot.section,
    "reality": reality.section,
    "processes": processes.section,
}
MEASURED: Mapping[str, ModuleType] = {"reality": reality, "processes": processes}
"""Parts that give data (``measure``) beside its text (``text``)."""
BEGIN, END = "<!-- bench-fleet {}: begin -->", "<!-- bench-fleet {}: end -->"


def recorded(text: str, part: str, section: str) -> str:
    """``text`` with a part's section in the place of its last one, or at the end."""
    begin, end = BEGIN.format(part), END.format(part)
    block = f"{begin}\n{section.rstrip()}\n{end}"
    before, found, rest = text.partition(begin)
    if not found:
        return f"{text.rstrip()}\n\n{block}\n"
    return before + block + rest.partition(end)[2]


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
        section = PARTS[name](asked)
    took_s = time.perf_counter() - began
    if asked.json:
        print(json.dumps({"part": name, "seconds": round(took_s, 1), **found}))
    else:
        print(section)
        print(f"{name}: {took_s:.0f} s")
    if asked.record:
        RESULTS.write_text(recorded(RESULTS.read_text("utf-8"), name, section), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
