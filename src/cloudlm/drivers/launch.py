"""How a guard is started: by the process driver for replicas, by the command line for planes.

Must not know what the guarded command is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloudlm.drivers.guard import LIFELINE_VARIABLE
from cloudlm.drivers.procfs import TOKEN_VARIABLE


@dataclass(frozen=True, slots=True)
class GuardTiming:
    """Times (seconds) and sizes (bytes) of a guard."""

    grace_s: float = 10.0
    backoff_first_s: float = 0.5
    backoff_longest_s: float = 30.0
    stable_s: float = 60.0
    log_bytes: int = 10_000_000
    log_files: int = 3


@dataclass(frozen=True, slots=True)
class GuardOptions:
    """One guard: its state file, the log of its command, and what it is to do.

    ``first_port`` 0 chooses no port; otherwise ``{port}`` in ``command`` becomes a free one.
    ``pass_lifeline`` is for a command that starts guards of its own (the control process).
    """

    state: Path
    log: Path
    command: Sequence[str]
    restart: bool = True
    restarts: int = 0
    host: str = "127.0.0.1"
    first_port: int = 0
    pass_lifeline: bool = False
    timing: GuardTiming = field(default_factory=GuardTiming)


def guard_command(options: GuardOptions) -> list[str]:
    """The argument list that starts the guard."""
    timing = options.timing
    command = [sys.executable, "-m", "cloudlm.drivers.guard"]
    command += ["--state", str(options.state), "--log", str(options.log)]
    command += ["--restarts", str(options.restarts), "--host", options.host]
    command += ["--first-port", str(options.first_port), "--grace-s", str(timing.grace_s)]
    command += ["--backoff-first-s", str(timing.backoff_first_s)]
    command += ["--backoff-longest-s", str(timing.backoff_longest_s)]
    command += ["--stable-s", str(timing.stable_s)]
    command += ["--log-bytes", str(timing.log_bytes), "--log-files", str(timing.log_files)]
    if options.restart:
        command.append("--restart")
    if options.pass_lifeline:
        command.append("--pass-lifeline")
    return [*command, "--", *options.command]


def start_guard(
    options: GuardOptions, environment: Mapping[str, str], lifeline: int
) -> subprocess.Popen[bytes]:
    """Start a guard in a session of its own, with ``lifeline`` (the read end of the owner's pipe).

    Creates the folders of its state and log. The guard's own complaints go into the log. Raises
    OSError.
    """
    options.state.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    options.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    given = {**environment, LIFELINE_VARIABLE: str(lifeline)}
    given.pop(TOKEN_VARIABLE, None)  # ours, if a guard guards us; its own command gets its own
    descriptor = os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            guard_command(options),
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            env=given,
            start_new_session=True,
            pass_fds=(lifeline,),
        )
    finally:
        os.close(descriptor)


def lifeline_from(environment: Mapping[str, str]) -> int:
    """The read end to hand to guards: the one we were given, so that they outlive a crash of ours,
    else that of a new pipe whose other end closes when this process ends.

    A new pipe's ends are never closed on purpose: they are the sign that we live.
    """
    given = environment.get(LIFELINE_VARIABLE, "")
    if given.isdigit():
        try:
            os.set_inheritable(int(given), False)
        except OSError:
            pass
        else:
            return int(given)
    read_end, _write_end = os.pipe2(os.O_CLOEXEC)
    return read_end
