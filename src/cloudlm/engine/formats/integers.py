"""Small whole numbers packed into 32-bit ones, lowest bits first, as GPTQ, AWQ and
compressed-tensors have them; and matrices made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from cloudlm.engine.native.packing import Int4Weight, Int8Weight


def unpack(packed: Tensor, bits: int, dim: int, size: int) -> Tensor:
    """The numbers of ``packed`` int32 [a, b] along ``dim``, as uint8; the first ``size`` of them.
    ``bits`` is 4 or 8."""
    if dim == 0:
        return unpack(packed.T, bits, 1, size).T.contiguous()
    octets = packed.contiguous().view(torch.uint8)
    if bits == 4:
        octets = torch.stack((octets & 15, octets >> 4), dim=2).flatten(1)
    return octets[:, :size]


def matrix(
    codes: Tensor, scale: Tensor, zeros: Tensor, groups: Tensor, dtype: torch.dtype
) -> Tensor:
    """``scale[n, groups[k]] * (codes[n, k] - zeros[n, groups[k]])`` in ``dtype``, some rows at a
    time. ``codes`` [n, k] uint8, ``scale`` and ``zeros`` [n, groups]."""
    found = torch.empty(codes.shape, dtype=dtype)
    step = max(1, 2**24 // max(codes.shape[1], 1))
    for begin in range(0, len(codes), step):
        rows = slice(begin, begin + step)
        shift = zeros[rows].float()[:, groups]
        found[rows] = (codes[rows].float() - shift) * scale[rows].float()[:, groups]
    return found


def in_order(inputs: int, size: int) -> Tensor:
    """The group of each input when groups of ``size`` stand one behind the other."""
    return torch.arange(inputs) // size


def group_size(asked: int, inputs: int) -> int:
    """Inputs in a group where a file asks for groups of ``asked``; 0: one group of all. A size
    beyond the inputs says no more than that, and the kernels would fill the matrix up to it: it is
    at most the inputs with what fills their step of 64."""
    return min(asked or inputs, -(-inputs // 64) * 64)


def runs_in_kernels(size: int) -> bool:
    """Whether the kernels can take groups of this size, as ``group_size`` bounds it."""
    return size == 32 or size % 64 == 0


def int4_weight(codes: Tensor, scale: Tensor, zeros: Tensor | None, size: int) -> Int4Weight:
    """For the kernels; zero points that are all 8 are left out."""
    if zeros is not None and bool((zeros == 8).all()):
        zeros = None
    return Int4Weight(codes.contiguous(), scale.float(), zeros, size)


def int8_weight(codes: Tensor, scale: Tensor) -> Int8Weight:
    """``codes`` int8 [n, k], one ``scale`` per row."""
    return Int8Weight(codes.contiguous(), scale.float().flatten().contiguous())
