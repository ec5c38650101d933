"""Runs one engine's script workload by workload, each under a time limit.

A script tells a JSON line when its model is loaded and one after each workload, with all that it
knows by then (``common.run_all``). One that does not tell the next line within the limit, or ends
before its time, is ended with all its processes; what was measured stays, the workload that was
running is marked, and the script starts again with those behind it. So an engine that is hopeless
at one workload costs one limit, and not the others' figures. Must not know engines.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Facts = dict[str, Any]
_LEFT_OPEN_S = 10.0  # a process that left its group may hold the output open
Ended = Facts | None  # why an attempt did not come to its end


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds until the model is loaded, and for each workload (its warm-up, all its runs)."""

    load_s: float
    workload_s: float


def measure(
    attempt: Callable[[Sequence[str]], tuple[Facts, Ended]], workloads: Sequence[str]
) -> Facts:
    """The joined line of as many attempts as it takes. ``attempt`` runs the script with some
    workloads: its last line (empty if it told none), and why it was cut short, None if it was not.
    A workload that did not end has ``over_s`` or ``error`` in the place of figures; ``failed`` is
    there if nothing could be measured at all."""
    line: Facts = {}
    left = list(workloads)
    while True:
        told, ended = attempt(left)
        line = _joined(line, told)
        left = [name for name in left if name not in told]
        if ended is None:
            return line
        if not told and not any(name in line for name in workloads):
            return {**line, "failed": words(ended)}
        if not told:  # loaded before, but not again
            return {**line, **dict.fromkeys(left, ended)}
        if not left:  # all measured: at most its tokens could not be compared
            return line if "check" in line else {**line, "check_error": words(ended)}
        line[left.pop(0)] = ended


def _joined(line: Facts, told: Facts) -> Facts:
    """The first start's facts, everything that is new, and the higher of two memory peaks."""
    found = told | line
    peaks = [one["peak_rss_gib"] for one in (line, told) if "peak_rss_gib" in one]
    return found | ({"peak_rss_gib": max(peaks)} if peaks else {})


def words(ended: Facts) -> str:
    """For people: why an attempt was cut short."""
    return f"over {ended['over_s']:.0f} s" if "over_s" in ended else str(ended["error"])


def run(
    command: Sequence[str], limits: Limits, environment: Mapping[str, str]
) -> tuple[Facts, Ended]:
    """One attempt: the last JSON line that ``command`` told, and why it was ended, or ended itself,
    too soon. Its whole process group is killed then."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=dict(environment), start_new_session=True
    )
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    told: Facts = {}
    try:
        while True:
            limit_s = limits.workload_s if told else limits.load_s
            found = _next(lines, limit_s)
            if found is None:
                code = _code(process)
                return told, {"error": f"exit {code}"} if code else None
            told = found
    except queue.Empty:
        return told, {"over_s": limit_s}
    finally:
        _kill(process)
        reader.join(_LEFT_OPEN_S)


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout as told:
        for line in told:
            if line.startswith("{") and line.endswith("}\n"):
                lines.put(line)
    lines.put(None)


def _next(lines: queue.Queue[str | None], limit_s: float) -> Facts | None:
    """The next line, None at the end. Raises queue.Empty after ``limit_s``."""
    line = lines.get(timeout=limit_s)
    if line is None:
        return None
    found: Facts = json.loads(line)
    return found


def _code(process: subprocess.Popen[str]) -> int:
    """How it ended, minus the signal if by one. It stays a zombie: its number is not given away
    while its group may have to be killed."""
    found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert found is not None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the engine's own processes too
    process.wait()
