"""The guard: a tiny process that starts one command and answers for its end.

    python -m cloudlm.drivers.guard --state FILE --log FILE [options] -- COMMAND ARGUMENT...

It starts COMMAND in a session of its own, captures its output into a size-rotated log, starts it
anew with back-off if asked to (``--restart``), keeps a small JSON state file, and makes sure that
nothing it started outlives it:

- SIGTERM or SIGINT: the command's group gets SIGTERM, after ``--grace-s`` SIGKILL.
- The lifeline (an inherited pipe, ``CLOUDLM_LIFELINE_FD``) ends: its owner is gone; same, with at
  most ``ORPHAN_GRACE_S``.
- The guard itself is killed: the kernel kills the command (PR_SET_PDEATHSIG).
- Processes that left the command's group are found by the token in their environment.

With ``--first-port`` the text ``{port}`` in COMMAND becomes a free port on ``--host``; a command
that ends because somebody else took the port in between is started again on the next one.

Standard library only: it must start in milliseconds and stay small, because whoever asks for a
model without a replica waits for it. So it reads nothing that it can do without, and what it needs
only once its command runs (log, state file), it reads then. One thread, one poll loop.
Exit code: that of the command (128 + signal) without ``--restart``, 0 after a stop, 2 for misuse,
3 if another guard holds the same state file.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque

from cloudlm.drivers import procfs
from cloudlm.drivers.ports import PortReservation
from cloudlm.drivers.ports import port_is_free as port_is_free

TYPE_CHECKING = False
if TYPE_CHECKING:  # ``typing`` and ``pathlib`` themselves would take a quarter of the start
    from pathlib import Path
    from typing import Any

    from cloudlm.drivers.rotating import RotatingLog

LIFELINE_VARIABLE = "CLOUDLM_LIFELINE_FD"
ORPHAN_GRACE_S = 1.0
EXIT_MISUSE = 2
EXIT_ALREADY_GUARDED = 3
_PR_SET_PDEATHSIG = 1
_MAX_PORT_TRIES = 10
_STATE_RETRY_S = 1.0


def backoff_s(failures: int, first_s: float, longest_s: float) -> float:
    """Pause before the next start after ``failures`` ends in a row: doubling, bounded."""
    return float(min(first_s * 2 ** min(max(failures - 1, 0), 30), longest_s))


def lock_file(path: str | Path) -> int | None:
    """Hold ``path`` exclusively; None if another process does. The lock vanishes with us."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        # The holder before us removes the file when it ends: make sure ours is the one on disk.
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:  # noqa: PTH116
                return descriptor
        os.close(descriptor)


class Guard:
    """One guarded command. ``run`` returns the exit code."""

    def __init__(self, options: argparse.Namespace, lifeline: int) -> None:
        self._options = options
        self._lifeline = lifeline
        self._log: RotatingLog | None = None
        self._token = os.urandom(16).hex()
        self._ports = PortReservation(options.host, options.first_port or 0)
        self._port: int | None = None
        self._port_tries = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._child_id: procfs.ProcessId | None = None
        self._output = -1
        self._tail: deque[bytes] = deque(maxlen=8)
        self._partial = b""
        self._phase = "starting"
        self._restarts: int = options.restarts
        self._failures = 0
        self._started_at = 0.0
        self._started_monotonic = 0.0
        self._start_at: float | None = None
        self._kill_at: float | None = None
        self._last_exit: dict[str, Any] | None = None
        self._exit_code = 0
        self._message = ""
        self._unsaved = False
        self._poll = select.poll()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._libc = ctypes.CDLL(None, use_errno=True)

    # The loop -----------------------------------------------------------------------------------

    def run(self) -> int:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(signum, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._poll.register(self._lifeline, select.POLLIN)
        self._poll.register(self._wake_read, select.POLLIN)
        self._start()
        while self._child is not None or self._start_at is not None:
            for descriptor, _ in self._poll.poll(self._timeout_ms()):
                self._handle(descriptor)
            self._reap()
            self._act_on_deadlines()
        if self._log is not None:
            self._log.close()
        return self._exit_code

    def _handle(self, descriptor: int) -> None:
        if descriptor == self._lifeline:
            if not _read(descriptor):
                self._poll.unregister(descriptor)
                self._stop(min(ORPHAN_GRACE_S, self._options.grace_s))
        elif descriptor == self._wake_read:
            signals = _read(descriptor)
            if signal.SIGTERM in signals or signal.SIGINT in signals:
                self._stop(self._options.grace_s)
        elif descriptor == self._output and not self._capture():
            self._close_output()

    def _timeout_ms(self) -> float | None:
        deadlines = [at for at in (self._start_at, self._kill_at) if at is not None]
        if self._unsaved:
            deadlines.append(time.monotonic() + _STATE_RETRY_S)
        if not deadlines:
            return None
        return max(0.0, (min(deadlines) - time.monotonic()) * 1000) + 1

    def _act_on_deadlines(self) -> None:
        now = time.monotonic()
        if self._unsaved:
            self._save()
        if self._start_at is not None and now >= self._start_at:
            self._start_at = None
            self._restarts += 1
            self._start()
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._signal_group(signal.SIGKILL)

    # The command --------------------------------------------------------------------------------

    def _start(self) -> None:
        self._started_at = time.time()
        self._started_monotonic = time.monotonic()
        self._tail.clear()
        try:
            if self._options.first_port:
                self._port = self._ports.take()
            self._spawn()
        except OSError as error:
            self._ended(127, f"cannot start {self._options.command[0]!r}: {error}")
            return
        self._phase = "running"
        self._save()

    def _spawn(self) -> None:
        command = [part.replace("{port}", str(self._port)) for part in self._options.command]
        environment = {**os.environ, procfs.TOKEN_VARIABLE: self._token}
        environment.pop(LIFELINE_VARIABLE, None)
        passed: tuple[int, ...] = ()
        if self._options.pass_lifeline:
            environment[LIFELINE_VARIABLE] = str(self._lifeline)
            passed = (self._lifeline,)
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        guard_pid = os.getpid()

        def die_with_the_guard() -> None:
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != guard_pid:  # it died before the line above
                os._exit(127)

        try:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                env=environment,
                start_new_session=True,
                pass_fds=passed,
                preexec_fn=die_with_the_guard,
            )
        except OSError:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self._child_id = procfs.identify(self._child.pid)
        os.set_blocking(read_end, False)
        self._output = read_end
        self._poll.register(read_end, select.POLLIN)

    def _reap(self) -> None:
        """Notice the command's end. Its pid stays ours until the whole group is killed."""
        if self._child is None:
            return
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        if os.waitid(os.P_PID, self._child.pid, flags) is None:
            return
        self._signal_group(signal.SIGKILL)
        code = self._child.wait()
        procfs.kill_all_with_token(self._token)
        while self._output >= 0 and self._capture():
            pass
        self._close_output()
        self._child = None
        self._child_id = None
        last = self._tail[-1].decode("utf-8", "replace").strip()[:500] if self._tail else ""
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        self._ended(code if code >= 0 else 128 - code, f"{how}: {last}" if last else how)

    def _ended(self, code: int, message: str) -> None:
        self._last_exit = {"code": code, "at": time.time(), "message": message}
        if self._phase == "stopping":
            return
        self._exit_code = code
        self._message = message
        if self._port_was_taken():
            self._port_tries += 1
            self._ports.skip()
            self._start()
        elif self._options.restart:
            self._plan_restart()

    def _plan_restart(self) -> None:
        uptime_s = time.monotonic() - self._started_monotonic
        if uptime_s >= self._options.stable_s:
            self._failures = self._port_tries = 0
        self._failures += 1
        pause_s = backoff_s(
            self._failures, self._options.backoff_first_s, self._options.backoff_longest_s
        )
        self._start_at = time.monotonic() + pause_s
        self._phase = "backoff"
        self._save()

    def _port_was_taken(self) -> bool:
        if not self._options.first_port or self._port_tries >= _MAX_PORT_TRIES:
            return False
        return any(b"address already in use" in line.lower() for line in self._tail)

    def _stop(self, grace_s: float) -> None:
        kill_at = time.monotonic() + grace_s
        if self._phase == "stopping":
            if self._kill_at is not None:
                self._kill_at = min(self._kill_at, kill_at)
            return
        self._phase = "stopping"
        self._exit_code = 0
        self._start_at = None
        if self._child is not None:
            self._kill_at = kill_at
            self._signal_group(signal.SIGTERM)
        self._save()

    def _signal_group(self, signum: signal.Signals) -> None:
        # Safe without a start time: the leader is our child and not yet waited for.
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signum)

    # Output and state ---------------------------------------------------------------------------

    def _capture(self) -> bool:
        """Move output to the log; False when there is no more for now or ever."""
        try:
            data = os.read(self._output, 65_536)
        except BlockingIOError:
            return False
        if not data:
            return False
        self._output_log().write(data)
        *lines, self._partial = (self._partial + data[-4096:]).split(b"\n")
        self._partial = self._partial[-4096:]
        self._tail.extend(line for line in lines if line.strip())
        return True

    def _output_log(self) -> RotatingLog:
        if self._log is None:
            from pathlib import Path

            from cloudlm.drivers.rotating import RotatingLog

            given = self._options
            self._log = RotatingLog(
                Path(given.log), max_bytes=given.log_bytes, files=given.log_files
            )
        return self._log

    def _close_output(self) -> None:
        if self._output >= 0:
            self._poll.unregister(self._output)
            os.close(self._output)
            self._output = -1
        if self._partial.strip():
            self._tail.append(self._partial)
            self._output_log().write(b"\n")  # the next start begins its own line
        self._partial = b""

    def _save(self) -> None:
        from pathlib import Path

        from cloudlm.drivers.runfiles import write_json

        guard = procfs.identify(os.getpid())
        body = {
            "format": 1,
            "phase": self._phase,
            "token": self._token,
            "guard": guard.body() if guard else None,
            "child": self._child_id.body() if self._child_id else None,
            "port": self._port,
            "restarts": self._restarts,
            "started_at": self._started_at,
            "last_exit": self._last_exit,
            "message": self._message,
        }
        try:
            write_json(Path(self._options.state), body)
            self._unsaved = False
        except OSError:  # a full disk: the command goes on, the file follows later
            self._unsaved = True


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except BlockingIOError:
        return b""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cloudlm.drivers.guard")
    parser.add_argument("--state", required=True, help="JSON state file to keep")
    parser.add_argument("--log", required=True, help="log file for the output")
    parser.add_argument("--restart", action="store_true", help="start the command anew")
    parser.add_argument("--restarts", type=int, default=0, help="restarts counted so far")
    parser.add_argument("--grace-s", type=float, default=10.0, help="SIGTERM to SIGKILL")
    parser.add_argument("--backoff-first-s", type=float, default=0.5)
    parser.add_argument("--backoff-longest-s", type=float, default=30.0)
    parser.add_argument("--stable-s", type=float, default=60.0, help="running resets the back-off")
    parser.add_argument("--log-bytes", type=int, default=10_000_000)
    parser.add_argument("--log-files", type=int, default=3)
    parser.add_argument("--host", default="127.0.0.1", help="address of the port to choose")
    parser.add_argument("--first-port", type=int, default=0, help="choose a port for {port}")
    parser.add_argument(
        "--pass-lifeline", action="store_true", help="the command starts guards of its own"
    )
    parser.add_argument("command", nargs="+", help="the command, after --")
    return parser


def main(arguments: list[str]) -> int:
    """Run one guard; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        lifeline = int(os.environ.get(LIFELINE_VARIABLE, ""))
        os.set_inheritable(lifeline, False)
    except (ValueError, OSError):
        sys.stderr.write(f"guard: {LIFELINE_VARIABLE} does not name an inherited pipe\n")
        return EXIT_MISUSE
    lock_path = os.path.splitext(options.state)[0] + ".lock"  # noqa: PTH122 - without pathlib
    try:
        lock = lock_file(lock_path)
    except OSError as error:
        sys.stderr.write(f"guard: cannot lock {lock_path}: {error}\n")
        return EXIT_MISUSE
    if lock is None:
        sys.stderr.write(f"guard: {options.state} is guarded already\n")
        return EXIT_ALREADY_GUARDED
    try:
        return Guard(options, lifeline).run()
    finally:
        # Under the lock, and the lock last: nobody sees a state file without its guard.
        for path in (options.state, lock_path):
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
