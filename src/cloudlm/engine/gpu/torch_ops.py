"""The operations of ``contract`` in PyTorch alone: what runs without Triton, and the twin that the
kernels are compared with. Slow on purpose in one place: attention gathers all keys that a table
can hold, so that no shape depends on data and a step can be captured as a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cloudlm.engine.gpu.contract import TILE, Decoding, Heads, Look, Matrix, Prefilling
from cloudlm.engine.gpu.matrices import unpacked
from cloudlm.engine.ops.rope import rotate


class TorchOperations:
    """See ``contract.Operations``."""

    name = "torch"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, offset: bool) -> Tensor:
        """See ``Operations``."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        factor = weight.float() + 1.0 if offset else weight.float()
        return (normed * factor).to(x.dtype)

    def gated(self, fused: Tensor, activation: str) -> Tensor:
        """See ``Operations``."""
        gate, up = fused.float().chunk(2, dim=-1)
        if activation == "gelu":
            active = functional.gelu(gate, approximate="tanh")
        else:
            active = functional.silu(gate)
        return (active * up).to(fused.dtype)

    def rotate_and_store(
        self,
        fused: Tensor,
        heads: Heads,
        turn: tuple[Tensor, Tensor],
        slots: Tensor,
        cache: tuple[Tensor, Tensor],
    ) -> Tensor:
        """See ``Operations``."""
        parts = fused.view(len(fused), -1, heads.dim)
        query, key, value = torch.split(parts, [heads.queries, heads.keys, heads.keys], dim=1)
        if heads.query_norm is not None and heads.key_norm is not None:
            query = self.rms_norm(query, heads.query_norm, heads.eps, offset=heads.offset)
            key = self.rms_norm(key, heads.key_norm, heads.eps, offset=heads.offset)
        cos, sin = (part.float() for part in turn)
        self.store(rotate(key.float(), cos, sin), value, slots, cache)
        return rotate(query.float(), cos, sin).to(fused.dtype)

    def store(
        self, key: Tensor, value: Tensor, slots: Tensor, cache: tuple[Tensor, Tensor]
    ) -> None:
        """See ``Operations``."""
        for blocks, given in zip(cache, (key, value), strict=True):
            finite = given.to(blocks.dtype).nan_to_num(0.0, 0.0, 0.0)
            blocks.flatten(0, 1).index_copy_(0, slots.long(), finite)

    def decode(
        self,
        query: Tensor,
        cache: tuple[Tensor, Tensor],
        plan: Decoding,
        look: Look,
        answer: Tensor,
    ) -> None:
        """See ``Operations``."""
        last = plan.lengths[:, None] - 1
        rows = plan.rows.long()
        found = _attend(query[rows].unsqueeze(1), cache, plan.tables, last, look)
        answer.index_copy_(0, rows, found.squeeze(1))

    def prefill(
        self,
        query: Tensor,
        cache: tuple[Tensor, Tensor],
        plan: Prefilling,
        look: Look,
        answer: Tensor,
    ) -> None:
        """See ``Operations``."""
        for run, first in plan.tiles.tolist():
            row = int(plan.begins[run]) + first
            count = min(TILE, int(plan.counts[run]) - first)
            own = int(plan.starts[run]) + first + torch.arange(count, device=query.device)
            asked = query[row : row + count].unsqueeze(0)
            table = plan.tables[run : run + 1]
            answer[row : row + count] = _attend(asked, cache, table, own[None, :], look)[0]

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        """See ``Operations``."""
        weight = unpacked(matrix, x.dtype)
        return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _attend(
    query: Tensor, cache: tuple[Tensor, Tensor], tables: Tensor, own: Tensor, look: Look
) -> Tensor:
    """``query`` [sequences, queries, heads, dim] at the positions ``own`` [sequences, queries] of
    sequences with the blocks ``tables`` [sequences, width]. Nothing is seen from position -1."""
    count, queries, heads, dim = query.shape
    kv_heads = cache[0].shape[2]
    flat = tables.flatten().long()
    key, value = (
        blocks.index_select(0, flat).view(count, -1, kv_heads, dim).float() for blocks in cache
    )
    folded = query.view(count, queries, kv_heads, heads // kv_heads, dim).float()
    scores = torch.einsum("nqkgd,nskd->nkgqs", folded, key) * look.scale
    if look.softcap is not None:
        scores = (scores / look.softcap).tanh() * look.softcap
    positions = torch.arange(key.shape[1], device=query.device)
    seen = positions <= own[:, :, None]
    if look.window is not None:
        seen = seen & (positions > own[:, :, None] - look.window)
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)  # padding sees nothing
    found = torch.einsum("nkgqs,nskd->nqkgd", weights, value)
    return found.reshape(count, queries, heads, dim).to(query.dtype)
