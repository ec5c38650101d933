"""An installation for a benchmark: ``cloudlm up`` in a home of its own, on free ports.

Started and asked as a user would: by the command line and over HTTP.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class BenchFailed(Exception):
    """What was to be measured did not happen; the message says what."""


@dataclass(frozen=True)
class Stack:
    """A running installation."""

    home: Path
    process: subprocess.Popen[bytes]
    gateway: str
    control: str
    key: str
    environment: Mapping[str, str]

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def cli(self, *arguments: str, given: str | None = None) -> str:
        """What a command prints. Raises BenchFailed with what it said if it fails."""
        done = subprocess.run(
            [sys.executable, "-m", "cloudlm.cli.main", *arguments],
            env=dict(self.environment),
            input=given if given is not None else "",
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        if done.returncode:
            raise BenchFailed(f"cloudlm {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def deploy(self, spec: Mapping[str, Any], *, wait: bool = True) -> None:
        """Apply a deployment's file."""
        self.cli("apply", "-f", "-", *([] if wait else ["--no-wait"]), given=json.dumps(spec))

    def replicas(self, name: str) -> list[dict[str, Any]]:
        """A deployment's replicas as control tells them."""
        url = f"{self.control}/api/v1/deployments/{name}"
        asked = urllib.request.Request(url, headers=self.headers)
        with urllib.request.urlopen(asked, timeout=10) as answer:
            body = json.load(answer)
        return list((body.get("status") or {}).get("replicas", []))

    def processes(self) -> dict[int, str]:
        """Living processes of this installation: number to command line."""
        needle = f"CLOUDLM_HOME={self.home}".encode()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if needle in (folder / "environ").read_bytes().split(b"\0"):
                    line = (folder / "cmdline").read_bytes()
                    found[int(folder.name)] = line.replace(b"\0", b" ").decode()
        return found

    @contextlib.contextmanager
    def others(self) -> Iterator[Callable[[], float]]:
        """Gives what tells, after the block, how many CPUs were used by neither this installation
        nor this process while it ran (what a host took from a virtual machine counts)."""
        before = self._cpu_s()
        found = 0.0
        yield lambda: found
        busy_s, own_s, at = (now - then for now, then in zip(self._cpu_s(), before, strict=True))
        found = max(busy_s - own_s, 0.0) / at

    def _cpu_s(self) -> tuple[float, float, float]:
        """Seconds of CPU that everybody and that we used, ours with what our children took that
        have ended, and the time."""
        fields = [int(one) for one in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
        everybody = sum(fields[:3]) + sum(fields[5:8])  # all but idle and waiting for disks
        ours = 0
        for pid in (*self.processes(), os.getpid()):
            with contextlib.suppress(OSError):
                times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ours += sum(map(int, times[11:15]))  # utime, stime, cutime, cstime: proc(5)
        return everybody / _TICKS_PER_S, ours / _TICKS_PER_S, time.monotonic()


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Stack]:
    """An installation in a temporary home, stopped at the end. Raises BenchFailed if it does not
    come up."""
    with tempfile.TemporaryDirectory(prefix="cloudlm-bench-") as folder:
        stack = _start(Path(folder) / "home", arguments)
        try:
            yield stack
        finally:
            stack.process.send_signal(signal.SIGINT)
            stack.process.wait(60)
            if stack.process.stdout is not None:
                stack.process.stdout.close()


def _start(home: Path, arguments: tuple[str, ...]) -> Stack:
    environment = {
        **os.environ,
        "CLOUDLM_HOME": str(home),
        "CLOUDLM_GATEWAY_PORT": "0",
        "CLOUDLM_CONTROL_PORT": "0",
        "CLOUDLM_ENGINE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    # A user's Python compiles a module once; without this every start here would do it anew.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    up = [sys.executable, "-m", "cloudlm.cli.main", "up", "--json", *arguments]
    with (home.parent / "up.log").open("wb") as errors:
        process = subprocess.Popen(
            up,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdout is not None
    lines: list[bytes] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(b"}"):
            break
    else:
        process.wait(60)
        raise BenchFailed(f"cloudlm up did not start: {(home.parent / 'up.log').read_text()}")
    facts = json.loads(b"".join(lines))
    environment |= {
        "CLOUDLM_API_KEY": facts["admin_key"],
        "CLOUDLM_CONTROL_URL": facts["control_url"],
        "CLOUDLM_GATEWAY_URL": facts["gateway_url"],
    }
    gateway, control = facts["gateway_url"], facts["control_url"]
    return Stack(home, process, gateway, control, facts["admin_key"], environment)


def until(what: str, check: Callable[[], T], within_s: float = 90.0) -> T:
    """Ask until the answer is true. Raises BenchFailed that names ``what``."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        found = check()
        if found:
            return found
        time.sleep(0.02)
    raise BenchFailed(f"{what} did not happen within {within_s:g} s")
