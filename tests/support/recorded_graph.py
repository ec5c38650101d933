"""A twin of CUDA graphs on the CPU: records the operations of a run, and repeats them on the same
memory. Like the real ones it repeats no line of Python, so that what the host decided while
recording stays decided; and it refuses to record what would wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "lift_fresh")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device, which a graph cannot record"
        answer = func(*args, **kwargs)
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        made = [leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)]
        fresh = [one.untyped_storage().data_ptr() not in given for one in made]

        def again() -> None:
            repeated = [
                leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)
            ]
            for old, new, own in zip(made, repeated, fresh, strict=True):
                if own and old.numel():
                    old.copy_(new)

        mutates = func._schema.is_mutable
        if mutates or any(fresh):
            self.steps.append(again)
        return answer


class RecordingAccelerator:
    """An ``engine.gpu.accelerator.Accelerator`` on the CPU. ``replays`` counts repeats."""

    device = torch.device("cpu")
    multiprocessors = 4

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        with _Recorder() as recorder:
            work()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            for step in recorder.steps:
                step()

        return replay
