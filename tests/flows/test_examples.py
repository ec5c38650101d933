"""Every numbered example runs as it stands, and is short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from installations import Installation

pytestmark = pytest.mark.flow

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("[0-9]*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(installation: Installation, example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 40
    done = subprocess.run(
        [sys.executable, str(example)],
        env=installation.environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5
