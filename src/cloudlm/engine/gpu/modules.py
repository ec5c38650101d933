"""A network's modules in the form that a GPU runs quickest: matrices that see the same input as
one, quantised if asked for, and the small steps between products as one kernel each.

A module that does not fit stays as it is; so every architecture runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.architectures.modules import (
    Attention,
    FusedAttention,
    FusedGatedMLP,
    GatedMLP,
    SparseMLP,
)
from cloudlm.engine.gpu.batch import PagedBatch
from cloudlm.engine.gpu.contract import Heads, Look, Matrix, Operations
from cloudlm.engine.gpu.matrices import pack
from cloudlm.engine.ops.activation import ACTIVATIONS
from cloudlm.engine.ops.norm import OffsetRMSNorm, RMSNorm

_GATES = {
    ACTIVATIONS["silu"]: "silu",
    ACTIVATIONS["gelu_pytorch_tanh"]: "gelu",
}
_RMS_NORMS = (RMSNorm, OffsetRMSNorm)
# What decides which experts see a token stays as exact as it is.
_ROUTERS = ("gate", "shared_expert_gate")


class QuantisedLinear(nn.Module):
    """A linear layer whose weights are codes."""

    def __init__(self, matrix: Matrix, bias: Tensor | None, operations: Operations) -> None:
        super().__init__()
        self._matrix, self._bias, self._operations = matrix, bias, operations

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [rows, inputs]."""
        return self._operations.linear(x, self._matrix, self._bias)


class _WholeLinear(nn.Module):
    """A linear layer in full. (nn.Linear would make its own memory first.)"""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [rows, inputs]."""
        return functional.linear(x, self._weight, self._bias)


class FusedNorm(nn.Module):
    """A root-mean-square norm in one kernel."""

    def __init__(self, norm: RMSNorm | OffsetRMSNorm, weight: Tensor, operations: Operations):
        super().__init__()
        self._weight, self._operations, self._eps = weight, operations, norm.eps
        self._offset = isinstance(norm, OffsetRMSNorm)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., size]."""
        return self._operations.rms_norm(x, self._weight, self._eps, offset=self._offset)


class PackedAttention(nn.Module):
    """Self-attention; between the first product and attention one kernel does the rest."""

    def __init__(self, attention: Attention, packer: Packer) -> None:
        super().__init__()
        self._layer = attention.layer
        self._look = Look(attention.scale, attention.window, attention.softcap)
        dim = attention.head_dim
        if isinstance(attention, FusedAttention):
            keys = attention.kv_heads
            queries = attention.qkv_proj.out_features // dim - 2 * keys
            self._inputs = packer.linear(attention.qkv_proj)
        else:
            keys = attention.k_proj.out_features // dim
            queries = attention.q_proj.out_features // dim
            self._inputs = packer.linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self._heads = Heads(queries, keys, dim)
        first, second = attention.q_norm, attention.k_norm
        if isinstance(first, _RMS_NORMS) and isinstance(second, _RMS_NORMS):
            weights = packer.there(first.weight), packer.there(second.weight)
            offset = isinstance(first, OffsetRMSNorm)
            self._heads = Heads(queries, keys, dim, *weights, eps=first.eps, offset=offset)
        self._output = packer.linear(attention.o_proj)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: PagedBatch) -> Tensor:
        """See ``Attention``."""
        seen = attend.rotated(self._layer, self._inputs(x), self._heads, (cos, sin), self._look)
        projected: Tensor = self._output(seen)
        return projected


class PackedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``: a product, a kernel, a product."""

    def __init__(self, mlp: GatedMLP | FusedGatedMLP, packer: Packer) -> None:
        super().__init__()
        self._activation = _GATES[mlp.activation]
        if isinstance(mlp, FusedGatedMLP):
            self._inputs = packer.linear(mlp.gate_up_proj)
        else:
            self._inputs = packer.linear(mlp.gate_proj, mlp.up_proj)
        self._output = packer.linear(mlp.down_proj)
        self._operations = packer.operations

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [tokens, hidden]."""
        projected: Tensor = self._output(self._operations.gated(self._inputs(x), self._activation))
        return projected


class Packer:
    """Moves modules to ``device`` one by one; ``bits`` 8 or 4 quantises matrices on the way, 16
    leaves their type as it is. Memory beyond the packed network is that of one matrix."""

    def __init__(self, operations: Operations, device: torch.device, bits: int) -> None:
        self.operations = operations
        self._device = device
        self._bits = bits

    def there(self, weight: Tensor) -> Tensor:
        """A tensor on the device."""
        return weight.detach().to(self._device)

    def linear(self, *parts: nn.Linear) -> nn.Module:
        """The matrices below each other as one layer."""
        weights = [self.there(part.weight) for part in parts]
        weight = torch.cat(weights) if weights[1:] else weights[0]
        biases = [self.there(part.bias) for part in parts if part.bias is not None]
        bias = torch.cat(biases) if biases else None
        if self._bits == 16:
            return _WholeLinear(weight, bias)
        return QuantisedLinear(pack(weight, self._bits), bias, self.operations)

    @torch.inference_mode()
    def pack(self, model: Decoder, progress: Callable[[float], None]) -> None:
        """All of ``model`` but its output projection, in its place."""
        parts = [
            (parent, name) for parent in model.modules() for name, _ in parent.named_children()
        ]
        for number, (parent, name) in enumerate(parts):
            child = getattr(parent, name, None)
            if child is not None:
                setattr(parent, name, self._packed(parent, name, child))
            progress((number + 1) / len(parts))
        model.to(self._device)

    def _packed(self, parent: nn.Module, name: str, child: nn.Module) -> nn.Module:
        if isinstance(child, Attention) and _fits(child):
            return PackedAttention(child, self)
        if isinstance(child, GatedMLP | FusedGatedMLP) and child.activation in _GATES:
            return PackedMLP(child, self)
        if isinstance(child, _RMS_NORMS):
            return FusedNorm(child, self.there(child.weight), self.operations)
        router = isinstance(parent, SparseMLP) and name in _ROUTERS
        if isinstance(child, nn.Linear) and name != "lm_head" and self._bits < 16 and not router:
            return self.linear(child)
        return child


def _fits(attention: Any) -> bool:
    """Whether ``PackedAttention`` can take its place."""
    grouped = isinstance(attention, FusedAttention) and attention.grouped
    normed = attention.q_norm is None or isinstance(attention.q_norm, _RMS_NORMS)
    return normed and not attention.norm_whole and not grouped
