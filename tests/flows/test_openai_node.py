"""The newest official ``openai`` Node client passes the same set as the Python one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from installations import MODEL, QUESTION, Installation

pytestmark = pytest.mark.flow

SCRIPT = Path(__file__).with_name("openai_client.mjs")


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the newest client installed; skips where npm or its registry is missing."""
    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("npm and node are not installed")
    folder = tmp_path_factory.mktemp("node")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "openai@latest"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=90, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not install the client within 90 s")
    if done.returncode:
        pytest.skip(f"npm cannot install the client here: {done.stderr.strip()[-200:]}")
    shutil.copy(SCRIPT, folder)
    return folder


def test_the_node_client(installation: Installation, node_folder: Path) -> None:
    done = subprocess.run(
        ["node", SCRIPT.name],
        cwd=node_folder,
        env={
            **os.environ,
            "BASE_URL": f"{installation.gateway}/v1",
            "API_KEY": installation.key,
            "MODEL": MODEL,
            "QUESTION": QUESTION,
        },
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["models"] == [MODEL]
    assert facts["finish"] == "stop"
    assert facts["streamed"] == facts["text"]
    assert facts["streamedUsage"]["completion_tokens"] == facts["usage"]["completion_tokens"]
    assert facts["seeded"][0] == facts["seeded"][1]
    assert len(set(facts["seeded"][0])) > 1
    assert facts["stopped"] == facts["expectedStopped"]
    assert facts["logprobs"] == [2, 2, 2]
    assert facts["errors"] == {
        "unknown": ["NotFoundError", 404, "model_not_found"],
        "bad": ["BadRequestError", 400, "invalid_value"],
        "key": ["AuthenticationError", 401, "invalid_api_key"],
    }
