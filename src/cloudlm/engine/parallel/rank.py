"""The process of one rank other than the first: does what rank 0 tells it, and nothing else.

    python -m cloudlm.engine.parallel.rank DESCRIPTOR PARENT

DESCRIPTOR is an inherited socket on which orders come; when it closes, the process ends. It also
ends as soon as its parent, the process PARENT, is another one. Signals that stop a worker are
ignored: the worker finishes what runs first, and then closes the socket.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import torch

from cloudlm.core.errors import BrokenModel, CloudlmError, InternalError
from cloudlm.core.settings import LogSettings
from cloudlm.engine.parallel.layout import Layout
from cloudlm.engine.parallel.loading import read_part
from cloudlm.engine.parallel.messages import (
    AddAdapter,
    Copy,
    Done,
    Failed,
    Forward,
    Logits,
    Order,
    RemoveAdapter,
    Reply,
    Sleep,
    Start,
    Wake,
    frame,
    read_order,
)
from cloudlm.engine.parallel.part import PartRunner
from cloudlm.engine.parallel.ranks import DistributedRanks, Ranks
from cloudlm.engine.runner import RunnerFacts
from cloudlm.telemetry.logs import get_logger, setup_logging

logger = get_logger(__name__)
PARENT_INTERVAL_S = 0.2
"""Pause between two looks whether the parent lives, seconds."""


class PeerRunner(PartRunner):
    """A part that is tried out by rank 0."""

    def check(self) -> None:
        """Nothing: rank 0's trial is everybody's."""


class Peer:
    """One rank that obeys. ``run`` returns when the connection is closed."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.runner: PeerRunner | None = None
        self._asleep = False
        self._adapters: set[str] = set()

    def run(self) -> None:
        """Raises what a step raises: then this rank is lost, and rank 0 notices."""
        self._answer(Done())  # PyTorch is here, orders are read
        while (order := read_order(self._connection)) is not None:
            self.obey(order)

    def obey(self, order: Order) -> None:
        """Do what an order says, and answer if it asks for that."""
        if isinstance(order, Forward):
            self._here().hidden(tuple(piece.chunk() for piece in order.pieces))
        elif isinstance(order, Logits):
            self._here().peer_logits(order.rows)
        elif isinstance(order, Copy):
            self._here().copy_blocks(order.pairs)
        elif isinstance(order, RemoveAdapter):
            if order.key in self._adapters:
                self._adapters.remove(order.key)
                self._here().remove_adapter(order.key)
        else:
            self._answer(self._attempt(order))

    def _attempt(self, order: Start | AddAdapter | Sleep | Wake) -> Reply:
        try:
            if isinstance(order, Start):
                self.runner = start_runner(order)
            elif isinstance(order, AddAdapter):
                self._here().add_adapter(order.key, self._here().read_adapter(Path(order.folder)))
                self._adapters.add(order.key)
            elif isinstance(order, Sleep) and not self._asleep:
                self._here().sleep(order.level)
                self._asleep = True
            elif isinstance(order, Wake) and self._asleep:
                self._here().wake()
                self._asleep = False
        except CloudlmError as error:
            return Failed.of(error)
        except Exception as error:
            logger.exception("rank_failed")
            return Failed.of(InternalError(f"a rank failed: {type(error).__name__}"))
        return Done()

    def _here(self) -> PeerRunner:
        if self.runner is None:
            raise InternalError("a rank was given work before its model")
        return self.runner

    def _answer(self, reply: Reply) -> None:
        self._connection.sendall(frame(reply))


def start_runner(start: Start) -> PeerRunner:
    """Find the other ranks and load this one's part. Raises BrokenModel and its kinds, BadSetting,
    InternalError."""
    place = Layout(start.tensor, start.pipeline).at(start.rank)
    device = torch.device(start.device)
    dtype = getattr(torch, start.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise BrokenModel(f"{start.dtype[:40]!r} is no type of weights")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(start.threads)
    ranks: Ranks = DistributedRanks(place, device, Path(start.store))
    facts = RunnerFacts("", start.max_model_len, start.num_blocks, start.block_size)
    part = read_part(Path(start.folder), ranks, dtype, device, start.max_model_len)
    return PeerRunner(part.model, facts, part.source, part.split, ranks, part.whole_sites)


def end_with_the_parent(parent: int) -> None:
    """From a thread: end this process, whatever it waits for, once its parent is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_INTERVAL_S)
        os._exit(1)

    threading.Thread(target=watch, name="cloudlm-parent", daemon=True).start()


def main(arguments: list[str]) -> int:
    """Returns 0 when rank 0 has closed the connection, 1 when a step failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    setup_logging(LogSettings(), "rank")
    end_with_the_parent(int(arguments[1]))
    connection = socket.socket(fileno=int(arguments[0]))
    try:
        Peer(connection).run()
    except Exception as error:  # the connection's end, too, if it came in the middle of a step
        logger.error("rank_ended", extra={"fields": {"error": str(error)[:300]}})
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # what PyTorch still waits for must not hold the process up
