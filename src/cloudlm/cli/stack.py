"""Starts gateway and control as child processes of ``cloudlm up``, and ends all with it.

Each runs under a guard of ``drivers.guard``. All guards, also those that control starts for
workers, hold the read end of one pipe, the lifeline: when this process ends, however it ends, the
pipe closes and nothing is left running.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from cloudlm.core.errors import Conflict, StorageFailed, Unavailable
from cloudlm.drivers.guard import LIFELINE_VARIABLE, lock_file, port_is_free
from cloudlm.state.home import Home

START_TIMEOUT_S = 60.0
STOP_MARGIN_S = 5.0
WORKERS_STOP_S = 15.0
_POLL_S = 0.05


def free_port(host: str) -> int:
    """A port that is free now. Somebody may take it before it is used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def demand_free_port(host: str, port: int, what: str) -> None:
    """Raise Conflict if a server listens on ``port`` already."""
    if not port_is_free(host, port):
        raise Conflict(
            f"port {port} on {host} is in use, so the {what} cannot listen there. Stop what uses "
            f"it, or choose another with --{what}-port (CLOUDLM_{what.upper()}_PORT)"
        )


class Stack:
    """The processes of one installation. A context manager; leaving it stops everything."""

    def __init__(self, home: Home, environment: Mapping[str, str]) -> None:
        self._home = home
        self._environment = dict(environment)
        self._guards: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = -1
        self._lifeline_read = -1
        self._lifeline_write = -1
        self._hurry = False

    def __enter__(self) -> Stack:
        folder = self._folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_file(folder / "up.lock")
        except OSError as error:
            raise StorageFailed(f"cannot write to {folder}: {error.strerror}") from None
        if lock is None:
            raise Conflict(
                f"'cloudlm up' runs already with the home {self._home.path}; stop it, or give "
                "another folder with --home"
            )
        self._lock = lock
        self._lifeline_read, self._lifeline_write = os.pipe()
        os.set_inheritable(self._lifeline_write, False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop_guards()
        for descriptor in (self._lifeline_write, self._lifeline_read):
            os.close(descriptor)
        self._wait_for_workers()
        with contextlib.suppress(OSError):
            (self._folder / "up.lock").unlink()
        os.close(self._lock)

    @property
    def _folder(self) -> Path:
        return self._home.path / "up"

    def start(self, name: str, module: str, grace_s: float) -> None:
        """Start ``python -m module`` under a guard that restarts it when it dies."""
        command = [sys.executable, "-m", "cloudlm.drivers.guard"]
        command += ["--state", str(self._folder / f"{name}.json")]
        command += ["--log", str(self._home.logs / f"{name}.log")]
        command += ["--restart", "--pass-lifeline", "--grace-s", str(grace_s + STOP_MARGIN_S)]
        command += ["--", sys.executable, "-m", module]
        self._guards[name] = subprocess.Popen(
            command,
            env={**self._environment, LIFELINE_VARIABLE: str(self._lifeline_read)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is ours to handle, in order
            pass_fds=(self._lifeline_read,),
        )

    def wait_ready(self, name: str, url: str) -> None:
        """Wait until ``url`` answers 200. Raises Unavailable with the process's last words."""
        import httpx2

        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            self.check(name)
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(url, timeout=2.0).status_code == 200:
                    return
            time.sleep(_POLL_S)
        raise Unavailable(
            f"the {name} did not answer within {START_TIMEOUT_S:.0f} s; {self._log_hint(name)}"
        )

    def check(self, name: str) -> None:
        """Raise Unavailable if the process fails to start."""
        state = self._guard_state(name)
        if state.get("phase") == "backoff" or self._guards[name].poll() is not None:
            message = state.get("message") or "it ended"
            raise Unavailable(f"the {name} does not start: {message}; {self._log_hint(name)}")

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Wait for ``done``, while the guards live. Raises Unavailable if one is lost."""
        while not done():
            for name, guard in self._guards.items():
                if guard.poll() is not None:
                    raise Unavailable(f"the {name}'s guard was killed; stopping everything")
            time.sleep(0.2)

    def hurry(self) -> None:
        """Stop without waiting for running requests."""
        self._hurry = True

    def _guard_state(self, name: str) -> dict[str, Any]:
        try:
            body = json.loads((self._folder / f"{name}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return body if isinstance(body, dict) else {}

    def _log_hint(self, name: str) -> str:
        return f"its log is {self._home.logs / f'{name}.log'}"

    def _stop_guards(self) -> None:
        """Gateway first, so that it drains while its workers still answer."""
        for guard in self._guards.values():
            guard.terminate()
            while guard.poll() is None and not self._hurry:
                time.sleep(_POLL_S)

    def _wait_for_workers(self) -> None:
        """Their guards remove their state files when the last process is gone."""
        deadline = time.monotonic() + WORKERS_STOP_S
        while time.monotonic() < deadline:
            running = list(self._home.run.glob("*/*.lock"))
            alive = any(guard.poll() is None for guard in self._guards.values())
            if not running and not alive:
                return
            time.sleep(_POLL_S)
