"""Real processes for flow tests: an installation started as a user starts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from bench.stack import BenchFailed, Stack, begin, end, until
from bench.stack import processes_of as processes_of  # asked for here by the tests
from openai import OpenAI

MODEL = "bank-helper"
QUESTION = "I am still waiting on my card, when will it arrive?"


class Installation(Stack):
    """A running ``cloudlm up``, and clients of it."""

    def openai(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.gateway}/v1", api_key=self.key, max_retries=0, **options)

    def http(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.gateway, headers=self.headers, timeout=30.0, **options)

    def cli(self, *arguments: str, check: bool = True, **options: Any) -> Any:
        """What came of a command of the command line."""
        done = self.command(*arguments, **options)
        if check:
            assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done

    def replicas(self, name: str = MODEL) -> list[dict[str, Any]]:
        """The replicas of a deployment as control reports them."""
        url = f"{self.control}/api/v1/deployments/{name}"
        status = httpx2.get(url, headers=self.headers, timeout=60).json().get("status") or {}
        return list(status.get("replicas", []))


def wait_for(what: str, check: Callable[[], Any], timeout_s: float = 90.0) -> Any:
    """Poll until ``check`` answers something true; fails with ``what`` after the time limit."""
    try:
        return until(what, check, timeout_s)
    except BenchFailed as failed:
        pytest.fail(str(failed))


def start_installation(home: Path, *arguments: str) -> Installation:
    """Run ``cloudlm up --json`` on free ports and wait for its facts."""
    try:
        begun = begin(home, arguments)
    except BenchFailed as failed:
        raise AssertionError(str(failed)) from None
    return Installation(begun.home, begun.process, begun.facts, begun.environment)


def stop_installation(installation: Installation) -> int:
    """Ctrl-C, and wait; returns the exit code."""
    return end(installation)
