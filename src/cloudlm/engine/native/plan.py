"""Who attends to what in one step: made once per step, used by every layer. Plain NumPy.

The work is cut into pieces: some query tokens against a stretch of one block table. A sequence's
own keys are a piece of its own; keys that several sequences share (their tables begin with the same
blocks) are one piece for all of them, so that memory is read once. A token with more than one
piece gets its answer from the partial ones, merged by their log-sum-exp.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]

# Query tokens in a piece, and keys in a piece: a long stretch is cut so that threads can share it.
# The cuts depend on positions only, never on the batch: so a token's answer does not either.
MAX_TOKENS = 32
MAX_KEYS = 1024
# Sharing costs a merge: below so many tokens in common it is not worth it.
MIN_SHARED_KEYS = 128


@dataclass(frozen=True, slots=True)
class Query:
    """The tokens of one sequence in the step: ``count`` of them from position ``start``, in
    consecutive rows of the batch. ``table`` covers all positions up to the last. ``alike``: each
    token is to get to the bit what it would get as the only one of its sequence. If all queries
    are, a token's answer depends on its position alone, not on who shares its keys."""

    start: int
    count: int
    table: Sequence[int]
    alike: bool = False


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """See the module. ``pieces`` [n, 6]: first and count into ``rows``, offset into ``tables``,
    begin and end of the keys, number of the first partial answer or -1. ``limits`` [tokens]: how
    many keys a token may see. Token t merges ``merge_parts[merge_first[t] : merge_first[t + 1]]``;
    none means that its answer is whole."""

    tokens: int
    parts: int
    window: int
    rows: Ints
    tables: Ints
    limits: Ints
    pieces: Ints
    merge_first: Ints
    merge_parts: Ints


def plan_attention(
    queries: Sequence[Query], block_size: int, *, window: int | None = None, share: bool = True
) -> AttentionPlan:
    """The plan of one step; the rows of the batch are the tokens of ``queries`` in order.
    ``window``: a token sees so many positions at most, its own included. ``share=False`` gives
    every sequence its own pieces."""
    plan = _Draft(block_size, window or 0)
    row, rows = 0, []
    for query in queries:
        rows.append(row)
        plan.add_query(query)
        row += query.count
    shared = [0] * len(queries)
    if share and window is None:
        for members, keys in _groups(queries, block_size):
            plan.add_shared([rows[i] for i in members], plan.offsets[members[0]], keys)
            for i in members:
                shared[i] = keys
    for query, first, begin, offset in zip(queries, rows, shared, plan.offsets, strict=True):
        plan.add_own(query, first, begin, offset)
    return plan.finish()


_NOTHING: Ints = np.empty(0, dtype=np.int32)


class _Draft:
    def __init__(self, block_size: int, window: int) -> None:
        self._block_size = block_size
        self._window = window
        self.offsets: list[int] = []
        self._tables: list[int] = []
        self._limits: list[int] = []
        # (rows, table offset, begin, end)
        self._pieces: list[tuple[Sequence[int], int, int, int]] = []

    def add_query(self, query: Query) -> None:
        self.offsets.append(len(self._tables))
        needed = -(-(query.start + query.count) // self._block_size)
        self._tables += query.table[:needed]
        if query.count == 1:
            self._limits.append(query.start + 1)
        else:
            self._limits += range(query.start + 1, query.start + query.count + 1)

    def add_shared(self, rows: list[int], offset: int, keys: int) -> None:
        for begin in range(0, keys, MAX_KEYS):
            end = min(begin + MAX_KEYS, keys)
            for at in range(0, len(rows), MAX_TOKENS):
                self._pieces.append((rows[at : at + MAX_TOKENS], offset, begin, end))

    def add_own(self, query: Query, row: int, shared: int, offset: int) -> None:
        start, last = query.start, query.start + query.count
        if query.count == 1 and not self._window and start // MAX_KEYS == shared // MAX_KEYS:
            self._pieces.append((range(row, row + 1), offset, shared, last))  # what most have
            return
        prompt = query.count > 1 and not query.alike
        while start < last:
            # A window's keys begin where its first token's do. Tokens that must be alike begin with
            # those of the tile of positions that they are in, whoever else of it is there.
            tile = start if prompt or not self._window else start // MAX_TOKENS * MAX_TOKENS
            end = min(tile + MAX_TOKENS, last)
            first = max(0, tile + 1 - self._window) // 32 * 32 if self._window else shared
            rows = range(row + start - query.start, row + end - query.start)
            if prompt:  # has pieces enough for all threads
                self._pieces.append((rows, offset, first, end))
            else:
                self._cut(rows, offset, (first, start, end))
            start = end

    def _cut(self, rows: range, offset: int, places: tuple[int, int, int]) -> None:
        """``rows`` are the tokens of the positions ``start`` to ``end`` and see keys from ``first``
        on: cut at fixed positions."""
        first, start, end = places
        cuts = [first, *range((first // MAX_KEYS + 1) * MAX_KEYS, end, MAX_KEYS), end]
        for begin, stop in itertools.pairwise(cuts):
            # Who sees nothing of these keys has no part in them.
            seeing = rows[max(0, begin - start) :]
            if stop > begin and seeing:
                self._pieces.append((seeing, offset, begin, stop))

    def finish(self) -> AttentionPlan:
        tokens = len(self._limits)
        uses = Counter(row for piece in self._pieces for row in piece[0])
        pieces: list[int] = []
        all_rows: list[int] = []
        merges: dict[int, list[int]] = {}
        parts = 0
        # Long ones first: the last piece of work to be taken should be a short one.
        order = sorted(self._pieces, key=lambda piece: -len(piece[0]) * (piece[3] - piece[2]))
        for rows, offset, begin, end in order:
            partial = any(uses[row] > 1 for row in rows)
            part = parts if partial else -1
            pieces += (len(all_rows), len(rows), offset, begin, end, part)
            all_rows += rows
            if partial:
                for row in rows:
                    merges.setdefault(row, []).append(parts)
                    parts += 1
        first = np.zeros(tokens + 1, dtype=np.int32)
        if merges:
            np.cumsum([len(merges.get(row, ())) for row in range(tokens)], out=first[1:])
        merged = [part for row in sorted(merges) for part in merges[row]]
        return AttentionPlan(
            tokens=tokens,
            parts=parts,
            window=self._window,
            rows=_ints(all_rows),
            tables=_ints(self._tables),
            limits=_ints(self._limits),
            pieces=_ints(pieces).reshape(-1, 6),
            merge_first=first,
            merge_parts=_ints(merged),
        )


def _ints(values: list[int]) -> Ints:
    """Several times as quick as NumPy's own way from a list."""
    return np.frombuffer(array("i", values), dtype=np.int32) if values else _NOTHING


def _groups(queries: Sequence[Query], block_size: int) -> list[tuple[list[int], int]]:
    """Decoding sequences whose tables begin alike: their numbers and how many keys they share.
    The last token's own block is never shared: it is still being written."""
    heads: dict[int, list[int]] = {}
    for i, query in enumerate(queries):
        if query.count == 1 and query.start >= MIN_SHARED_KEYS:
            heads.setdefault(query.table[0], []).append(i)
    groups = []
    for members in heads.values():
        if len(members) < 2:
            continue
        full = min(queries[i].start // block_size for i in members)
        tables = np.array([queries[i].table[:full] for i in members])
        alike = (tables == tables[0]).all(axis=0)
        blocks = full if alike.all() else int(alike.argmin())
        keys = blocks * block_size
        if any(queries[i].alike for i in members):
            keys -= keys % MAX_KEYS  # as they are cut where nothing is shared
        if keys >= MIN_SHARED_KEYS:
            groups.append((members, keys))
    return groups
