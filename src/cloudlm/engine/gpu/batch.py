"""One step's batch on a GPU: where its tokens lie, and the attention over them.

The plan is made on the host as one array of int32, which is sent in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cloudlm.engine.gpu.contract import TILE, Decoding, Heads, Look, Operations, Prefilling
from cloudlm.engine.ops.attention import token_places
from cloudlm.engine.ops.cache import BlockPool
from cloudlm.engine.ops.transfer import to_device
from cloudlm.engine.step import Chunk

Ints = NDArray[np.int32]
ALIGNED = 4
"""Numbers of int32 in the 16 bytes that kernels expect pointers to be multiples of."""


class PagedBatch:
    """The attention of one step; an ``ops.attention.Attend``. ``slots`` [tokens] are where keys and
    values are stored; every row belongs to either plan."""

    def __init__(
        self,
        operations: Operations,
        pool: BlockPool,
        slots: Tensor,
        decoding: Decoding | None,
        prefilling: Prefilling | None,
    ) -> None:
        self._operations = operations
        self._pool = pool
        self._slots = slots
        self._decoding = decoding
        self._prefilling = prefilling

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
        """See ``Attend``."""
        cache = self._pool.layer(layer)
        self._operations.store(key, value, self._slots, cache)
        return self._attended(query, cache, Look(scale, window, softcap))

    def rotated(
        self, layer: int, fused: Tensor, heads: Heads, turn: tuple[Tensor, Tensor], look: Look
    ) -> Tensor:
        """The same from ``fused`` queries, keys and values that are not normed nor rotated yet;
        see ``Operations.rotate_and_store``."""
        cache = self._pool.layer(layer)
        query = self._operations.rotate_and_store(fused, heads, turn, self._slots, cache)
        return self._attended(query, cache, look)

    def _attended(self, query: Tensor, cache: tuple[Tensor, Tensor], look: Look) -> Tensor:
        answer = torch.empty_like(query, memory_format=torch.contiguous_format)
        if self._prefilling is not None:
            self._operations.prefill(query, cache, self._prefilling, look, answer)
        if self._decoding is not None:
            self._operations.decode(query, cache, self._decoding, look, answer)
        return answer.flatten(1)


def plan_batch(
    chunks: Sequence[Chunk], pool: BlockPool, operations: Operations, longest: int
) -> tuple[Tensor, Tensor, PagedBatch]:
    """Token ids [tokens], their positions [tokens] and the attention of any step, on the device.
    ``longest`` is the most tokens that any sequence ever has."""
    positions, slots = token_places(chunks, pool.block_size)
    token_ids = np.fromiter(
        (token_id for chunk in chunks for token_id in chunk.token_ids), np.int32, len(positions)
    )
    begins = np.cumsum([0] + [len(chunk.token_ids) for chunk in chunks])
    placed = list(zip(begins.tolist(), chunks, strict=False))
    singles = [(row, chunk) for row, chunk in placed if len(chunk.token_ids) == 1]
    runs = [(row, chunk) for row, chunk in placed if len(chunk.token_ids) > 1]
    sent = _send(
        [token_ids, positions, slots, *_single_arrays(singles), *_run_arrays(runs)],
        pool.blocks.device,
    )
    decoding = Decoding(sent[3], sent[4], sent[5], longest) if singles else None
    prefilling = Prefilling(*sent[6:]) if runs else None
    return sent[0], sent[1], PagedBatch(operations, pool, sent[2], decoding, prefilling)


def _single_arrays(singles: list[tuple[int, Chunk]]) -> list[Ints]:
    """Rows, tables and lengths of ``Decoding``."""
    return [
        np.array([row for row, _ in singles], dtype=np.int32),
        _tables([chunk for _, chunk in singles]),
        np.array([chunk.start + 1 for _, chunk in singles], dtype=np.int32),
    ]


def _run_arrays(runs: list[tuple[int, Chunk]]) -> list[Ints]:
    """Tiles, begins, counts, starts and tables of ``Prefilling``."""
    tiles = [
        (number, first)
        for number, (_, chunk) in enumerate(runs)
        for first in range(0, len(chunk.token_ids), TILE)
    ]
    return [
        np.array(tiles, dtype=np.int32).reshape(-1, 2),
        np.array([row for row, _ in runs], dtype=np.int32),
        np.array([len(chunk.token_ids) for _, chunk in runs], dtype=np.int32),
        np.array([chunk.start for _, chunk in runs], dtype=np.int32),
        _tables([chunk for _, chunk in runs]),
    ]


def _tables(chunks: list[Chunk]) -> Ints:
    """The blocks of each chunk, padded with block 0, which nothing looks up there."""
    widest = max((len(chunk.block_table) for chunk in chunks), default=0)
    tables = np.zeros((len(chunks), widest), dtype=np.int32)
    for row, chunk in enumerate(chunks):
        tables[row, : len(chunk.block_table)] = chunk.block_table
    return tables


def _send(arrays: Sequence[NDArray[np.integer]], device: torch.device) -> list[Tensor]:
    """All ``arrays`` in one transfer, as tensors of their shapes. Each begins at a multiple of 16
    bytes: Triton compiles a kernel anew for pointers that do not."""
    sizes = [-(-one.size // ALIGNED) * ALIGNED for one in arrays]
    flat = np.zeros(sum(sizes), dtype=np.int32)
    begins = np.cumsum([0, *sizes]).tolist()
    for begin, one in zip(begins, arrays, strict=False):
        flat[begin : begin + one.size] = one.ravel()
    sent = to_device(flat, device)
    return [
        sent[begin : begin + one.size].view(one.shape)
        for begin, one in zip(begins, arrays, strict=False)
    ]
