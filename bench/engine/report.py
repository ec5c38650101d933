"""Turns the JSON lines of run.py into the tables of RESULTS.md: figures, ratios, limits."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import roofline

COLUMNS = {
    # workload: (heading, key of the summary, whether more is better)
    "W1": ("W1 tokens/s", "decode_tps", True),
    "W2": ("W2 tokens/s", "gen_tps", True),
    "W3": ("W3 tokens/s", "prompt_tps", True),
    "W4": ("W4 s", "wall_s", False),
    "W4w": ("W4w s", "wall_s", False),
}


def table(results: Path, options: argparse.Namespace, absent: list[str]) -> str:
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    parts = [f"Threads {options.threads}; median (minimum to maximum) of {options.runs} runs.\n"]
    for bits in ("bf16", "int8", "int4"):
        rows = [line for line in lines if line["bits"] == bits]
        if rows:
            parts.append(_of_precision(bits, rows))
    parts.append(_same_work(lines))
    if absent:
        parts.append("Left out: " + "; ".join(absent) + ".\n")
    return "\n".join(parts)


def _of_precision(bits: str, rows: list[dict[str, Any]]) -> str:
    gbs, tflops = _machine(rows)
    limits = roofline.limits(bits, gbs, tflops)
    headings = [heading for heading, _, _ in COLUMNS.values()]
    out = [
        f"**{bits}**, machine meanwhile: {gbs:.1f} GB/s, {tflops:.2f} TFLOP/s\n",
        "| engine | " + " | ".join(headings) + " | first token ms | load s | peak GiB |",
        "|---|" + "--:|" * (len(COLUMNS) + 3),
    ]
    out += [_row(line) for line in rows]
    out.append(
        "| *limit* | " + " | ".join(f"*{limits[name]:.4g}*" for name in COLUMNS) + " | | | |"
    )
    peers = [line for line in rows if not _is_ours(line)]
    for ours in filter(_is_ours, rows):
        name = ours["name"]
        out.append(_compared(f"{name}: share of the limit", ours, lambda name: limits[name]))
        if peers:
            best = _compared(f"{name}: against the best peer", ours, lambda w: _best(peers, w))
            out.append(best)
    return "\n".join(out) + "\n"


def _is_ours(line: dict[str, Any]) -> bool:
    return str(line["name"]).startswith("cloudlm")


def _same_work(lines: list[dict[str, Any]]) -> str:
    out = [
        "Same work? 8 prompts, 16 greedy tokens each, against float32 (`check.py`):\n",
        "| engine | leading tokens equal of 16 | top-1 under float32 | mean gap | worst gap |",
        "|---|--:|--:|--:|--:|",
    ]
    for line in lines:
        if found := line.get("checked"):
            out.append(
                f"| {line['name']} {line['bits']} | {found['leading_equal']:.1f} "
                f"| {100 * found['top1']:.1f} % | {found['mean_gap']:.4f} "
                f"| {found['worst_gap']:.3f} |"
            )
    return "\n".join(out) + "\n"


def _machine(rows: list[dict[str, Any]]) -> tuple[float, float]:
    states = [state for line in rows for state in line["state"]]
    return (
        statistics.median(state["read_gbs"]["best"] for state in states),
        statistics.median(state["bf16_tflops"]["best"] for state in states),
    )


def _row(line: dict[str, Any]) -> str:
    name = line["name"] + (f" {line['version']}" if "version" in line else "")
    if "failed" in line:
        return f"| {name} | {line['failed']} |" + " |" * (len(COLUMNS) + 2)
    cells = [_cell(line.get(workload, {}), key) for workload, (_, key, _) in COLUMNS.items()]
    ttft = line.get("W1", {}).get("ttft_ms", {}).get("median")
    cells += [f"{ttft:.0f}" if ttft else "-", f"{line['load_s']}", f"{line['peak_rss_gib']:.2f}"]
    return f"| {name} | " + " | ".join(cells) + " |"


def _cell(result: dict[str, Any], key: str) -> str:
    if "error" in result:
        return "failed"
    if key not in result:
        return "-"
    found = result[key]
    return f"{found['median']:.4g} ({found['min']:.4g}–{found['max']:.4g})"


def _median(line: dict[str, Any], name: str) -> float | None:
    found = line.get(name, {}).get(COLUMNS[name][1])
    return found["median"] if found else None


def _best(lines: list[dict[str, Any]], name: str) -> float | None:
    known = [value for line in lines if (value := _median(line, name)) is not None]
    return (max if COLUMNS[name][2] else min)(known, default=None)


def _compared(title: str, ours: dict[str, Any], other: Any) -> str:
    """A row of ratios, each above 1 where ours is ahead."""
    cells = []
    for name, (_, _, more_is_better) in COLUMNS.items():
        mine, theirs = _median(ours, name), other(name)
        if mine is None or theirs is None:
            cells.append("-")
        else:
            cells.append(f"**{mine / theirs if more_is_better else theirs / mine:.2f}**")
    return f"| {title} | " + " | ".join(cells) + " | | | |"
