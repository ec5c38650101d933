"""Real processes for flow tests: an installation started as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import OpenAI

START_S = 180.0
MODEL = "bank-helper"
QUESTION = "I am still waiting on my card, when will it arrive?"


@dataclass
class Installation:
    """A running ``cloudlm up`` with its addresses and owner key."""

    home: Path
    process: subprocess.Popen[bytes]
    facts: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def gateway(self) -> str:
        return str(self.facts["gateway_url"])

    @property
    def control(self) -> str:
        return str(self.facts["control_url"])

    @property
    def key(self) -> str:
        return str(self.facts["admin_key"])

    def openai(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.gateway}/v1", api_key=self.key, max_retries=0, **options)

    def http(self, **options: Any) -> httpx2.Client:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx2.Client(base_url=self.gateway, headers=headers, timeout=30.0, **options)

    def cli(self, *arguments: str, check: bool = True, **options: Any) -> Any:
        """Run a command of the command line against this installation."""
        done = subprocess.run(
            [sys.executable, "-m", "cloudlm.cli.main", *arguments],
            env=options.pop("env", self.environment),
            capture_output=True,
            text=True,
            timeout=100,
            stdin=subprocess.DEVNULL if "input" not in options else None,
            **options,
        )
        if check:
            assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done

    def replicas(self, name: str = MODEL) -> list[dict[str, Any]]:
        """The replicas of a deployment as control reports them."""
        answer = httpx2.get(
            f"{self.control}/api/v1/deployments/{name}",
            headers={"authorization": f"Bearer {self.key}"},
            timeout=60,
        )
        status = answer.json().get("status") or {}
        return list(status.get("replicas", []))


def wait_for(what: str, check: Callable[[], Any], timeout_s: float = 90.0) -> Any:
    """Poll until ``check`` answers something true; fails with ``what`` after the time limit."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = check()
        if value:
            return value
        time.sleep(0.05)
    pytest.fail(f"{what} did not happen within {timeout_s} s")


def processes_of(home: Path) -> dict[int, str]:
    """Living processes whose environment names this home: pid to command line."""
    found = {}
    needle = f"CLOUDLM_HOME={home}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if needle not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if state != "Z":
            found[int(folder.name)] = command
    return found


def start_installation(home: Path, *arguments: str) -> Installation:
    """Run ``cloudlm up --json`` on free ports and wait for its facts."""
    environment = {
        **os.environ,
        "CLOUDLM_HOME": str(home),
        "CLOUDLM_GATEWAY_PORT": "0",
        "CLOUDLM_CONTROL_PORT": "0",
        "CLOUDLM_ENGINE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    errors = (home.parent / f"{home.name}-up.log").open("ab")
    process = subprocess.Popen(
        [sys.executable, "-m", "cloudlm.cli.main", "up", "--json", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
    )
    errors.close()
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(b"}"):
            break
    if process.poll() is not None or not lines:
        log = (home.parent / f"{home.name}-up.log").read_text()
        pytest.fail(f"cloudlm up ended with {process.wait()}: {log}")
    facts = json.loads(b"".join(lines))
    environment.update(
        CLOUDLM_API_KEY=str(facts["admin_key"]),
        CLOUDLM_CONTROL_URL=facts["control_url"],
        CLOUDLM_GATEWAY_URL=facts["gateway_url"],
    )
    return Installation(home, process, facts, environment)


def stop_installation(installation: Installation) -> int:
    """Ctrl-C, and wait; returns the exit code."""
    if installation.process.poll() is None:
        installation.process.send_signal(signal.SIGINT)
    code = installation.process.wait(60)
    if installation.process.stdout is not None:
        installation.process.stdout.close()
    return code
