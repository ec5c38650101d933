"""The engine benchmark's report: ratios point the right way."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import msgspec
import pytest

BENCH = Path(__file__).parents[3] / "bench" / "engine"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    report = importlib.import_module("report")

    yield report
    for name in ("report", "roofline", "peers"):
        sys.modules.pop(name, None)


def _line(name: str, w1: float, w4: float) -> dict[str, Any]:
    state = {"read_gbs": {"best": 24.0}, "bf16_tflops": {"best": 1.7}}
    return {
        "name": name,
        "bits": "bf16",
        "state": [state, state],
        "load_s": 1.5,
        "peak_rss_gib": 2.0,
        "W1": {
            "decode_tps": {"median": w1, "min": w1, "max": w1},
            "ttft_ms": {"median": 70.0},
        },
        "W4": {"wall_s": {"median": w4, "min": w4, "max": w4}},
    }


def test_ratios_are_above_one_where_ours_is_ahead(report: Any, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    lines = [_line("cloudlm", 20.0, 4.0), _line("slower", 10.0, 6.0), _line("slowest", 5.0, 8.0)]
    failed = {"name": "broken", "bits": "bf16", "state": lines[0]["state"], "failed": "exit 1"}
    results.write_bytes(b"\n".join(msgspec.json.encode(line) for line in [*lines, failed]))
    table = report.table(results, Namespace(threads=2, runs=1), ["vllm is not installed"])
    assert "| cloudlm: against the best peer | **2.00** | - | - | **1.50** | - |" in table
    assert "| cloudlm: share of the limit | **0.81** |" in table  # 24.78 tokens/s at 24 GB/s
    assert "broken | exit 1" in table
    assert "vllm is not installed" in table


def test_what_lacks_figures_is_marked(report: Any, tmp_path: Path) -> None:
    """Peers without the precision, workloads over their limit, fewer runs than asked for."""
    results = tmp_path / "results.jsonl"
    slow = _line("llamacpp", 10.0, 6.0) | {"W2": {"over_s": 300.0}, "W3": {"error": "exit 1"}}
    slow["W1"]["decode_tps"]["runs"] = [10.0]
    old, ours = _line("cloudlm", 1.0, 9.0), _line("cloudlm", 20.0, 4.0)
    lines = [line | {"bits": "int4"} for line in (old, slow, ours)]
    results.write_bytes(b"\n".join(msgspec.json.encode(line) for line in lines))
    table = report.table(results, Namespace(threads=2, runs=3), [])
    assert "| llamacpp | 10 (10–10, 1 run) | over 300 s | failed | 6 (6–6) | - |" in table
    assert "| vllm | *has no such precision* |" in table
    assert "| openvino | *not measured* |" in table
    assert table.count("| cloudlm | ") == 1, "of two lines the later counts"
    assert "| cloudlm: against the best peer | **2.00** |" in table


def test_abilities_stand_beside_their_goals(report: Any, tmp_path: Path) -> None:
    step = {"steps": 64, "pass_ms": 100.0, "overhead_ms": 2.0, "share": 0.02}
    found = {
        "precision": "bfloat16",
        "overhead": {"16": step},
        "constrained": {"free_s": 1.0, "constrained_s": 1.05, "ratio": 1.05},
        "sleep": {"sleep_s": [0.2], "wake_s": [0.4]},
    }
    results = tmp_path / "results.jsonl"
    ours = _line("cloudlm", 20.0, 4.0) | {"settings": {"kv_cache_resident_mb": 1024}}
    lines = [ours, {"name": "abilities", "bits": "", "abilities": found}]
    results.write_bytes(b"\n".join(msgspec.json.encode(line) for line in lines))
    table = report.table(results, Namespace(threads=2, runs=3), [])
    assert "16 sequences 2.0 % (2.00 ms a step)" in table
    # 2 GiB less 1 GiB of cache and 473.2 million weights of 16 bits
    assert "cloudlm bf16 127 MB" in table
    assert "take 1.05 times as long" in table and "waking up 0.40 s" in table
