"""How ranks exchange tensors during a step: a port, and its form over ``torch.distributed``."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cloudlm.core.errors import InternalError
from cloudlm.engine.parallel.layout import Place

EXCHANGE_TIMEOUT_S = 60.0
"""Longest wait for another rank's part of a step, seconds. A rank that died is noticed at once."""


class Ranks(Protocol):
    """The other ranks as one sees them. All ranks of a stage make the same calls in one order."""

    place: Place

    def add(self, x: Tensor) -> Tensor:
        """The sum of what all ranks of this stage give, on all of them; may be in ``x``."""
        ...

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """What all ranks of this stage give, on its first one; None on the others."""
        ...

    def spread(self, x: Tensor) -> Tensor:
        """The ``x`` of this stage's first rank, on all of its ranks; may be in ``x``."""
        ...

    def send(self, x: Tensor) -> None:
        """Hand ``x`` to the next stage without waiting until it is there."""
        ...

    def receive(self, like: Tensor) -> Tensor:
        """What the stage before sent, in the order of sending; of the form of ``like``."""
        ...

    def close(self) -> None: ...


class DistributedRanks:
    """Ranks in processes of their own: gloo on CPUs, NCCL on GPUs.

    ``store`` is a file that all ranks can open, not yet there, for finding each other once. On one
    machine: gloo listens on loopback only. Raises InternalError if the ranks do not find each
    other; a call during which another rank ends raises RuntimeError.
    """

    def __init__(self, place: Place, device: torch.device, store: Path) -> None:
        self.place = place
        self._group: dist.ProcessGroup | None = None
        self._sending: list[tuple[Any, Tensor]] = []
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
        layout, timeout = place.layout, timedelta(seconds=EXCHANGE_TIMEOUT_S)
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.FileStore(  # type: ignore[attr-defined]
                    str(store), layout.ranks
                ),
                rank=place.rank,
                world_size=layout.ranks,
                timeout=timeout,
            )
            for stage in range(layout.pipeline):
                # Every rank must take part in the making of every group.
                there = layout.at(stage * layout.tensor)
                group = dist.new_group(there.stage_ranks, timeout=timeout)
                if stage == place.stage:
                    self._group = group
        except (RuntimeError, ValueError) as error:
            raise InternalError(
                f"the ranks of the model did not find each other: {error}"
            ) from error

    def add(self, x: Tensor) -> Tensor:
        """See ``Ranks``."""
        dist.all_reduce(x, group=self._group)
        return x

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """See ``Ranks``."""
        first = self.place.stage_ranks[0]
        if self.place.rank != first:
            dist.gather(x, dst=first, group=self._group)
            return None
        parts = [torch.empty_like(x) for _ in self.place.stage_ranks]
        dist.gather(x, parts, dst=first, group=self._group)
        return parts

    def spread(self, x: Tensor) -> Tensor:
        """See ``Ranks``."""
        x = x.contiguous()
        dist.broadcast(x, self.place.stage_ranks[0], group=self._group)
        return x

    def send(self, x: Tensor) -> None:
        """See ``Ranks``."""
        x = x.contiguous()
        self._sending = [(work, kept) for work, kept in self._sending if not work.is_completed()]
        self._sending.append((dist.isend(x, self.place.next_rank), x))

    def receive(self, like: Tensor) -> Tensor:
        """See ``Ranks``."""
        x = torch.empty_like(like)
        dist.recv(x, self.place.previous_rank)
        return x

    def close(self) -> None:
        """Let go of the connections; this process may join other ranks afterwards."""
        self._sending.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), "lo")
