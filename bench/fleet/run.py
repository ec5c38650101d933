"""``make bench-fleet``: policies against each other in the simulator.

    python bench/fleet/run.py                      print
    python bench/fleet/run.py --record             also write it into bench/RESULTS.md

Every part is a module with a ``section`` that gives its text. Nothing is measured with real
processes here; the figures of the replicas are (``cloudlm/sim/figures.yaml``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import autoscaling
import routing
import spot

RESULTS = Path(__file__).parents[1] / "RESULTS.md"
TRACES = Path(__file__).parent / "traces"
PARTS: Mapping[str, Callable[[argparse.Namespace], str]] = {
    "routing": routing.section,
    "autoscaling": autoscaling.section,
    "spot": spot.section,
}
BEGIN, END = "<!-- bench-fleet {}: begin -->", "<!-- bench-fleet {}: end -->"


def recorded(text: str, part: str, section: str) -> str:
    """``text`` with a part's section in the place of its last one, or at the end."""
    begin, end = BEGIN.format(part), END.format(part)
    block = f"{begin}\n{section.rstrip()}\n{end}"
    before, found, rest = text.partition(begin)
    if not found:
        return f"{text.rstrip()}\n\n{block}\n"
    return before + block + rest.partition(end)[2]


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--traces", type=Path, default=TRACES, help="folder of the recorded traces")
    ask.add_argument("--requests", type=int, default=800, help="requests of a drawn pattern")
    ask.add_argument("--seeds", type=int, default=2, help="how many seeds a pattern is drawn from")
    ask.add_argument("--short", action="store_true", help="one scaling trace of each kind")
    ask.add_argument("--only", choices=sorted(PARTS), help="one part alone")
    ask.add_argument("--record", action="store_true", help="write into bench/RESULTS.md")
    asked = ask.parse_args()
    for name, part in PARTS.items():
        if asked.only in (None, name):
            began = time.perf_counter()
            section = part(asked)
            print(section)
            print(f"{name}: {time.perf_counter() - began:.0f} s")
            if asked.record:
                RESULTS.write_text(recorded(RESULTS.read_text("utf-8"), name, section), "utf-8")


if __name__ == "__main__":
    main()
