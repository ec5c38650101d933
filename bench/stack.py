"""An installation for a benchmark or a test: ``cloudlm up`` in a home of its own, on free ports.

Started and asked as a user would: by the command line and over HTTP. Must not judge.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
UP_TIMEOUT_S = 600.0
"""Longest that an installation may take to come up, seconds; a first one compiles."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class BenchFailed(Exception):
    """What was to be measured did not happen; the message says what."""


@dataclass(frozen=True)
class Stack:
    """A running installation."""

    home: Path
    process: subprocess.Popen[bytes]
    facts: dict[str, Any]
    environment: dict[str, str]
    """What commands need to reach it; ``facts`` is what ``up --json`` said."""

    @property
    def gateway(self) -> str:
        return str(self.facts["gateway_url"])

    @property
    def control(self) -> str:
        return str(self.facts["control_url"])

    @property
    def key(self) -> str:
        return str(self.facts["admin_key"])

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def command(
        self, *arguments: str, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of the command line against this installation; ``input`` is what it is
        given, nothing by default."""
        return subprocess.run(
            [sys.executable, "-m", "cloudlm.cli.main", *arguments],
            env=env or self.environment,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
            **{"input": "", **options},
        )

    def cli(self, *arguments: str, given: str | None = None) -> str:
        """What a command prints. Raises BenchFailed with what it said if it fails."""
        done = self.command(*arguments, input=given or "")
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
        for pid in (*processes_of(self.home), os.getpid()):
            with contextlib.suppress(OSError):
                times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ours += sum(map(int, times[11:15]))  # utime, stime, cutime, cstime: proc(5)
        return everybody / _TICKS_PER_S, ours / _TICKS_PER_S, time.monotonic()


def processes_of(home: Path) -> dict[int, str]:
    """Living processes whose environment names this home: number to command line."""
    needle = f"CLOUDLM_HOME={home}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if needle in (folder / "environ").read_bytes().split(b"\0"):
                line = (folder / "cmdline").read_bytes()
                found[int(folder.name)] = line.replace(b"\0", b" ").decode()
    return found


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Stack]:
    """An installation in a temporary home, stopped at the end. Raises BenchFailed if it does not
    come up."""
    before = dict(os.environ)
    # A user's Python compiles a module once; with this every start here would do it anew.
    before.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(prefix="cloudlm-bench-") as folder:
        stack = begin(Path(folder) / "home", arguments, before)
        try:
            yield stack
        finally:
            end(stack)


def begin(
    home: Path,
    arguments: Sequence[str],
    before: Mapping[str, str] = os.environ,
    within_s: float = UP_TIMEOUT_S,
) -> Stack:
    """Run ``cloudlm up`` there, in the environment ``before`` and ours, and wait for what it says.
    Raises BenchFailed with its log, which lies beside the home, if it ends instead, says what
    cannot be understood or nothing ``within_s``; then nothing of it runs any more."""
    environment = {
        **before,
        "CLOUDLM_HOME": str(home),
        "CLOUDLM_GATEWAY_PORT": "0",
        "CLOUDLM_CONTROL_PORT": "0",
        "CLOUDLM_ENGINE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    up = [sys.executable, "-m", "cloudlm.cli.main", "up", "--json", *arguments]
    log = home.parent / f"{home.name}-up.log"
    with log.open("ab") as errors:
        process = subprocess.Popen(
            up, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        )
    try:
        facts = _facts(process, home, log, within_s)
        environment |= {
            "CLOUDLM_API_KEY": str(facts["admin_key"]),
            "CLOUDLM_CONTROL_URL": facts["control_url"],
            "CLOUDLM_GATEWAY_URL": facts["gateway_url"],
        }
    except BaseException as error:
        _kill(process, home)
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()
        if isinstance(error, KeyError):
            raise BenchFailed(f"cloudlm up did not say {error}") from None
        raise
    return Stack(home, process, facts, environment)


def _facts(
    process: subprocess.Popen[bytes], home: Path, log: Path, within_s: float
) -> dict[str, Any]:
    """What ``up --json`` says. Raises BenchFailed."""
    assert process.stdout is not None
    over = threading.Event()

    def end_it() -> None:
        over.set()
        _kill(process, home)

    timer = threading.Timer(within_s, end_it)
    timer.start()
    lines: list[bytes] = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith(b"}"):
                break
        else:
            lines.clear()
    finally:
        timer.cancel()
        timer.join()
    if over.is_set():
        raise BenchFailed(f"cloudlm up said nothing whole within {within_s:g} s: {log.read_text()}")
    if not lines:
        raise BenchFailed(f"cloudlm up ended with {process.wait(60)}: {log.read_text()}")
    said = b"".join(lines)
    try:
        return dict(json.loads(said))
    except ValueError:
        raise BenchFailed(f"cloudlm up said what is no JSON: {said.decode()}") from None


def _kill(process: subprocess.Popen[bytes], home: Path) -> None:
    """End it and all that it began there, at once."""
    process.kill()
    for pid in processes_of(home).keys() - {os.getpid()}:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def end(stack: Stack) -> int:
    """Ctrl-C if it still runs, and wait; returns the exit code."""
    if stack.process.poll() is None:
        stack.process.send_signal(signal.SIGINT)
    code = stack.process.wait(60)
    if stack.process.stdout is not None:
        stack.process.stdout.close()
    return code


def until(what: str, check: Callable[[], T], within_s: float = 90.0) -> T:
    """Ask until the answer is true. Raises BenchFailed that names ``what``."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        found = check()
        if found:
            return found
        time.sleep(0.02)
    raise BenchFailed(f"{what} did not happen within {within_s:g} s")
