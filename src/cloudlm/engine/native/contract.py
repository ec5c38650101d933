"""What the engine may ask of kernels, whoever computes: the native library or PyTorch.

Activations are bf16 or float32 rows [tokens, size]; sums are float32 everywhere. Two
implementations of one call agree within rounding: of bf16 outputs to a relative 2**-7 of the
largest, of float32 ones to 1e-2 (bf16 inputs are products of bf16 numbers in both).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from cloudlm.engine.native.packing import Int4Weight, Int8Weight
from cloudlm.engine.native.plan import AttentionPlan

Path = Literal["auto", "vector", "tiles"]
Weight = Tensor | Int8Weight | Int4Weight


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix ready to be multiplied with: ``outputs`` x ``inputs``. ``gated``: the product is
    ``silu(gate) * up`` of the two halves of its rows. ``content`` belongs to the implementation.
    ``size_bytes``: what one use reads."""

    outputs: int
    inputs: int
    gated: bool
    size_bytes: int
    content: Any = field(repr=False)


@dataclass(frozen=True, slots=True)
class Rotary:
    """How queries and keys are turned: cos and sin float32 [tokens, head_dim / 2] (two halves of a
    head make the pairs), norms float32 [head_dim] or None.
    ``head_dim``: one that ``cache.runs_heads``."""

    heads: int
    kv_heads: int
    head_dim: int
    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, bf16 [blocks, kv_heads, block_size * head_dim] each, in the
    order of ``cache.py``."""

    keys: Tensor
    values: Tensor
    block_size: int


@dataclass(frozen=True, slots=True)
class StackLayer:
    """One layer of a Llama-like decoder. ``qkv`` and ``gate_up`` (gated) are fused; norms are
    float32; ``plan`` is the number of the attention plan that it uses (layers differ in window)."""

    qkv: Packed
    out: Packed
    gate_up: Packed
    down: Packed
    input_norm: Tensor
    post_norm: Tensor
    cache: LayerCache
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    plan: int = 0


class Additions(Protocol):
    """What is added to the products of some rows of a step, beside a stack's own."""

    def add(
        self, layer: int, matrix: str, x: Tensor, out: Tensor, norm: Tensor | None = None
    ) -> None:
        """To the outputs ``out`` of a layer's ``matrix`` (a field of StackLayer) for ``x``, which
        is RMS-normed first if there is a ``norm``. Of ``gate_up``: of the ungated matrix."""
        ...

    def ungated(self, layer: int) -> Packed | None:
        """The layer's ungated ``gate_up``; None if nothing is added to it."""
        ...


class Kernels(Protocol):
    """All methods run on the calling thread and a team of its own; one call at a time. MemoryError:
    there is none left to compute in; nothing was computed, and smaller calls can still be made.

    ``name`` says what computes: ``amx``, ``avx512``, ``avx2`` or ``torch``.
    """

    name: str

    def quantize_int4(self, weight: Tensor, group: int) -> Int4Weight:
        """``packing.quantize_int4`` of a bf16 ``weight``, to the bit."""
        ...

    def rows(self, weight: Packed, numbers: Tensor) -> Tensor | None:
        """Some rows (int64 [n]) of a packed matrix as they were, bf16 [n, inputs]: embeddings that
        are tied to the output projection need no memory of their own. None if it is quantised,
        gated or has a bias. Raises IndexError for a row that is not there."""
        ...

    def pack(
        self, weight: Weight, *, gated: bool = False, bias: Tensor | None = None, planes: int = 2
    ) -> Packed:
        """``weight`` [outputs, inputs]: bf16 tensor, or quantised. With ``gated`` its first half
        of rows are gates, the second ups. ``planes``, for quantised weights: inputs are taken
        with 8 bits (1) or 16 bits (2), quantised token by token. ``bias`` [outputs]."""
        ...

    def linear(
        self,
        weight: Packed,
        x: Tensor,
        out: Tensor,
        *,
        add: bool = False,
        norm: Tensor | None = None,
        eps: float = 0.0,
        path: Path = "auto",
    ) -> Tensor:
        """``out = x @ weight.T`` (+ bias, gating), or added to ``out`` with ``add`` (float32).
        With ``norm`` (float32 [inputs]) ``x`` is RMS-normed first, without rounding in between.

        A row's answer depends neither on the other rows nor on how many there are: quantised
        products are exact and the same on every ``path``; in bf16 ``vector`` and ``tiles`` add in
        different orders, and ``auto`` is ``tiles`` wherever the CPU has them. (Quantised, ``auto``
        takes vectors up to 4 rows.)"""
        ...

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        out: Tensor,
        *,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``out = rms_norm(x) * weight``; with ``residual`` (float32, updated in place)
        ``residual += x`` first and that is normed."""
        ...

    def ungated(self, weight: Packed) -> tuple[Packed, Tensor]:
        """A gated matrix without its gating, in the same memory, and which of its rows (gates, then
        ups) each output is, -1 for padding."""
        ...

    def gate(self, weight: Packed, sums: Tensor, out: Tensor) -> Tensor:
        """``out = silu(gate) * up`` of ``sums`` float32, which are outputs of ``ungated(weight)``:
        to the bit what ``linear`` makes of them."""
        ...

    def rope_store(self, qkv: Tensor, rotary: Rotary, slots: Tensor, cache: LayerCache) -> Tensor:
        """Norms and turns queries and keys of ``qkv`` bf16 [tokens, (heads + 2 kv_heads) * dim],
        writes keys and values into ``slots`` int64 [tokens] of the cache (block * block_size +
        offset; negative: nowhere; what is not finite becomes 0) and the queries back into
        ``qkv``. The answer is the queries' view [tokens, heads * dim]."""
        ...

    def attention(
        self, query: Tensor, cache: LayerCache, plan: AttentionPlan, out: Tensor, scale: float
    ) -> Tensor:
        """``query`` bf16 [tokens, heads * dim], ``out`` bf16 likewise; see ``plan.py``."""
        ...

    def stack(self, layers: Sequence[StackLayer]) -> Any:
        """The layers in the form that ``run_stack`` takes; made once."""
        ...

    def run_stack(
        self,
        stack: Any,
        hidden: Tensor,
        rotary: Rotary,
        slots: Tensor,
        plans: Sequence[AttentionPlan],
        scale: float,
        *,
        norm: Tensor | None = None,
        path: Path = "auto",
    ) -> Tensor:
        """All layers, one behind the other: ``hidden`` float32 [tokens, size] is changed in place.
        ``norm`` float32 [size] is the RMS norm of what comes out, if there is one. ``rotary.eps``
        is every norm's; the norms of ``rotary`` are left to the layers."""
        ...
