"""The GPU benchmark, tried out on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.flow
SCRIPT = Path(__file__).parents[2] / "bench/engine/gpu.py"


def test_a_tiny_shape_on_the_cpu(tmp_path: Path) -> None:
    result = tmp_path / "gpu.json"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--shape", "tiny", "--precision", "int4"]
    sizes = ["--batch", "1", "3", "--input", "9", "--output", "5", "--rounds", "1"]
    done = subprocess.run(
        [*command, *sizes, "--json", result], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(result.read_text())
    assert [row["batch"] for row in measured["rows"]] == [1, 3]
    for row in measured["rows"]:
        assert row["cloudlm"]["tokens_s"] > 0 and row["transformers"]["tokens_s"] > 0
        assert row["limit_tokens_s"] > 0 and row["ratio"] > 0
    assert "| 3 | " in done.stdout


def test_bad_sizes_are_refused() -> None:
    command = [sys.executable, SCRIPT, "--device", "cpu", "--shape", "tiny", "--input", "600"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "at most 512 tokens" in done.stderr
