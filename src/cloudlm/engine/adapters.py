"""Adds LoRA adapters to what a network's modules answer for some rows of a batch.

The rows that ask for an adapter get its sum, all others stay untouched; so adapters and the base
share one pass. Nothing is hooked while no adapter is loaded. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cloudlm.engine.adapter_files import Adapter
from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.step import Chunk

Rows = slice | Tensor


class Adapting(Protocol):
    """Whoever computes a network with adapters. Used by the thread that runs the network."""

    def add(self, key: str, adapter: Adapter) -> None:
        """From the next step on chunks may name ``key``."""
        ...

    def remove(self, key: str) -> None:
        """Forget an adapter; no chunk may name it any more."""
        ...


def rows_by_adapter(chunks: Sequence[Chunk], device: torch.device) -> list[tuple[str, Rows]]:
    """Each adapter that is asked for with its rows of the batch: a slice if they lie behind each
    other, their numbers int64 otherwise."""
    found: dict[str, list[range]] = {}
    end = 0
    for chunk in chunks:
        begin, end = end, end + len(chunk.token_ids)
        if not chunk.adapter:
            continue
        spans = found.setdefault(chunk.adapter, [])
        if spans and spans[-1].stop == begin:
            spans[-1] = range(spans[-1].start, end)
        else:
            spans.append(range(begin, end))
    return [(key, _rows(spans, device)) for key, spans in found.items()]


def _rows(spans: list[range], device: torch.device) -> Rows:
    if len(spans) == 1:
        return slice(spans[0].start, spans[0].stop)
    places = [row for span in spans for row in span]
    return torch.tensor(places, dtype=torch.int64, device=device)


class Adapters:
    """``Adapting`` by hooks on the network's own modules."""

    def __init__(self, model: Decoder) -> None:
        self._adapters: dict[str, Adapter] = {}
        self._modules = dict(model.named_modules())
        self._hooks: dict[str, RemovableHandle] = {}
        self._active: list[tuple[Adapter, Rows]] = []

    def add(self, key: str, adapter: Adapter) -> None:
        """See ``Adapting``."""
        self._adapters[key] = adapter
        for path in adapter.pairs:
            if path not in self._hooks:
                module = self._modules[path]
                self._hooks[path] = module.register_forward_hook(self._sum_for(path))

    def remove(self, key: str) -> None:
        """See ``Adapting``."""
        del self._adapters[key]
        wanted = {path for adapter in self._adapters.values() for path in adapter.pairs}
        for path in self._hooks.keys() - wanted:
            self._hooks.pop(path).remove()

    @contextmanager
    def applied(self, chunks: Sequence[Chunk], device: torch.device) -> Iterator[None]:
        """While the network computes ``chunks``, one behind the other."""
        self._active = [
            (self._adapters[key], rows) for key, rows in rows_by_adapter(chunks, device)
        ]
        try:
            yield
        finally:
            self._active = []

    def _sum_for(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for adapter, rows in self._active:
                pair = adapter.pairs.get(path)
                if pair is None:
                    continue
                share = (inputs[0][rows] @ pair.down.T) @ pair.up.T
                if isinstance(rows, slice):
                    output[rows] += share
                else:
                    output.index_add_(0, rows, share)

        return add
