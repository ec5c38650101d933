"""The other ranks as processes of rank 0: started, told, asked, watched and ended.

A rank that ends by itself is the end of the whole engine, and loud: it is logged, whoever asked is
told, and if the engine does not stop within LOST_TIMEOUT_S (it hangs in an exchange with the lost
rank), this process ends. Ranks end by themselves when this process does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from cloudlm.core.errors import CloudlmError, InternalError
from cloudlm.engine.parallel.messages import Failed, Order, frame, read_reply
from cloudlm.engine.scratch import Scratch

_logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.2
"""Pause between two looks at the ranks' processes, seconds."""
LOST_TIMEOUT_S = 5.0
"""Longest time from the loss of a rank to the end of the engine, seconds."""
CLOSE_TIMEOUT_S = 2.0
"""Longest time that ranks get to end when asked to, seconds; then they are killed."""
EXIT_RANK_LOST = 1
_SECRETS = ("CLOUDLM_WORKER_TOKEN",)


class Team:
    """Processes for ranks 1 to ``ranks - 1``. Orders and questions are for one thread at a time.

    ``store`` is where the ranks may put the file by which they find each other. ``end_process`` is
    called when a lost rank makes this process hang.
    """

    def __init__(
        self,
        ranks: int,
        command: tuple[str, ...] = (sys.executable, "-m", "cloudlm.engine.parallel.rank"),
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        self._end_process = end_process
        self._scratch = Scratch("cloudlm-ranks-")
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._connections: dict[int, socket.socket] = {}
        self._closed = threading.Event()
        self._lost_one = threading.Event()
        self._lock = threading.Lock()  # guards what is below
        self._lost: str | None = None
        self._on_lost: Callable[[str], None] | None = None
        try:
            for rank in range(1, ranks):
                self._start(rank, command)
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._watch, name="cloudlm-ranks", daemon=True).start()

    @property
    def store(self) -> Path:
        return self._scratch.path / "store"

    @property
    def pids(self) -> dict[int, int]:
        """The ranks' process ids."""
        return {rank: child.pid for rank, child in self._children.items()}

    @property
    def lost(self) -> str | None:
        """Which rank was lost and how, None if none was."""
        with self._lock:
            return self._lost

    def wait_lost(self, timeout_s: float) -> str | None:
        """``lost``, but waits for it: an exchange can fail before its cause is noticed."""
        self._lost_one.wait(timeout_s)
        return self.lost

    def when_lost(self, call: Callable[[str], None]) -> None:
        """Have ``call`` told, once, from a thread of its own, that a rank was lost and which."""
        with self._lock:
            self._on_lost, lost = call, self._lost
        if lost is not None:
            call(lost)

    def tell(self, order: Order, ranks: Iterable[int] | None = None) -> None:
        """Send an order to all other ranks, or to those. Raises InternalError if one is lost."""
        data = frame(order)
        for rank in self._connections if ranks is None else ranks:
            try:
                self._connections[rank].sendall(data)
            except OSError as error:
                raise self._gone(rank) from error

    def tell_one(self, rank: int, order: Order) -> None:
        """Send an order to one rank. Raises InternalError if it is lost."""
        self.tell(order, (rank,))

    def collect(self) -> CloudlmError | None:
        """Wait until every rank has answered; the first that failed says why. Raises InternalError
        if one is lost."""
        fault: CloudlmError | None = None
        for rank, connection in self._connections.items():
            try:
                reply = read_reply(connection)
            except OSError as error:
                raise self._gone(rank) from error
            if reply is None:
                raise self._gone(rank)
            if isinstance(reply, Failed) and fault is None:
                fault = reply.error()
        return fault

    def ask(self, order: Order) -> None:
        """Tell all and wait for them. Raises the first fault, InternalError if a rank is lost."""
        self.tell(order)
        fault = self.collect()
        if fault is not None:
            raise fault

    def close(self) -> None:
        """End all ranks; returns when none is left. May be called again."""
        self._closed.set()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for child in self._children.values():
            try:
                child.wait(CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._scratch.close()

    def _start(self, rank: int, command: tuple[str, ...]) -> None:
        ours, theirs = socket.socketpair()
        self._connections[rank] = ours
        environment = {name: text for name, text in os.environ.items() if name not in _SECRETS}
        with theirs:
            self._children[rank] = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=(theirs.fileno(),),
            )

    def _gone(self, rank: int) -> InternalError:
        return InternalError(f"rank {rank} of the model has ended; this replica must be restarted")

    def _watch(self) -> None:
        while not self._closed.wait(WATCH_INTERVAL_S):
            for rank, child in self._children.items():
                code = child.poll()
                if code is not None and not self._closed.is_set():
                    self._lose(rank, code)
                    return

    def _lose(self, rank: int, code: int) -> None:
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        message = f"rank {rank} of the model has ended ({how})"
        _logger.error("rank_lost", extra={"fields": {"rank": rank, "how": how}})
        with self._lock:
            self._lost, call = message, self._on_lost
        self._lost_one.set()
        if call is not None:
            call(message)
        if not self._closed.wait(LOST_TIMEOUT_S):
            sys.stderr.write(f"cloudlm worker: {message}; the engine did not stop\n")
            sys.stderr.flush()
            self._end_process(EXIT_RANK_LOST)
