"""vLLM's server as a child process that cannot outlive the worker.

It has a process group of its own: a signal to the worker's group asks the worker to finish what
runs, and vLLM must serve until then. If the worker is killed, the kernel kills the child. Its
output goes on to standard error; the last words that tell of an error are remembered.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence

_PR_SET_PDEATHSIG = 1
STOP_TIMEOUT_S = 5.0
_LINE_BYTES = 1 << 20
_FAULT = re.compile(r"\b(\w*(?:Error|Exception|Interrupt)): (.+)")
_VAGUE = ("see root cause", "failed core proc", "engine core initialization failed")


class Child:
    """One run of a command. ``start`` once, then ``stop`` once."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._process: asyncio.subprocess.Process | None = None
        self._pump: asyncio.Task[None] | None = None
        self._faults: deque[str] = deque(maxlen=32)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def last_words(self) -> str:
        """Why it ended, as far as its output tells: ``exit code 1: ValueError: …``."""
        code = None if self._process is None else self._process.returncode
        how = "not started" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            how = f"killed by {signal.Signals(-code).name}"
        telling = [one for one in self._faults if not one.lower().endswith(_VAGUE)]
        telling = [one for one in telling if not any(word in one.lower() for word in _VAGUE)]
        return f"{how}: {telling[-1]}" if telling else how

    async def start(self) -> None:
        """Raises OSError if the program cannot be started."""
        libc = ctypes.CDLL(None)
        parent = os.getpid()

        def die_with_the_worker() -> None:
            os.setpgid(0, 0)
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it died before the line above
                os._exit(127)

        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._environment,
            preexec_fn=die_with_the_worker,
            limit=_LINE_BYTES,
        )
        self._pump = asyncio.create_task(self._pass_on(self._process))

    async def wait(self) -> int:
        """The exit code, once it has ended and its output is read."""
        assert self._process is not None and self._pump is not None
        await asyncio.wait({self._pump}, timeout=STOP_TIMEOUT_S if not self.alive else None)
        return await self._process.wait()

    async def stop(self) -> None:
        """SIGTERM to its group, after STOP_TIMEOUT_S SIGKILL; returns when it is gone."""
        if self._process is None or self._pump is None:
            return
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            pass
        self._signal(signal.SIGKILL)  # its own children, which may not have heard
        await self._process.wait()
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)

    def _signal(self, signum: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signum)

    async def _pass_on(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # a line without end: what is read of it is dropped
                continue
            if not line:
                return
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
            found = _FAULT.search(line.decode("utf-8", "replace"))
            if found is not None:
                self._faults.append(f"{found[1]}: {found[2].strip()[:300]}")
