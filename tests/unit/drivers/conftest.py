"""A home and a lifeline of its own for each test, whose end leaves nothing running."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloudlm.core.clock import SystemClock
from cloudlm.drivers import procfs
from cloudlm.drivers.base import DriverContext
from cloudlm.drivers.launch import GuardTiming

SERVER = """
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"ok")
    def log_message(self, *args): pass
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("listening", sys.argv[1], flush=True)
server.serve_forever()
"""


class Lifeline:
    """The pipe whose end is the sign that its owner lives."""

    def __init__(self) -> None:
        self.read_end, self._write_end = os.pipe()

    def cut(self) -> None:
        if self._write_end >= 0:
            os.close(self._write_end)
            self._write_end = -1


@pytest.fixture
def lifeline() -> Iterator[Lifeline]:
    line = Lifeline()
    yield line
    line.cut()
    os.close(line.read_end)


@pytest.fixture
def context(tmp_path: Path, lifeline: Lifeline) -> DriverContext:
    environment = {**os.environ, "CLOUDLM_LIFELINE_FD": str(lifeline.read_end)}
    return DriverContext(
        tmp_path, SystemClock(), environment, {"CLOUDLM_HOME": str(tmp_path)}, 18100
    )


@pytest.fixture
def timing() -> GuardTiming:
    return GuardTiming(grace_s=2.0, backoff_first_s=0.05, backoff_longest_s=0.2)


@pytest.fixture
def server_command() -> list[str]:
    return [sys.executable, "-c", SERVER, "{port}"]


def eventually(check: Callable[[], object], timeout_s: float = 60.0) -> object:
    """Wait until ``check`` is true; fail after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < deadline, f"not in {timeout_s} s"
        time.sleep(0.02)


@pytest.fixture(name="eventually")
def _eventually() -> Callable[..., object]:
    return eventually


@pytest.fixture
def processes_of() -> Callable[[Path], list[int]]:
    """Pids of all processes whose environment or command line names a folder."""

    def find(folder: Path) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in text and procfs.identify(int(entry.name)):
                found.append(int(entry.name))
        return found

    return find
