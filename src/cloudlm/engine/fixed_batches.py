"""A network's modules in batches that are all of the same shape, so that what a row gets depends
neither on how many others there are nor on who they are.

Kernels choose how to sum by the shape of what they are given (He et al., "Defeating Nondeterminism
in LLM Inference", 2025). Attention is ``ops.invariant``. Samples nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.ops.cache import BlockPool
from cloudlm.engine.ops.invariant import InvariantAttention, Rows
from cloudlm.engine.step import Chunk

# A CPU with matrix units computes about so many rows of a linear layer in the time in which it
# reads the layer's weights.
FIXED_ROWS = 32


def hidden_in_batches(
    model: Decoder, chunks: Sequence[Chunk], pool: BlockPool, windows: Collection[int | None]
) -> Tensor:
    """Last hidden states [tokens, hidden] of all chunks, one behind the other; stores their keys
    and values in the pool."""
    device = pool.blocks.device
    answers: list[Tensor] = []
    for owned in _batches(chunks):
        token_ids, positions = [0] * FIXED_ROWS, [0] * FIXED_ROWS
        for rows in owned:
            end = rows.start + rows.end - rows.begin
            first = rows.start - rows.chunk.start
            token_ids[rows.begin : rows.end] = rows.chunk.token_ids[
                first : first + end - rows.start
            ]
            positions[rows.begin : rows.end] = range(rows.start, end)
        attend = InvariantAttention(owned, pool, windows)
        tokens = torch.tensor(token_ids, dtype=torch.int64, device=device)
        places = torch.tensor(positions, dtype=torch.int64, device=device)
        answers.append(model(tokens, places, attend)[: owned[-1].end])
    return torch.cat(answers)


def logits_in_batches(model: Decoder, hidden: Tensor) -> Tensor:
    """Logits [rows, vocabulary] of hidden states [rows, hidden]."""
    answers = []
    for begin in range(0, len(hidden), FIXED_ROWS):
        part = hidden[begin : begin + FIXED_ROWS]
        padded = hidden.new_zeros((FIXED_ROWS, hidden.shape[1]))
        padded[: len(part)] = part
        answers.append(model.logits(padded)[: len(part)])
    return torch.cat(answers)


def _batches(chunks: Sequence[Chunk]) -> Iterator[list[Rows]]:
    """All tokens of the chunks in their order, cut into batches of at most FIXED_ROWS rows."""
    owned: list[Rows] = []
    used = 0
    for chunk in chunks:
        position, end = chunk.start, chunk.start + len(chunk.token_ids)
        while position < end:
            count = min(FIXED_ROWS - used, end - position)
            owned.append(Rows(chunk, used, used + count, position))
            position, used = position + count, used + count
            if used == FIXED_ROWS:
                yield owned
                owned, used = [], 0
    if owned:
        yield owned
