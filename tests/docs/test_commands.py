"""The commands in README.md, docs/start.md and docs/operate.md are run as they stand, in order.

Blocks marked ``bash`` are run; ``console`` and ``text`` blocks are transcripts. The commands meet a
fresh installation on other ports than the documented ones; addresses are replaced accordingly.
README.zh-CN.md has the blocks of README.md, which test_translations.py sees to.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from installations import Installation, start_installation, stop_installation

pytestmark = pytest.mark.flow

ROOT = Path(__file__).parents[2]
PAPERS = ("README.md", "docs/start.md", "docs/operate.md")
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
STARTS = ("make ", "cloudlm up", "git clone", "cd ", "source ")


def blocks(paper: str) -> list[str]:
    return BLOCK.findall((ROOT / paper).read_text("utf-8"))


@pytest.mark.timeout(400)  # a dozen real starts one after the other
@pytest.mark.parametrize("paper", PAPERS)
def test_the_commands_of_a_paper_work(paper: str, tmp_path: Path) -> None:
    running = start_installation(tmp_path / "home")
    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(ROOT / "src/cloudlm/registry/bundled/bank-helper", work / "my-model")
    shutil.copytree(ROOT / "examples", work / "examples")
    try:
        ran = sum(_run(block, running, work) for block in blocks(paper))
    finally:
        stop_installation(running)
    assert ran >= 5


def _run(block: str, running: Installation, work: Path) -> int:
    """Run one block as one shell script; lines that start what runs already are left out."""
    lines = [line for line in block.splitlines() if not line.startswith(STARTS)]
    lines = [line for line in lines if not line.startswith("export CLOUDLM_API_KEY")]
    script = "\n".join(lines).replace("http://127.0.0.1:8000", running.gateway)
    script = script.replace("http://127.0.0.1:8001", running.control)
    if not script.strip():
        return 0
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=work,
        env={**running.environment, "PATH": path},
        capture_output=True,
        text=True,
        timeout=110,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return sum(1 for line in lines if line and not line.startswith((" ", "#")))


def test_only_known_commands_are_left_out() -> None:
    for paper in PAPERS:
        for block in blocks(paper):
            for line in block.splitlines():
                if line.startswith("make "):
                    target = line.split()[1]
                    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
