"""schemathesis asks every route of the served OpenAPI documents, with good and bad data: no answer
is a server's fault, none comes without a key, and no method is there that is not described."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from installations import MODEL, Installation

pytestmark = pytest.mark.timeout(300)

EXAMPLES_PER_ROUTE = "3"
CHECKS = ("not_a_server_error", "ignored_auth", "unsupported_method", "content_type_conformance")
# 501 says that something is not offered, 503 that it cannot be had now.
CONFIG = """
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "501", "503"]
"""


def fuzz(location: str, url: str, key: str, folder: Path, *more: str) -> None:
    """Run schemathesis as its users do. Bounded, and the same data every time."""
    config = folder / "schemathesis.toml"
    config.write_text(CONFIG)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    options = {
        "--url": url,
        "--header": f"Authorization: Bearer {key}",
        "--checks": ",".join(CHECKS),
        "--phases": "fuzzing",
        "--max-examples": EXAMPLES_PER_ROUTE,
        "--request-timeout": "20",
        "--seed": "7",
        "--warnings": "off",
        "--suppress-health-check": "all",
    }
    flat = [part for option in options.items() for part in option]
    done = subprocess.run(
        [*command, *flat, "--continue-on-failure", "--no-color", *more, location],
        cwd=folder,
        env={**os.environ, "NO_PROXY": "*", "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-12_000:] + done.stderr[-2000:]
    generated = re.search(r"(\d+) generated, \1 passed", done.stdout)
    assert generated is not None, done.stdout[-2000:]
    assert int(generated[1]) > 50


def document(url: str, key: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    answer = httpx2.get(
        url, headers={"authorization": f"Bearer {key}"}, trust_env=False, timeout=60
    )
    assert answer.status_code == 200
    path = folder / "openapi.json"
    path.write_text(answer.text)
    return path, answer.json()


@pytest.mark.promise(34, 18)
def test_control_withstands_every_described_request(
    installation: Installation, tmp_path: Path
) -> None:
    url = f"{installation.control}/api/v1/openapi.json"
    path, described = document(url, installation.key, tmp_path)
    assert len(described["paths"]) > 20
    fuzz(str(path), installation.control, installation.key, tmp_path)
    assert installation.cli("whoami").returncode == 0


@pytest.mark.promise(34, 18)
def test_the_gateway_withstands_every_described_request(
    installation: Installation, tmp_path: Path
) -> None:
    path, described = document(f"{installation.gateway}/openapi.json", "none", tmp_path)
    assert len(described["paths"]) > 20
    for operations in described["paths"].values():
        for one in operations.values():
            body = one.get("requestBody", {}).get("content", {}).get("application/json", {})
            fields = body.get("schema", {}).get("properties", {})
            if "model" in fields:  # else nearly every request would ask for a model that is not
                fields["model"] = {"enum": [MODEL]}
            for name in ("max_tokens", "max_output_tokens"):
                if name in fields:
                    fields[name] = {"type": "integer", "minimum": 1, "maximum": 4}
    path.write_text(json.dumps(described))
    fuzz(str(path), installation.gateway, installation.key, tmp_path)
    installation.openai().models.list()
