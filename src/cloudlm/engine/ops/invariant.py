"""Attention whose answer for a token depends on nothing but that token's own sequence.

Ordinary kernels choose how to sum by the shape of what they are given, and so by who else is in
the batch and how a prompt was cut. Here every shape is a function of the token's position alone:
queries are computed in tiles of TILE positions that begin at multiples of TILE, each against all
keys up to the tile's end; what is missing or lies in the future is masked. The idea of fixing
shapes is that of He et al., "Defeating Nondeterminism in LLM Inference", 2025. Knows no scheduling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cloudlm.engine.ops.cache import BlockPool
from cloudlm.engine.ops.softcap import capped_run
from cloudlm.engine.step import Chunk

TILE = 16
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """Some tokens of one chunk in a batch: rows ``begin`` to ``end`` of the batch are positions
    ``start`` and following of the sequence that ``chunk`` belongs to."""

    chunk: Chunk
    begin: int
    end: int
    start: int


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows of the batch, their places in the tile, the slots of the keys that the tile sees and
    which of them each of its positions may see [TILE, keys]."""

    rows: slice
    places: slice
    slots: Tensor
    mask: Tensor


class InvariantAttention:
    """The attention of one batch of fixed size; rows that nobody owns are padding."""

    def __init__(
        self, owned: Sequence[Rows], pool: BlockPool, windows: Iterable[int | None]
    ) -> None:
        self._pool = pool
        self._device = pool.blocks.device
        self._used = owned[-1].end
        own = [
            _slots(rows.chunk, rows.start, rows.start + rows.end - rows.begin, pool.block_size)
            for rows in owned
        ]
        self._slots = self._tensor(np.concatenate(own))
        self._tiles = {
            window: [tile for rows in owned for tile in self._cut(rows, window)]
            for window in windows
        }

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """See ``ops.attention.Attend``."""
        keys, values = (blocks.flatten(0, 1) for blocks in self._pool.layer(layer))
        keys.index_copy_(0, self._slots, key[: self._used].nan_to_num(0.0, 0.0, 0.0))
        values.index_copy_(0, self._slots, value[: self._used].nan_to_num(0.0, 0.0, 0.0))
        answer = torch.zeros_like(query)
        for tile in self._tiles[window]:
            asked = query.new_zeros((TILE, *query.shape[1:]))
            asked[tile.places] = query[tile.rows]
            seen_keys, seen_values = keys[tile.slots], values[tile.slots]
            answer[tile.rows] = _attend(asked, seen_keys, seen_values, tile.mask, scale, softcap)[
                tile.places
            ]
        return answer.flatten(1)

    def _cut(self, rows: Rows, window: int | None) -> Iterable[_Tile]:
        """The tiles that the rows' positions fall into."""
        position, end = rows.start, rows.start + rows.end - rows.begin
        while position < end:
            base = position // TILE * TILE
            last = min(end, base + TILE)
            first = 0 if window is None else max(0, base - window + 1) // TILE * TILE
            slots = _slots(rows.chunk, first, base + TILE, self._pool.block_size)
            of_keys = np.arange(first, base + TILE)[None, :]
            of_queries = np.arange(base, base + TILE)[:, None]
            mask = of_keys <= of_queries
            if window is not None:
                mask &= of_keys > of_queries - window
            row = rows.begin + position - rows.start
            yield _Tile(
                slice(row, row + last - position),
                slice(position - base, last - base),
                self._tensor(slots),
                self._tensor(mask),
            )
            position = last

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    if softcap is not None:
        return capped_run(query, keys, values, mask, scale, softcap)
    answer = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.transpose(0, 1).unsqueeze(0),
        values.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return answer.squeeze(0).transpose(0, 1)


def _slots(chunk: Chunk, start: int, end: int, size: int) -> Indices:
    """Slots in the pool of the positions ``start`` to ``end``. Behind the sequence's own blocks its
    first one stands in: finite, and never seen."""
    at = np.arange(start, end, dtype=np.int64)
    table = np.array(chunk.block_table, dtype=np.int64)
    number = at // size
    blocks = table[np.where(number < len(table), number, 0)]
    return blocks * size + at % size
