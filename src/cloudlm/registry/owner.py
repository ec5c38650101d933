"""Names a running process so that another one can tell whether it is still there.

Only within one boot of one machine (and one container) can that be told; otherwise the answer is
"unknown", and whoever asks falls back to ages. Must not keep any state.
"""

from __future__ import annotations

import os
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def this_process() -> str:
    """``machine boot:process namespace:pid:start time`` of the running process."""
    pid = os.getpid()
    return f"{_machine()}:{pid}:{_start_time(pid)}"


def is_gone(owner: str) -> bool:
    """True only if ``owner`` certainly ran here and has ended."""
    machine, _, process = owner.rpartition(":")
    machine, _, pid = machine.rpartition(":")
    if not pid.isdigit() or machine != _machine() or machine == ":":
        return False
    return _start_time(int(pid)) != process


def _machine() -> str:
    try:
        boot = _BOOT.read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ":"
    return f"{boot}:{namespace.replace(':', '')}"


def _start_time(pid: int) -> str:
    """Clock ticks since boot when ``pid`` started; empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in ("Z", "X") else fields[19]  # field 22 of proc(5)
