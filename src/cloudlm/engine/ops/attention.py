"""Paged attention over a ragged batch: where each sequence's keys lie is planned once per step,
then every layer attends by that plan. Knows no sampling and no scheduling."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cloudlm.engine.ops.cache import BlockPool
from cloudlm.engine.ops.softcap import capped_attention, capped_run
from cloudlm.engine.ops.transfer import to_device
from cloudlm.engine.step import Chunk

Indices = NDArray[np.int64]


class Attend(Protocol):
    """What an architecture's layer calls: stores keys and values, answers the attention."""

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
        """``query`` [tokens, heads, head_dim], ``key`` and ``value`` [tokens, kv_heads, head_dim];
        the answer is [tokens, heads * head_dim]. With ``window`` a token sees only the last
        ``window`` positions, its own included; with ``softcap`` scores s are bent to
        ``softcap * tanh(s / softcap)`` before the softmax."""
        ...


@dataclass(frozen=True, slots=True)
class _SingleTokens:
    """Sequences that compute one token each: rows [n] of the batch, their blocks [n, m] (padded)
    and which of the gathered slots they may see [n, 1, 1, m * block_size]."""

    rows: Tensor
    blocks: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class _Run:
    """One sequence that computes several tokens, rows ``begin`` to ``end`` of the batch. It sees
    ``keys`` slots of ``blocks``; with neither blocks nor mask it sees its own tokens, causally."""

    begin: int
    end: int
    blocks: Tensor | None
    keys: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class _Plan:
    singles: tuple[_SingleTokens, ...]
    runs: tuple[_Run, ...]


class PagedAttention:
    """The attention of one step.

    ``positions`` [tokens] are the tokens' positions in their sequences, in the order of the
    chunks. ``windows`` are the distinct attention windows that the model's layers use.
    """

    def __init__(
        self, chunks: Sequence[Chunk], pool: BlockPool, windows: Iterable[int | None]
    ) -> None:
        self._pool = pool
        self._device = pool.blocks.device
        positions, slots = token_places(chunks, pool.block_size)
        self.positions = self._tensor(positions)
        self._slots = self._tensor(slots)
        self._plans = {window: self._plan(chunks, window) for window in windows}

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
        keys, values = self._pool.layer(layer)
        # Infinities of one sequence must not stay in a block that another one gets later.
        keys.flatten(0, 1).index_copy_(0, self._slots, key.nan_to_num(0.0, 0.0, 0.0))
        values.flatten(0, 1).index_copy_(0, self._slots, value.nan_to_num(0.0, 0.0, 0.0))
        answer = torch.empty_like(query)
        plan = self._plans[window]
        for group in plan.singles:
            answer[group.rows] = _attend_singles(
                group, query[group.rows], keys, values, scale, softcap
            )
        for run in plan.runs:
            rows = slice(run.begin, run.end)
            if run.blocks is None:
                seen_keys, seen_values = key[rows], value[rows]
            else:
                seen_keys = keys[run.blocks].flatten(0, 1)[: run.keys]
                seen_values = values[run.blocks].flatten(0, 1)[: run.keys]
            answer[rows] = _attend_run(
                query[rows], seen_keys, seen_values, run.mask, scale, softcap
            )
        return answer.flatten(1)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return to_device(array, self._device)

    def _plan(self, chunks: Sequence[Chunk], window: int | None) -> _Plan:
        singles: list[tuple[int, Chunk]] = []
        runs: list[_Run] = []
        row = 0
        for chunk in chunks:
            count = len(chunk.token_ids)
            if count == 1:
                singles.append((row, chunk))
            else:
                runs.append(self._run(row, chunk, window))
            row += count
        groups = _of_like_length(singles, self._pool.block_size, window)
        return _Plan(tuple(self._singles(group, window) for group in groups), tuple(runs))

    def _run(self, row: int, chunk: Chunk, window: int | None) -> _Run:
        count, size = len(chunk.token_ids), self._pool.block_size
        end = chunk.start + count
        if chunk.start == 0 and (window is None or end <= window):
            return _Run(row, row + count, None, end, None)
        first = _first_block(chunk.start, size, window)
        blocks = np.array(chunk.block_table[first : _ceil(end, size)], dtype=np.int64)
        of_keys = np.arange(first * size, end)[None, :]
        of_queries = np.arange(chunk.start, end)[:, None]
        mask = of_keys <= of_queries
        if window is not None:
            mask &= of_keys > of_queries - window
        keys = end - first * size
        return _Run(row, row + count, self._tensor(blocks), keys, self._tensor(mask))

    def _singles(self, group: list[tuple[int, Chunk]], window: int | None) -> _SingleTokens:
        size = self._pool.block_size
        firsts = [_first_block(chunk.start, size, window) for _, chunk in group]
        tables = [
            chunk.block_table[first : chunk.start // size + 1]
            for first, (_, chunk) in zip(firsts, group, strict=True)
        ]
        widest = max(map(len, tables))
        blocks = np.empty((len(group), widest), dtype=np.int64)
        for row, table in enumerate(tables):
            blocks[row, : len(table)] = table
            # Padded with a block of its own: no sequence ever touches another one's memory.
            blocks[row, len(table) :] = table[0]
        begins = np.array(firsts, dtype=np.int64)[:, None] * size
        at = np.array([chunk.start for _, chunk in group], dtype=np.int64)[:, None]
        positions = begins + np.arange(widest * size)[None, :]
        mask = positions <= at
        if window is not None:
            mask &= positions > at - window
        rows = np.array([row for row, _ in group], dtype=np.int64)
        return _SingleTokens(
            self._tensor(rows), self._tensor(blocks), self._tensor(mask[:, None, None, :])
        )


def _attend_singles(
    group: _SingleTokens,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    count, heads, dim = query.shape
    kv_heads = keys.shape[2]
    flat = group.blocks.flatten()
    seen_keys = keys.index_select(0, flat).view(count, -1, kv_heads, dim).transpose(1, 2)
    seen_values = values.index_select(0, flat).view(count, -1, kv_heads, dim).transpose(1, 2)
    # The query heads that share a key head stand in the place of query positions: no copies of
    # keys are made for them.
    folded = query.reshape(count, kv_heads, heads // kv_heads, dim)
    if softcap is not None:
        answer = capped_attention(folded, seen_keys, seen_values, group.mask, scale, softcap)
    else:
        answer = scaled_dot_product_attention(
            folded, seen_keys, seen_values, attn_mask=group.mask, scale=scale
        )
    return answer.reshape(count, heads, dim)


def _attend_run(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    if softcap is not None:
        return capped_run(query, keys, values, mask, scale, softcap)
    answer = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.transpose(0, 1).unsqueeze(0),
        values.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return answer.squeeze(0).transpose(0, 1)


def token_places(chunks: Sequence[Chunk], block_size: int) -> tuple[Indices, Indices]:
    """Position in its sequence and slot in the pool of every token of the batch."""
    positions: list[int] = []
    slots: list[int] = []
    for chunk in chunks:
        at, end = chunk.start, chunk.start + len(chunk.token_ids)
        if end - at == 1:  # what most have
            positions.append(at)
            slots.append(chunk.block_table[at // block_size] * block_size + at % block_size)
            continue
        positions += range(at, end)
        while at < end:
            block, offset = divmod(at, block_size)
            count = min(block_size - offset, end - at)
            slot = chunk.block_table[block] * block_size + offset
            slots += range(slot, slot + count)
            at += count
    # By way of ``array``: NumPy's own way from a list takes several times as long.
    return (
        np.frombuffer(array("q", positions), dtype=np.int64),
        np.frombuffer(array("q", slots), dtype=np.int64),
    )


def _of_like_length(
    singles: list[tuple[int, Chunk]], block_size: int, window: int | None
) -> list[list[tuple[int, Chunk]]]:
    """Groups whose padded blocks waste at most about half of the work."""

    def blocks(chunk: Chunk) -> int:
        return chunk.start // block_size + 1 - _first_block(chunk.start, block_size, window)

    groups: list[list[tuple[int, Chunk]]] = []
    limit = 0
    for row, chunk in sorted(singles, key=lambda single: blocks(single[1])):
        if not groups or blocks(chunk) > limit:
            groups.append([])
            limit = max(8, 2 * blocks(chunk))
        groups[-1].append((row, chunk))
    return groups


def _first_block(start: int, block_size: int, window: int | None) -> int:
    return 0 if window is None else max(0, start - window + 1) // block_size


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
