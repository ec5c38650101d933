"""The gateways' figures as tables, out of the JSON lines that the other scripts print.

    python bench/gateway/report.py out/gateway.jsonl [--record]

A file may hold several rounds of ``run.py``, ``streams.py``, ``overload.py``, ``memory.py`` and
``resume.py``: figures are medians with the smallest and the largest of the rounds. ``--record``
writes them into bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from results import record

Line = Mapping[str, Any]
Found = Mapping[tuple[str, str], Sequence[Line]]
OURS = "cloudlm"
# Title, scenario, field, decimals, and whether a larger figure is the better one (None: neither).
FIGURES = (
    ("added latency, one at a time, p50, ms", "one_at_a_time", "added_ms_p50", 2, False),
    ("added latency, one at a time, p99, ms", "one_at_a_time", "added_ms_p99", 2, False),
    ("whole answers, 64 clients, requests/s", "whole_64", "requests_per_s", 0, True),
    ("whole answers, 256 clients, requests/s", "whole_256", "requests_per_s", 0, True),
    ("the same, 20 ms upstream, requests/s", "whole_256_20ms", "requests_per_s", 0, True),
    ("CPU per request, 64 clients, µs", "whole_64", "gateway_cpu_us_per_request", 0, False),
    ("CPU per request, 256 at 20 ms, µs", "whole_256_20ms", "gateway_cpu_us_per_request", 0, False),
    ("CPU per delta, 64 streams, µs", "streams_64", "gateway_cpu_us_per_delta", 1, False),
    ("resident memory, MB", "streams_64", "gateway_resident_mb", 0, None),
    ("streams without a stall", "ladder", "streams", 0, True),
)


def read(paths: Iterable[Path]) -> Found:
    """The lines by gateway and scenario."""
    found: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for path in paths:
        for text in path.read_text("utf-8").splitlines():
            if text.startswith("{"):
                line = json.loads(text)
                found[line.get("gateway", OURS), line.get("scenario", "resume")].append(line)
    return found


def middle(lines: Sequence[Line], field: str) -> float | None:
    """The median of a figure; None if no round has it."""
    figures = [line[field] for line in lines if line.get(field) is not None]
    return statistics.median(figures) if figures else None


def cell(lines: Sequence[Line], field: str, decimals: int) -> str:
    figures = [line[field] for line in lines if line.get(field) is not None]
    if not figures:
        return "-"
    shown = f"{statistics.median(figures):,.{decimals}f}"
    if len(figures) > 1 and min(figures) != max(figures):
        shown += f" ({min(figures):,.{decimals}f}–{max(figures):,.{decimals}f})"
    return shown


def ratio(ours: float | None, theirs: float | None, larger: bool | None) -> str:
    if larger is None or not ours or not theirs:
        return "-"
    return f"{ours / theirs if larger else theirs / ours:,.2f}"


def peers_table(found: Found) -> list[str]:
    names = [OURS, *sorted({gateway for gateway, _ in found} - {OURS})]
    rows = ["| figure | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for title, scenario, field, decimals, _ in FIGURES:
        cells = [cell(found.get((name, scenario), ()), field, decimals) for name in names]
        rows.append(f"| {title} | " + " | ".join(cells) + " |")
    errors = [
        str(
            sum(
                line.get("errors", 0)
                for (who, _), lines in found.items()
                if who == name
                for line in lines
            )
        )
        for name in names
    ]
    rows.append("| errors in closed loops | " + " | ".join(errors) + " |")
    others = names[1:]
    if others:
        rows += ["", "cloudlm against each, above 1 is ahead:", ""]
        rows += ["| figure | " + " | ".join(others) + " |", "|---|" + "--:|" * len(others)]
        for title, scenario, field, _, larger in FIGURES:
            if larger is None:
                continue
            ours = middle(found.get((OURS, scenario), ()), field)
            cells = [
                ratio(ours, middle(found.get((name, scenario), ()), field), larger)
                for name in others
            ]
            rows.append(f"| {title.rpartition(', ')[0] or title} | " + " | ".join(cells) + " |")
    return rows


def own_table(found: Found) -> list[str]:
    """What only our gateway is asked."""
    lines = {scenario: lines for (name, scenario), lines in found.items() if name == OURS}

    def all_of(scenario: str, field: str, decimals: int = 2) -> str:
        return cell(lines.get(scenario, ()), field, decimals)

    rows = [("goodput at 2 times the capacity", all_of("overload_2", "goodput", 3), "")]
    rows.append(("goodput at 10 times the capacity", all_of("overload_10", "goodput", 3), "0.95"))
    told = all_of("overload_10", "refused_ms_p99", 0)
    rows.append(("time to a refusal at 10 times, p99, ms", told, "50"))
    attempts = all_of("outage", "attempts_per_request", 3)
    rows.append(("attempts per request in a total outage", attempts, "1.2"))
    grown = all_of("memory", "slope_mb_per_100k")
    if lines.get("memory") and lines["memory"][-1]["low"] is not None:
        last = lines["memory"][-1]
        grown += f" (95 %: {last['low']:.2f} to {last['high']:.2f})"
    rows.append(("memory growth, MB per 100,000 requests", grown, "1"))
    if lines.get("resume"):
        last = lines["resume"][-1]
        kept = f"{last['survived_byte_for_byte']} of {last['broken_streams']}"
        rows.append((f"streams that outlive their replica ({last['kills']} kills)", kept, "all"))
        gaps = f"{last['gap_ms_p50']:.0f} / {last['gap_ms_p99']:.0f} / {last['gap_ms_max']:.0f}"
        rows.append(("their longest silence, p50 / p99 / max, ms", gaps, "1,000 (p99)"))
    return [
        "| figure | cloudlm | goal |",
        "|---|--:|--:|",
        *(f"| {a} | {b} | {c} |" for a, b, c in rows),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("lines", type=Path, nargs="+", help="files of JSON lines")
    parser.add_argument("--record", action="store_true", help="write into bench/RESULTS.md")
    asked = parser.parse_args()
    found = read(asked.lines)
    rounds = len(found.get((OURS, "whole_64"), ()))
    accounts = [line["agree"] for line in found.get((OURS, "accounts"), ())]
    agree = f"Ledger and mock agreed in {sum(accounts)} of {len(accounts)} rounds."
    section = "\n".join(
        [
            f"Median (smallest to largest) of {rounds} rounds. {agree}",
            "",
            *peers_table(found),
            "",
            *own_table(found),
        ]
    )
    print(section)
    if asked.record:
        record("bench-gateway", section)
    return 0


if __name__ == "__main__":
    sys.exit(main())
