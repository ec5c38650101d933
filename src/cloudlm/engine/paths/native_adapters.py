"""LoRA adapters on the kernels of ``engine.native``: low-rank products beside the base's own.

The base's product is computed for all rows as ever, then each adapter's share is added to its rows
alone: others get what they would get without it, to the bit. What adapters add to the parts of a
fused matrix (queries, keys and values; gates and ups) is one pair of products, too. Reads no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cloudlm.engine.adapter_files import Adapter, Pair
from cloudlm.engine.adapters import Rows, rows_by_adapter
from cloudlm.engine.native.contract import Kernels, Packed, Path, StackLayer
from cloudlm.engine.step import Chunk


@dataclass(frozen=True, slots=True)
class Place:
    """Where a projection is: in a layer's matrix (a field of StackLayer), from which row on."""

    layer: int
    matrix: str
    first: int


@dataclass(frozen=True, slots=True)
class _Share:
    """What one adapter adds to one matrix: ``up(down(x))``."""

    down: Packed
    up: Packed


_Shares = Mapping[tuple[int, str], _Share]


class NativeAdapters:
    """``adapters.Adapting`` for a stack of ``layers``. ``places`` are those of the network's
    projections; ``way`` is the path of bfloat16 products."""

    def __init__(
        self, kernels: Kernels, layers: Sequence[StackLayer], places: Mapping[str, Place], way: Path
    ) -> None:
        self._kernels = kernels
        self._layers = layers
        self._places = places
        self._way = way
        self._adapters: dict[str, _Shares] = {}
        self._ungated = [kernels.ungated(layer.gate_up) for layer in layers]

    def add(self, key: str, adapter: Adapter) -> None:
        """See ``Adapting``."""
        fused: dict[tuple[int, str], list[tuple[int, Pair]]] = {}
        for path, pair in adapter.pairs.items():
            place = self._places[path]
            fused.setdefault((place.layer, place.matrix), []).append((place.first, pair))
        self._adapters[key] = {
            (layer, matrix): self._share(layer, matrix, parts)
            for (layer, matrix), parts in fused.items()
        }

    def remove(self, key: str) -> None:
        """See ``Adapting``."""
        del self._adapters[key]

    def additions(self, chunks: Sequence[Chunk], eps: float) -> AdapterAdditions | None:
        """What is added in a step of ``chunks``, None if nothing is. ``eps`` is the norms'."""
        rows = rows_by_adapter(chunks, torch.device("cpu"))
        if not rows:
            return None
        active = [(self._adapters[key], places) for key, places in rows]
        ungated = [weight for weight, _ in self._ungated]
        return AdapterAdditions(self._kernels, ungated, active, eps, self._way)

    @torch.inference_mode()
    def _share(self, layer: int, matrix: str, parts: Sequence[tuple[int, Pair]]) -> _Share:
        """Parts of a fused matrix, from their first rows on: downs below each other, ups each in
        its own rows and columns."""
        weight: Packed = getattr(self._layers[layer], matrix)
        down = torch.cat([pair.down for _, pair in parts])
        up = down.new_zeros((1 + weight.gated) * weight.outputs, len(down))
        rank = 0
        for first, pair in parts:
            outputs, own = pair.up.shape
            up[first : first + outputs, rank : rank + own] = pair.up
            rank += own
        if weight.gated:
            order = self._ungated[layer][1]
            up = torch.where(order[:, None] >= 0, up[order], 0.0)
        pack = self._kernels.pack
        return _Share(pack(down.bfloat16().contiguous()), pack(up.bfloat16().contiguous()))


class AdapterAdditions:
    """``contract.Additions`` of one step: adapters with their rows."""

    def __init__(
        self,
        kernels: Kernels,
        ungated: Sequence[Packed],
        active: Sequence[tuple[_Shares, Rows]],
        eps: float,
        way: Path,
    ) -> None:
        self._kernels = kernels
        self._ungated = ungated
        self._active = active
        self._eps = eps
        self._way = way

    def ungated(self, layer: int) -> Packed | None:
        """See ``Additions``."""
        if not any((layer, "gate_up") in shares for shares, _ in self._active):
            return None
        return self._ungated[layer]

    def add(
        self, layer: int, matrix: str, x: Tensor, out: Tensor, norm: Tensor | None = None
    ) -> None:
        """See ``Additions``."""
        linear, way = self._kernels.linear, self._way
        for shares, rows in self._active:
            share = shares.get((layer, matrix))
            if share is None:
                continue
            part = x[rows]
            middle = torch.empty(len(part), share.down.outputs)
            linear(share.down, part, middle, norm=norm, eps=self._eps, path=way)
            if isinstance(rows, slice) and out.dtype == torch.float32:
                linear(share.up, middle, out[rows], add=True, path=way)
                continue
            sums = torch.empty(len(part), share.up.outputs)
            linear(share.up, middle, sums, path=way)
            if out.dtype == torch.float32 and not isinstance(rows, slice):
                out.index_add_(0, rows, sums)
            else:
                out[rows] = (out[rows].float() + sums).to(out.dtype)
