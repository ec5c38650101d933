"""The same operations in plain PyTorch, for machines without a compiler and for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from cloudlm.engine.native.cache import key_places, unpack_keys, unpack_values, value_places
from cloudlm.engine.native.contract import (
    Additions,
    Kernels,
    LayerCache,
    Packed,
    Path,
    Rotary,
    StackLayer,
    Weight,
)
from cloudlm.engine.native.packing import Int4Weight, Int8Weight, quantize_int4
from cloudlm.engine.native.plan import AttentionPlan

PLANE = 254  # x = scale * (PLANE * high + low): see src/linear.cpp


@dataclass(frozen=True, slots=True)
class _Content:
    weight: Weight
    bias: Tensor | None
    planes: int


class TorchKernels:
    """See ``contract.Kernels``."""

    name = "torch"

    def quantize_int4(self, weight: Tensor, group: int) -> Int4Weight:
        """See ``Kernels``."""
        return quantize_int4(weight, group)

    def rows(self, weight: Packed, numbers: Tensor) -> Tensor | None:
        """See ``Kernels``."""
        content: _Content = weight.content
        if not isinstance(content.weight, Tensor) or weight.gated or content.bias is not None:
            return None
        return content.weight[numbers]

    def pack(
        self, weight: Weight, *, gated: bool = False, bias: Tensor | None = None, planes: int = 2
    ) -> Packed:
        """See ``Kernels``."""
        matrix = weight if isinstance(weight, Tensor) else weight.codes
        rows, inputs = matrix.shape
        content = _Content(weight, None if bias is None else bias.float(), planes)
        size = matrix.numel() * matrix.itemsize
        return Packed(rows // 2 if gated else rows, inputs, gated, size, content)

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
        """See ``Kernels``."""
        content: _Content = weight.content
        wide = x.float() if norm is None else _rms(x.float(), norm, eps)
        if isinstance(content.weight, Int8Weight):
            y = _int8_product(wide, content.weight, content.planes)
        elif isinstance(content.weight, Int4Weight):
            y = _int4_product(wide, content.weight, content.planes)
        else:
            # Products of bf16 numbers are exact in float32.
            y = wide.to(torch.bfloat16).float() @ content.weight.float().T
        if content.bias is not None:
            y = y + content.bias
        if weight.gated:
            gate, up = y.chunk(2, dim=1)
            y = functional.silu(gate) * up
        return out.add_(y) if add else out.copy_(y)

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        out: Tensor,
        *,
        residual: Tensor | None = None,
    ) -> Tensor:
        """See ``Kernels``."""
        source = x.float() if residual is None else residual.add_(x)
        return out.copy_(_rms(source, weight, eps))

    def ungated(self, weight: Packed) -> tuple[Packed, Tensor]:
        """See ``Kernels``."""
        outputs = 2 * weight.outputs
        return replace(weight, outputs=outputs, gated=False), torch.arange(outputs)

    def gate(self, weight: Packed, sums: Tensor, out: Tensor) -> Tensor:
        """See ``Kernels``."""
        gate, up = sums.chunk(2, dim=1)
        return out.copy_(functional.silu(gate) * up)

    def rope_store(self, qkv: Tensor, rotary: Rotary, slots: Tensor, cache: LayerCache) -> Tensor:
        """See ``Kernels``."""
        dim, kv_heads = rotary.head_dim, rotary.kv_heads
        parts = qkv.reshape(qkv.shape[0], -1, dim).float()
        query, key, value = (
            parts[:, : rotary.heads],
            parts[:, -2 * kv_heads : -kv_heads],
            parts[:, -kv_heads:],
        )
        if rotary.q_norm is not None:
            query = _rms(query, rotary.q_norm, rotary.eps)
        if rotary.k_norm is not None:
            key = _rms(key, rotary.k_norm, rotary.eps)
        turned = qkv[:, : rotary.heads * dim]
        turned.copy_(_turn(query, rotary).flatten(1))
        stored = slots >= 0
        at, kept = slots[stored], torch.bfloat16
        block, offset = at // cache.block_size, at % cache.block_size
        key = _turn(key, rotary)[stored].to(kept).nan_to_num(0.0, 0.0, 0.0)
        value = value[stored].to(kept).nan_to_num(0.0, 0.0, 0.0)
        places = key_places(cache.keys, dim)
        places[block, offset // 16, offset % 16] = key.reshape(*key.shape[:2], -1, 2)
        value_places(cache.values, dim)[block, offset // 2, offset % 2] = value
        return turned

    def attention(
        self, query: Tensor, cache: LayerCache, plan: AttentionPlan, out: Tensor, scale: float
    ) -> Tensor:
        """See ``Kernels``. Piece by piece and merged, exactly as planned."""
        kv_heads = cache.keys.shape[1]
        dim = _head_dim(cache)
        heads = query.shape[1] // dim
        sums = torch.zeros(plan.tokens, heads, dim)
        weights = torch.zeros(plan.tokens, heads)
        tops = torch.full((plan.tokens, heads), -torch.inf)
        limits = torch.from_numpy(plan.limits).long()
        for first, count, offset, begin, end, _ in plan.pieces.tolist():
            rows = torch.from_numpy(plan.rows[first : first + count]).long()
            size = cache.block_size
            blocks = plan.tables[offset + begin // size : offset + -(-end // size)]
            table = torch.from_numpy(blocks).long()
            positions = torch.arange(begin, end)
            inside = slice(begin - begin // size * size, end - begin // size * size)
            key = unpack_keys(cache.keys[table], dim).flatten(0, 1)[inside].float()
            value = unpack_values(cache.values[table], dim).flatten(0, 1)[inside].float()
            asked = query[rows].float().view(count, kv_heads, heads // kv_heads, dim)
            scores = torch.einsum("tkgd,skd->tkgs", asked, key).flatten(1, 2) * scale
            seen = positions < limits[rows, None]
            if plan.window:
                seen &= positions >= limits[rows, None] - plan.window
            scores = scores.masked_fill(~seen[:, None, :], -torch.inf)
            top = torch.maximum(tops[rows], scores.amax(2))
            safe = top.masked_fill(top == -torch.inf, 0.0)
            shares = torch.exp(scores - safe[..., None])
            old = torch.exp(tops[rows] - safe)
            grouped = shares.view(count, kv_heads, heads // kv_heads, -1)
            seen_values = torch.einsum("tkgs,skd->tkgd", grouped, value).flatten(1, 2)
            sums[rows] = sums[rows] * old[..., None] + seen_values
            weights[rows] = weights[rows] * old + shares.sum(2)
            tops[rows] = top
        return out.copy_((sums / weights[..., None]).flatten(1))

    def stack(self, layers: Sequence[StackLayer]) -> tuple[StackLayer, ...]:
        """See ``Kernels``."""
        return tuple(layers)

    def run_stack(
        self,
        stack: tuple[StackLayer, ...],
        hidden: Tensor,
        rotary: Rotary,
        slots: Tensor,
        plans: Sequence[AttentionPlan],
        scale: float,
        *,
        norm: Tensor | None = None,
        path: Path = "auto",
    ) -> Tensor:
        """See ``Kernels``."""
        return run_layers(self, stack, hidden, rotary, slots, plans, scale, norm=norm, path=path)


def run_layers(
    kernels: Kernels,
    layers: Sequence[StackLayer],
    hidden: Tensor,
    rotary: Rotary,
    slots: Tensor,
    plans: Sequence[AttentionPlan],
    scale: float,
    *,
    norm: Tensor | None = None,
    path: Path = "auto",
    more: Additions | None = None,
) -> Tensor:
    """``Kernels.run_stack`` in single steps, for any kernels, with what ``more`` adds."""
    eps = rotary.eps
    for number, layer in enumerate(layers):
        qkv = hidden.new_empty(len(hidden), layer.qkv.outputs, dtype=torch.bfloat16)
        kernels.linear(layer.qkv, hidden, qkv, norm=layer.input_norm, eps=eps, path=path)
        if more is not None:
            more.add(number, "qkv", hidden, qkv, layer.input_norm)
        own = replace(rotary, q_norm=layer.q_norm, k_norm=layer.k_norm)
        query = kernels.rope_store(qkv, own, slots, layer.cache)
        seen = torch.empty(query.shape, dtype=torch.bfloat16)
        kernels.attention(query, layer.cache, plans[layer.plan], seen, scale)
        kernels.linear(layer.out, seen, hidden, add=True, path=path)
        inner = hidden.new_empty(len(hidden), layer.gate_up.outputs, dtype=torch.bfloat16)
        ungated = None
        if more is not None:
            more.add(number, "out", seen, hidden)
            ungated = more.ungated(number)
        if more is None or ungated is None:
            kernels.linear(layer.gate_up, hidden, inner, norm=layer.post_norm, eps=eps, path=path)
        else:
            sums = hidden.new_empty(len(hidden), ungated.outputs)
            kernels.linear(ungated, hidden, sums, norm=layer.post_norm, eps=eps, path=path)
            more.add(number, "gate_up", hidden, sums, layer.post_norm)
            kernels.gate(layer.gate_up, sums, inner)
        kernels.linear(layer.down, inner, hidden, add=True, path=path)
        if more is not None:
            more.add(number, "down", inner, hidden)
    return hidden if norm is None else kernels.rms_norm(hidden, norm, eps, hidden)


def _head_dim(cache: LayerCache) -> int:
    return cache.keys.shape[2] // cache.block_size


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _turn(x: Tensor, rotary: Rotary) -> Tensor:
    left, right = x.chunk(2, dim=2)
    cos, sin = rotary.cos[:, None, :], rotary.sin[:, None, :]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=2)


def _quantized(x: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """Whole numbers as float64 (their products stay exact), and the scale of each token."""
    levels = 127 * PLANE + 127 if planes == 2 else 127
    top = x.abs().amax(1, keepdim=True)
    inverse = torch.where(top > 0, levels / top, 0.0)
    return (x * inverse).round().double(), top / levels


def _int8_product(x: Tensor, weight: Int8Weight, planes: int) -> Tensor:
    codes, scale = _quantized(x, planes)
    product = codes @ weight.codes.double().T
    return product.float() * (scale * weight.scale)


def _int4_product(x: Tensor, weight: Int4Weight, planes: int) -> Tensor:
    codes, scale = _quantized(x, planes)
    zeros = weight.zeros.double() if weight.zeros is not None else torch.tensor(8.0)
    inputs = weight.codes.shape[1]
    spread = weight.scale.double().repeat_interleave(weight.group, 1)[:, :inputs]
    if weight.zeros is not None:
        zeros = zeros.repeat_interleave(weight.group, 1)[:, :inputs]
    return (codes @ (spread * (weight.codes.double() - zeros)).T).float() * scale
