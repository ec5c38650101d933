"""What the GPU path asks of its kernels, and the plans that they follow.

All index tensors are int32 and lie on the device. A slot is ``block * block_size + offset``. Keys
and values of a layer are [blocks, block_size, kv_heads, head_dim], contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Decoding:
    """Sequences that compute one token each.

    ``rows`` [n] are their rows of the batch, ``tables`` [n, width] their blocks, ``lengths`` [n]
    the tokens that they see, their own included; 0 is padding, whose answer is zeros. No length
    exceeds ``longest``, which the host knows without asking the device.
    """

    rows: Tensor
    tables: Tensor
    lengths: Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class Prefilling:
    """Sequences that compute several tokens: run r is ``counts[r]`` rows of the batch from
    ``begins[r]`` on, at positions ``starts[r]`` and following, with the blocks ``tables[r]``.
    ``tiles`` [tiles, 2] cut the runs into TILE rows: which run, and the tile's first row in it."""

    tiles: Tensor
    begins: Tensor
    counts: Tensor
    starts: Tensor
    tables: Tensor


TILE = 64
"""Rows of a tile of ``Prefilling``."""


@dataclass(frozen=True, slots=True)
class Look:
    """How scores become weights: see ``ops.attention.Attend``."""

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Heads:
    """How a fused row of queries, keys and values is cut, and the norms of queries and keys
    [head_dim]; an ``offset`` norm multiplies by 1 + weight."""

    queries: int
    keys: int
    dim: int
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    eps: float = 0.0
    offset: bool = False


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """``weight[n, k] = scale[n] * codes[n, k]``: int8 codes, float32 scale."""

    codes: Tensor
    scale: Tensor

    @property
    def outputs(self) -> int:
        return len(self.codes)


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    """``weight[n, k] = scale[n, g] * (code[n, k] - zeros[n, g])`` with ``g = k // group``.

    Byte j of group g of ``packed`` uint8 [n, groups * group / 2] holds the codes of inputs
    ``g * group + j`` (low half) and ``g * group + group / 2 + j`` (high half): both halves of a
    tile then meet inputs that lie side by side. ``scale`` and ``zeros`` are float32 [n, groups].
    The last group is filled up with zeros' codes; ``inputs`` is the true number.
    """

    packed: Tensor
    scale: Tensor
    zeros: Tensor
    group: int
    inputs: int

    @property
    def outputs(self) -> int:
        return len(self.packed)


Matrix = Int8Matrix | Int4Matrix


class Operations(Protocol):
    """The operations of a step that PyTorch lacks. None waits for the device."""

    name: str

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, offset: bool) -> Tensor:
        """``x`` [..., size] as ``ops.norm.RMSNorm`` has it, or OffsetRMSNorm if ``offset``."""
        ...

    def gated(self, fused: Tensor, activation: str) -> Tensor:
        """``act(gate) * up`` of ``fused`` [tokens, 2 * inner]; ``activation`` is silu or gelu."""
        ...

    def rotate_and_store(
        self,
        fused: Tensor,
        heads: Heads,
        turn: tuple[Tensor, Tensor],
        slots: Tensor,
        cache: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Cut ``fused`` [tokens, (queries + 2 * keys) * dim]; norm and rotate queries and keys by
        ``turn`` (``ops.rope.cos_sin``); store keys and values, infinities and NaN as 0. The answer
        is the queries [tokens, heads, dim]."""
        ...

    def store(
        self, key: Tensor, value: Tensor, slots: Tensor, cache: tuple[Tensor, Tensor]
    ) -> None:
        """Store keys and values [tokens, kv_heads, dim], infinities and NaN as 0."""
        ...

    def decode(
        self,
        query: Tensor,
        cache: tuple[Tensor, Tensor],
        plan: Decoding,
        look: Look,
        answer: Tensor,
    ) -> None:
        """Attention of single tokens; ``query`` and ``answer`` [tokens, heads, dim]."""
        ...

    def prefill(
        self,
        query: Tensor,
        cache: tuple[Tensor, Tensor],
        plan: Prefilling,
        look: Look,
        answer: Tensor,
    ) -> None:
        """Causal attention of runs of tokens, whose keys are stored already."""
        ...

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        """``x`` [rows, inputs] times a quantised matrix, in the type of ``x``."""
        ...
