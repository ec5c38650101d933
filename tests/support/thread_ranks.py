"""Ranks of a model in threads of one process: the port of ``engine.parallel.ranks`` in memory, and
a team that obeys orders as the processes do."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloudlm.core.errors import CloudlmError
from cloudlm.engine.load import build_network
from cloudlm.engine.parallel.layout import Layout, Place
from cloudlm.engine.parallel.leader import LeaderRunner
from cloudlm.engine.parallel.loading import read_part
from cloudlm.engine.parallel.messages import Failed, Order, frame, read_reply
from cloudlm.engine.parallel.rank import Peer, PeerRunner
from cloudlm.engine.runner import RunnerFacts

WAIT_S = 60.0


class ThreadRanks:
    """One rank's view. ``stages`` and ``boxes`` are shared by all ranks of a model."""

    def __init__(self, place: Place, stages: list[Meeting], boxes: list[queue.Queue[Any]]) -> None:
        self.place = place
        self._meeting = stages[place.stage]
        self._boxes = boxes
        self.sums = 0

    def add(self, x: Tensor) -> Tensor:
        self.sums += 1
        parts = self._meeting.exchange(self.place.shard, x)
        return torch.stack(parts).sum(0)

    def gather(self, x: Tensor) -> list[Tensor] | None:
        parts = self._meeting.exchange(self.place.shard, x)
        return None if self.place.shard else parts

    def spread(self, x: Tensor) -> Tensor:
        return self._meeting.exchange(self.place.shard, x)[0]

    def send(self, x: Tensor) -> None:
        self._boxes[self.place.next_rank].put(x.clone())

    def receive(self, like: Tensor) -> Tensor:
        x: Tensor = self._boxes[self.place.rank].get(timeout=WAIT_S)
        assert x.shape == like.shape and x.dtype == like.dtype
        return x

    def close(self) -> None: ...


class Meeting:
    """Where the ranks of one stage exchange tensors."""

    def __init__(self, size: int) -> None:
        self._slots: list[Tensor] = [torch.empty(0)] * size
        self._barrier = threading.Barrier(size, timeout=WAIT_S)

    def exchange(self, shard: int, x: Tensor) -> list[Tensor]:
        self._slots[shard] = x.clone()
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()  # nobody writes before all have read
        assert len({part.shape for part in found}) == 1
        return found


class ThreadTeam:
    """The other ranks, each a ``Peer`` in a thread; what it raises is kept in ``faults``."""

    lost = None

    def __init__(self, ranks: int) -> None:
        self.faults: list[BaseException] = []
        self.peers: dict[int, Peer] = {}
        self._connections: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        for rank in range(1, ranks):
            ours, theirs = socket.socketpair()
            ours.settimeout(WAIT_S)
            self._connections[rank] = ours
            self.peers[rank] = Peer(theirs)
            self._threads.append(threading.Thread(target=self._run, args=(rank, theirs)))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        assert self.collect() is None  # each says that it is there

    def _run(self, rank: int, connection: socket.socket) -> None:
        try:
            self.peers[rank].run()
        except BaseException as error:
            self.faults.append(error)
        finally:
            connection.close()

    def wait_lost(self, timeout_s: float) -> None: ...

    def when_lost(self, call: Any) -> None: ...

    def tell(self, order: Order, ranks: Iterable[int] | None = None) -> None:
        for rank in self._connections if ranks is None else ranks:
            self._connections[rank].sendall(frame(order))

    def collect(self) -> CloudlmError | None:
        replies = [read_reply(connection) for connection in self._connections.values()]
        assert all(replies)
        faults = [reply.error() for reply in replies if isinstance(reply, Failed)]
        return faults[0] if faults else None

    def ask(self, order: Order) -> None:
        self.tell(order)
        fault = self.collect()
        if fault is not None:
            raise fault

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        for thread in self._threads:
            thread.join(WAIT_S)
        assert not self.faults, self.faults


def thread_runner(
    folder: Path, tensor: int, pipeline: int = 1, *, max_model_len: int = 256, blocks: int = 400
) -> LeaderRunner:
    """A model of ``folder`` over threads, float32, blocks of 4 tokens."""
    layout = Layout(tensor, pipeline)
    stages = [Meeting(tensor) for _ in range(pipeline)]
    boxes: list[queue.Queue[Any]] = [queue.Queue() for _ in range(layout.ranks)]
    facts = RunnerFacts("test", max_model_len, blocks, 4)
    team = ThreadTeam(layout.ranks)
    cpu = torch.device("cpu")
    for rank in range(layout.ranks - 1, -1, -1):
        ranks = ThreadRanks(layout.at(rank), stages, boxes)
        part = read_part(folder, ranks, torch.float32, cpu, max_model_len)
        if rank:
            peer = PeerRunner(part.model, facts, part.source, part.split, ranks, part.whole_sites)
            team.peers[rank].runner = peer
    team.start()
    parameters = sum(one.numel() for one in build_network(folder)[2].parameters())
    return LeaderRunner(
        part.model,
        facts,
        part.source,
        part.split,
        ranks,
        part.whole_sites,
        team,  # type: ignore[arg-type]
        parameters,
    )
