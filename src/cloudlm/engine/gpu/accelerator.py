"""The device that a GPU path runs on: what it can do beyond tensors, behind a seam for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Replay = Callable[[], None]


class Accelerator(Protocol):
    """``multiprocessors``: how many programs of a kernel it runs side by side, about."""

    device: torch.device
    multiprocessors: int

    def capture(self, work: Callable[[], None]) -> Replay | None:
        """Run ``work`` and record it: the answer does the same again on the same memory, whatever
        lies there by then. None where nothing can be recorded. ``work`` must not wait for the
        device, nor let data decide what it does."""
        ...


class CudaAccelerator:
    """One GPU. All graphs share one memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, work: Callable[[], None]) -> Replay | None:
        """See ``Accelerator``. Runs ``work`` twice before it is recorded: kernels are compiled and
        libraries make their workspaces then, which must not happen while recording."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
            work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile (an adapter that is loaded).
        with torch.cuda.graph(
            graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
        ):
            work()
        replay: Replay = graph.replay
        return replay


class HostAccelerator:
    """The CPU in a GPU's place, for trying the path out where there is none."""

    device = torch.device("cpu")
    multiprocessors = 1

    def capture(self, work: Callable[[], None]) -> Replay | None:
        """See ``Accelerator``."""
        return None
