"""Processes by pid *and* start time, read from /proc, so that a reused pid is never taken for ours.

Standard library only, and of it only what a guard reads anyway: no dataclass, no ``pathlib``,
which would take it longer than all else. Must not start processes.
"""

from __future__ import annotations

import os
import signal
from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:  # ``typing`` itself would take a guard milliseconds
    from typing import Any

TOKEN_VARIABLE = "CLOUDLM_GUARD_TOKEN"  # noqa: S105 - the name of a variable, not a secret
_PROC = "/proc"


class ProcessId(namedtuple("ProcessId", ("pid", "start", "boot"))):
    """One process for good: pid, start time in clock ticks since boot, and the boot's id."""

    __slots__ = ()
    pid: int
    start: int
    boot: str

    def body(self) -> dict[str, Any]:
        return {"pid": self.pid, "start": self.start, "boot": self.boot}


def process_id_from_body(body: Any) -> ProcessId | None:
    """Read back what ``ProcessId.body`` wrote; None for anything else."""
    try:
        return ProcessId(int(body["pid"]), int(body["start"]), str(body["boot"]))
    except (KeyError, TypeError, ValueError):
        return None


def boot_id() -> str:
    """The kernel's id of this boot; start times count from it."""
    return _read(f"{_PROC}/sys/kernel/random/boot_id").decode("ascii").strip()


def identify(pid: int) -> ProcessId | None:
    """The running process ``pid``; None if there is none or it is a zombie."""
    try:
        stat = _read(f"{_PROC}/{pid}/stat")
    except OSError:
        return None
    # The command name may hold spaces and brackets: the numbers begin after the last bracket.
    fields = stat.rpartition(b")")[2].split()
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return ProcessId(pid, int(fields[19]), boot_id())


def alive(process: ProcessId | None) -> bool:
    """True if this very process still runs."""
    return process is not None and identify(process.pid) == process


def send(process: ProcessId, signum: signal.Signals) -> bool:
    """Signal this very process; False if it is gone. Free of races: the handle is opened first,
    then the start time is compared, then the handle is signalled."""
    try:
        handle = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        if identify(process.pid) != process:
            return False
        signal.pidfd_send_signal(handle, signum)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)


def with_token(token: str) -> list[ProcessId]:
    """Every running process of ours that was started with this guard's token, whatever group or
    session it has moved to since."""
    wanted = f"{TOKEN_VARIABLE}={token}".encode()
    own = os.getpid()
    found: list[ProcessId] = []
    for name in os.listdir(_PROC):  # noqa: PTH208 - without pathlib
        if not name.isdigit() or int(name) == own:
            continue
        process = identify(int(name))
        if process is None:
            continue
        try:
            environment = _read(f"{_PROC}/{name}/environ")
        except OSError:  # gone meanwhile, or another user's
            continue
        if wanted in environment.split(b"\0"):
            found.append(process)
    return found


def kill_all_with_token(token: str) -> int:
    """SIGKILL everything that carries the token, until nothing more is found; returns how many."""
    killed = 0
    for _ in range(20):  # a process may have been forking while we looked
        found = with_token(token)
        if not found:
            break
        killed += sum(send(process, signal.SIGKILL) for process in found)
    return killed


def _read(path: str) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123 - without pathlib
        return file.read()
