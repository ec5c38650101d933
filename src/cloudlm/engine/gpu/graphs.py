"""Decoding steps as recorded graphs: one launch in the place of some hundreds.

A graph repeats what it recorded on the same memory. So each size of batch has its own, all read
their inputs from the same buffers, and a batch is filled up to the next size with rows that see
nothing and store into a block that belongs to nobody. Other steps are not for graphs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cloudlm.engine.gpu.accelerator import Accelerator, Replay
from cloudlm.engine.gpu.batch import ALIGNED, PagedBatch
from cloudlm.engine.gpu.contract import Decoding, Operations
from cloudlm.engine.ops.attention import token_places
from cloudlm.engine.ops.cache import BlockPool
from cloudlm.engine.ops.transfer import to_device
from cloudlm.engine.step import Chunk

MOST_SEQUENCES = 256
"""Beyond so many a step's kernels work longer than they take to launch."""

Forward = Callable[[Tensor, Tensor, PagedBatch], Tensor]


def graph_sizes(most: int) -> tuple[int, ...]:
    """Batch sizes that are recorded for up to ``most`` sequences: close together where they are
    small, and never more than about an eighth of the rows for nothing where they are large."""
    most = min(most, MOST_SEQUENCES)
    sizes = {1, 2, 4, *range(8, 65, 8), *range(80, MOST_SEQUENCES + 1, 16)}
    return tuple(sorted({size for size in sizes if size < most} | {most}))


class DecodeGraphs:
    """The graphs of one network over one pool, whose last block is nobody's.

    ``forward`` is the network; ``longest`` the most tokens that a sequence has. Buffers are those
    of the largest of ``sizes``. Must be made, and used, in inference mode by one thread.
    """

    def __init__(
        self,
        forward: Forward,
        operations: Operations,
        accelerator: Accelerator,
        pool: BlockPool,
        longest: int,
        sizes: Sequence[int],
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._forward = forward
        self._operations = operations
        self._pool = pool
        self._longest = longest
        self._sizes = tuple(sorted(sizes))
        self._nobody = (pool.blocks.shape[2] - 1) * pool.block_size
        most, device = self._sizes[-1], pool.blocks.device
        width = -(-longest // pool.block_size)
        # Token ids, positions, slots, lengths.
        row = -(-most // ALIGNED) * ALIGNED
        self._inputs = torch.zeros((4, row), dtype=torch.int32, device=device)
        self._inputs[2] = self._nobody
        self._tables = torch.zeros((most, width), dtype=torch.int32, device=device)
        self._rows = torch.arange(most, dtype=torch.int32, device=device)
        # What is in the device's tables, so that only what is new must be written and sent.
        self._mirror = np.zeros((most, width), dtype=np.int32)
        self._known: list[tuple[int, ...]] = [()] * most
        self._answer: Tensor | None = None
        self._replays: dict[int, Replay] = {}
        # The largest first: the others then find the memory that they need.
        for number, size in enumerate(reversed(self._sizes)):
            replay = accelerator.capture(lambda size=size: self._compute(size))  # type: ignore[misc]
            if replay is not None:
                self._replays[size] = replay
            progress((number + 1) / len(self._sizes))

    def fits(self, chunks: Sequence[Chunk]) -> bool:
        """Whether all ``chunks`` compute one token, and there are few enough of them."""
        return len(chunks) <= self._sizes[-1] and all(len(one.token_ids) == 1 for one in chunks)

    def hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """Hidden states [chunks, hidden] of chunks that fit; overwritten by the next step."""
        count = len(chunks)
        size = self._sizes[bisect_left(self._sizes, count)]
        positions, slots = token_places(chunks, self._pool.block_size)
        inputs = np.zeros((4, size), dtype=np.int32)
        inputs[0, :count] = [chunk.token_ids[0] for chunk in chunks]
        inputs[1, :count] = positions
        inputs[2] = self._nobody
        inputs[2, :count] = slots
        inputs[3, :count] = positions + 1
        device = self._inputs.device
        self._inputs[:, :size].copy_(to_device(inputs, device))
        used = self._fill_tables(chunks)
        if used:
            fresh = self._mirror[:count, :used]
            self._tables[:count, :used].copy_(to_device(fresh, device))
        replay = self._replays.get(size)
        if replay is None:
            self._compute(size)
        else:
            replay()
        assert self._answer is not None
        return self._answer[:count]

    def _compute(self, size: int) -> None:
        """What is recorded: from buffers to a buffer."""
        token_ids, positions, slots, lengths = (row[:size] for row in self._inputs)
        plan = Decoding(self._rows[:size], self._tables[:size], lengths, self._longest)
        batch = PagedBatch(self._operations, self._pool, slots, plan, None)
        hidden = self._forward(token_ids, positions, batch)
        if self._answer is None:
            self._answer = hidden.new_empty((self._sizes[-1], hidden.shape[1]))
        self._answer[:size].copy_(hidden)

    def _fill_tables(self, chunks: Sequence[Chunk]) -> int:
        """Bring the mirror up to date; the columns in use if anything is new, otherwise 0."""
        fresh = False
        width = self._mirror.shape[1]
        for row, chunk in enumerate(chunks):
            table, known = chunk.block_table[:width], self._known[row]
            if table == known:
                continue
            begin = len(known) if table[: len(known)] == known else 0
            self._mirror[row, begin : len(table)] = table[begin:]
            self._known[row] = table
            fresh = True
        return max(len(known) for known in self._known[: len(chunks)]) if fresh else 0
