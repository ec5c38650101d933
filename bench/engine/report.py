"""Turns the JSON lines of run.py into the tables of RESULTS.md: figures, ratios, limits."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import peers
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
    lines = _latest([json.loads(line) for line in results.read_text().splitlines()])
    parts = [
        f"Threads {options.threads}; median (minimum to maximum) of {options.runs} runs, or of as "
        "many as a figure names. *over N s*: not one run within the limit of a workload. "
        "`cloudlm` takes the inputs of 8-bit and 4-bit products in 16 bits, `cloudlm-a8` in 8, as "
        "the peers do.\n"
    ]
    if getattr(options, "tiny", False):
        parts.insert(0, "**A tiny model and few tokens: these figures and limits mean nothing.**\n")
    for bits in ("bf16", "int8", "int4"):
        rows = [line for line in lines if line["bits"] == bits]
        if rows:
            parts.append(_of_precision(bits, rows, options))
    parts.append(_same_work(lines))
    parts += [_memory([line for line in lines if _is_ours(line)])]
    parts += [_abilities(line["abilities"]) for line in lines if "abilities" in line]
    if absent:
        parts.append("Left out: " + "; ".join(absent) + ".\n")
    return "\n".join(parts)


def _latest(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last line of each engine at each precision, where its first one stood."""
    return list({(line["name"], line["bits"]): line for line in lines}.values())


def _of_precision(bits: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    gbs, tflops = _machine(rows)
    limits = roofline.limits(bits, gbs, tflops)
    headings = [heading for heading, _, _ in COLUMNS.values()]
    out = [
        f"**{bits}**, machine meanwhile: {gbs:.1f} GB/s, {tflops:.2f} TFLOP/s\n",
        "| engine | " + " | ".join(headings) + " | first token ms | load s | peak GiB |",
        "|---|" + "--:|" * (len(COLUMNS) + 3),
    ]
    out += [_row(line, options.runs) for line in rows]
    there = {line["name"] for line in rows}
    out += [_lacking(name, bits) for name in peers.PEERS if name not in there]
    out.append(
        "| *limit* | " + " | ".join(f"*{limits[name]:.4g}*" for name in COLUMNS) + " | | | |"
    )
    others = [line for line in rows if not _is_ours(line)]
    for ours in filter(_is_ours, rows):
        name = ours["name"]
        out.append(_compared(f"{name}: share of the limit", ours, lambda name: limits[name]))
        if others:
            best = _compared(f"{name}: against the best peer", ours, lambda w: _best(others, w))
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


def _memory(rows: list[dict[str, Any]]) -> str:
    """What ours takes at its peak besides the weights and what it touched of its cache."""
    found = []
    for line in rows:
        cache_mb = line.get("settings", {}).get("kv_cache_resident_mb")
        if cache_mb is None or "peak_rss_gib" not in line:
            continue
        weights = (roofline.BODY + roofline.HEAD) * roofline.PRECISIONS[line["bits"]][0]
        more = line["peak_rss_gib"] * 2**30 - cache_mb * 2**20 - weights
        found.append(f"{line['name']} {line['bits']} {more / 1e6:.0f} MB")
    return f"Peak memory besides weights and cache (goal 400 MB): {', '.join(found) or '-'}.\n"


def _abilities(found: dict[str, Any]) -> str:
    """What abilities.py measured of ours, beside the goals."""
    if "failed" in found:
        return f"Abilities (`abilities.py`): failed, {found['failed']}.\n"
    steps = "; ".join(
        f"{count} sequences {100 * one['share']:.1f} % ({one['overhead_ms']:.2f} ms a step)"
        for count, one in found["overhead"].items()
    )
    asleep, awake = (statistics.median(found["sleep"][name]) for name in ("sleep_s", "wake_s"))
    ratio = found["constrained"]["ratio"]
    return (
        f"Abilities of cloudlm in {found['precision']} (`abilities.py`): a step without the "
        f"model's arithmetic: {steps} (goal at 16: under 3 %); 16 constrained answers take "
        f"{ratio:.2f} times as long as free ones (goal 1.1); falling asleep {asleep:.2f} s, "
        f"waking up {awake:.2f} s (goal 1).\n"
    )


def _machine(rows: list[dict[str, Any]]) -> tuple[float, float]:
    states = [state for line in rows for state in line["state"]]
    return (
        statistics.median(state["read_gbs"]["best"] for state in states),
        statistics.median(state["bf16_tflops"]["best"] for state in states),
    )


def _lacking(name: str, bits: str) -> str:
    """The row of a peer that has no figures here, with the reason."""
    reason = "not measured" if bits in peers.PEERS[name].precisions else "has no such precision"
    return f"| {name} | *{reason}* |" + " |" * (len(COLUMNS) + 2)


def _row(line: dict[str, Any], runs: int) -> str:
    name = line["name"] + (f" {line['version']}" if "version" in line else "")
    if "failed" in line:
        return f"| {name} | {line['failed']} |" + " |" * (len(COLUMNS) + 2)
    cells = [_cell(line.get(workload, {}), key, runs) for workload, (_, key, _) in COLUMNS.items()]
    ttft = line.get("W1", {}).get("ttft_ms", {}).get("median")
    cells += [f"{ttft:.0f}" if ttft else "-", f"{line['load_s']}", f"{line['peak_rss_gib']:.2f}"]
    return f"| {name} | " + " | ".join(cells) + " |"


def _cell(result: dict[str, Any], key: str, runs: int) -> str:
    if "over_s" in result:
        return f"over {result['over_s']:.0f} s"
    if "error" in result:
        return "failed"
    if key not in result:
        return "-"
    found = result[key]
    count = len(found.get("runs", ())) or runs
    fewer = "" if count == runs else f", {count} run{'s' if count > 1 else ''}"
    return f"{found['median']:.4g} ({found['min']:.4g}–{found['max']:.4g}{fewer})"


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
