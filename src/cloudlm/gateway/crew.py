"""Several gateway processes on one port, and the parent that keeps them.

All of them accept from one listening socket, which the parent opened: a client that waits to be
accepted waits for whichever process is free, and none is lost with a process that dies. The first
process is started alone, so that a bad setting is told once and tables are made once. The parent
starts a dead one again, passes signals on, and keeps what must be kept together (``desk``). It
answers no requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NamedTuple

from cloudlm.core.clock import Clock
from cloudlm.gateway.channel import attend
from cloudlm.gateway.desk import Desk
from cloudlm.telemetry.logs import get_logger

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0
STABLE_S = 10.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_log = get_logger(__name__)


class Seat(NamedTuple):
    """What a process is born with: its number, the listening socket and its end of a channel."""

    number: int
    listener: int
    channel: int

    @property
    def arguments(self) -> list[str]:
        """The command line that says so."""
        return ["--seat", ",".join(map(str, self))]

    @classmethod
    def read(cls, text: str) -> Seat:
        """Out of the command line. Raises ValueError."""
        number, listener, channel = map(int, text.split(","))
        return cls(number, listener, channel)


def pause_s(failures: int) -> float:
    """The pause before a process is started after so many short lives in a row."""
    return float(min(FIRST_PAUSE_S * 2 ** min(max(failures - 1, 0), 20), LONGEST_PAUSE_S))


class Crew:
    """``size`` processes that run ``command``, each with a seat, over the socket ``bound``."""

    def __init__(
        self, size: int, bound: socket.socket, desk: Desk, clock: Clock, command: Sequence[str] = ()
    ) -> None:
        self._size = size
        self._bound = bound
        self._desk = desk
        self._clock = clock
        self._command = tuple(command) or (sys.executable, "-m", "cloudlm.gateway")
        self._running: dict[int, asyncio.subprocess.Process] = {}
        self._ready: set[int] = set()
        self._stopping = asyncio.Event()
        self._first_ready = asyncio.Event()
        desk.on_ready = self._on_ready

    async def run(self) -> int:
        """Keep the processes until a signal comes, and wait for their ends; the exit code."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        try:
            keepers = [asyncio.create_task(self._keep(0))]
            first = asyncio.create_task(self._first_ready.wait())
            await asyncio.wait({first, *keepers}, return_when=asyncio.FIRST_COMPLETED)
            first.cancel()
            if self._ready and not self._stopping.is_set():
                keepers += [asyncio.create_task(self._keep(n)) for n in range(1, self._size)]
            codes = await asyncio.gather(*keepers)
            return 0 if self._stopping.is_set() else codes[0]
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        """Pass it on; a second one makes the processes end at once. Nobody is to wait for being
        accepted any more: our end of the listening socket goes too."""
        self._stopping.set()
        self._bound.close()
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()

    def _on_ready(self, number: int) -> None:
        self._ready.add(number)
        self._first_ready.set()

    async def _keep(self, number: int) -> int:
        """Run one process, again and again; its last exit code."""
        failures = 0
        while True:
            began = self._clock.monotonic()
            code = await self._life(number)
            if self._stopping.is_set() or not self._first_ready.is_set():
                return code
            failures = 1 if self._clock.monotonic() - began >= STABLE_S else failures + 1
            fields = {"worker": number, "exit_code": code, "pause_s": pause_s(failures)}
            _log.error("gateway_process_ended", extra={"fields": fields})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s(failures))
            if self._stopping.is_set():
                return code

    async def _life(self, number: int) -> int:
        """One process from start to end; its exit code."""
        if self._stopping.is_set():
            return 0
        ours, theirs = socket.socketpair()
        listener = self._bound.fileno()
        seat = Seat(number, listener, theirs.fileno())
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                *seat.arguments,
                pass_fds=(listener, theirs.fileno()),
                process_group=0,  # a terminal's Ctrl-C comes through us, once
                env=dict(os.environ),
            )
        self._running[number] = process
        if self._stopping.is_set():  # the signal came while it was being started
            process.terminate()
        attending = asyncio.create_task(
            attend(
                ours,
                lambda what, data: self._desk.hear(number, what, data),
                lambda tell: self._desk.seated(number, tell),
            )
        )
        try:
            return await process.wait()
        finally:
            attending.cancel()
            await asyncio.gather(attending, return_exceptions=True)
            self._running.pop(number, None)
            self._ready.discard(number)
            self._desk.gone(number)
