"""Fixtures of the flow tests: installations in temporary homes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from installations import (
    Installation,
    processes_of,
    start_installation,
    stop_installation,
)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """One installation with the starter model for all tests of a file."""
    running = start_installation(tmp_path_factory.mktemp("flow") / "home")
    yield running
    code = stop_installation(running)
    assert code == 0, f"cloudlm up ended with {code}"
    assert processes_of(running.home) == {}, "processes were left behind"


@pytest.fixture
def own_installation(tmp_path: Path) -> Iterator[Callable[..., Installation]]:
    """Start installations for one test alone; what still runs at its end is killed."""
    started: list[Installation] = []

    def start(*arguments: str, home: Path | None = None) -> Installation:
        started.append(start_installation(home or tmp_path / "home", *arguments))
        return started[-1]

    yield start
    for one in started:
        stop_installation(one)
        for pid in processes_of(one.home):
            os.kill(pid, signal.SIGKILL)
