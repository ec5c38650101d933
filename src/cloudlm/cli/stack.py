"""Starts gateway and control as child processes of ``cloudlm up``, and ends all with it.

Each runs under a guard of ``drivers.guard``. All guards, also those that control starts for
workers, hold the read end of one pipe, the lifeline: when this process ends, however it ends, the
pipe closes and nothing is left running.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from cloudlm.core.errors import BadSetting, Conflict, StorageFailed, Unavailable
from cloudlm.drivers.guard import port_is_free
from cloudlm.drivers.launch import GuardOptions, GuardTiming, start_guard
from cloudlm.state.home import Home

START_TIMEOUT_S = 60.0
STOP_MARGIN_S = 5.0
WORKERS_STOP_S = 15.0
_POLL_S = 0.05


def free_port(host: str, what: str) -> int:
    """A port that is free now. Somebody may take it before it is used. Raises BadSetting."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise _cannot_listen(host, what, error) from None
        return int(probe.getsockname()[1])


def demand_free_port(host: str, port: int, what: str) -> None:
    """Raise Conflict if a server listens on ``port`` already, BadSetting if nobody can listen on
    ``host``."""
    if not port_is_free(host, port):
        free_port(host, what)
        raise Conflict(
            f"port {port} on {host} is in use, so the {what} cannot listen there. Stop what uses "
            f"it, or choose another with --{what}-port (CLOUDLM_{what.upper()}_PORT)"
        )


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where an installation answers, without a trailing slash."""

    gateway_url: str
    control_url: str


def running_addresses(home: Home) -> Addresses | None:
    """Where the ``cloudlm up`` of this home answers; None if none runs."""
    try:
        body = json.loads(_addresses_file(home).read_text("utf-8"))
        os.kill(int(body["pid"]), 0)
        return Addresses(str(body["gateway_url"]), str(body["control_url"]))
    except PermissionError:  # another user's: not ours to use
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _addresses_file(home: Home) -> Path:
    return home.path / "up" / "addresses.json"


def _cannot_listen(host: str, what: str, error: OSError) -> BadSetting:
    return BadSetting(
        f"the {what} cannot listen on {host!r} ({error.strerror or error}): expected an address of "
        f"this machine, such as 127.0.0.1 (CLOUDLM_{what.upper()}_HOST)"
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
            self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise Conflict(
                f"'cloudlm up' runs already with the home {self._home.path}; stop it, or give "
                "another folder with --home"
            ) from None
        except OSError as error:
            raise StorageFailed(f"cannot write to {folder}: {error.strerror}") from None
        self._lifeline_read, self._lifeline_write = os.pipe()
        os.set_inheritable(self._lifeline_write, False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _addresses_file(self._home).unlink(missing_ok=True)
        self._stop_guards()
        for descriptor in (self._lifeline_write, self._lifeline_read):
            os.close(descriptor)
        self._wait_for_workers()
        os.close(self._lock)

    @property
    def _folder(self) -> Path:
        return self._home.path / "up"

    def announce(self, addresses: Addresses) -> None:
        """Let the commands of this home find these processes, whatever ports they got."""
        file = _addresses_file(self._home)
        draft = file.with_suffix(".draft")
        try:
            draft.write_text(json.dumps({"pid": os.getpid(), **asdict(addresses)}), "utf-8")
            draft.replace(file)
        except OSError as error:
            raise StorageFailed(f"cannot write {file}: {error.strerror}") from None

    def start(self, name: str, module: str, grace_s: float) -> None:
        """Start ``python -m module`` under a guard that restarts it when it dies."""
        options = GuardOptions(
            state=self._folder / f"{name}.json",
            log=self._home.logs / f"{name}.log",
            command=[sys.executable, "-m", module],
            pass_lifeline=True,
            timing=GuardTiming(grace_s=grace_s + STOP_MARGIN_S),
        )
        self._guards[name] = start_guard(options, self._environment, self._lifeline_read)

    def wait_ready(self, name: str, url: str, tls: ssl.SSLContext | None = None) -> None:
        """Wait until ``url`` answers 200; ``tls`` is spoken to an https address. Raises Unavailable
        with the process's last words."""
        import httpx2

        deadline = time.monotonic() + START_TIMEOUT_S
        # No proxy of the environment stands between us and our own processes.
        with httpx2.Client(timeout=2.0, trust_env=False, verify=tls or True) as client:
            while time.monotonic() < deadline:
                self.check(name)
                with contextlib.suppress(httpx2.HTTPError):
                    if client.get(url).status_code == 200:
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
