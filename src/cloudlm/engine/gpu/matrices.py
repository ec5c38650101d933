"""Weights on their way into GPU memory: the quantisation is ``native.packing``'s, the layout that
of the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cloudlm.engine.gpu.contract import Int4Matrix, Int8Matrix, Matrix
from cloudlm.engine.native.packing import Int4Weight, Int8Weight, quantize_int4, quantize_int8

GROUP = 128


def pack(weight: Tensor, bits: int) -> Matrix:
    """Quantise ``weight`` [outputs, inputs], any floating type, where it lies; ``bits`` 8 or 4."""
    if bits == 8:
        return arrange_int8(quantize_int8(weight))
    return arrange_int4(quantize_int4(weight, GROUP))


def arrange_int8(weight: Int8Weight) -> Int8Matrix:
    """The kernels read codes as they are."""
    return Int8Matrix(weight.codes.contiguous(), weight.scale.float().contiguous())


def arrange_int4(weight: Int4Weight) -> Int4Matrix:
    """Two codes in a byte, as ``contract.Int4Matrix`` has them."""
    outputs, inputs = weight.codes.shape
    groups, half = weight.scale.shape[1], weight.group // 2
    codes = functional.pad(weight.codes, (0, groups * weight.group - inputs), value=8)
    halves = codes.view(outputs, groups, 2, half)
    packed = halves[:, :, 0] | (halves[:, :, 1] << 4)
    zeros = torch.full_like(weight.scale, 8.0) if weight.zeros is None else weight.zeros
    return Int4Matrix(
        packed.reshape(outputs, groups * half).contiguous(),
        weight.scale.float().contiguous(),
        zeros.float().contiguous(),
        weight.group,
        inputs,
    )


def unpacked(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """The weights [outputs, inputs] that the matrix stands for."""
    if isinstance(matrix, Int8Matrix):
        return (matrix.codes.float() * matrix.scale[:, None]).to(dtype)
    packed = matrix.packed.view(matrix.outputs, -1, matrix.group // 2)
    codes = torch.cat((packed & 15, packed >> 4), dim=2).float()
    wide = (codes - matrix.zeros[:, :, None]) * matrix.scale[:, :, None]
    return wide.flatten(1)[:, : matrix.inputs].to(dtype).contiguous()
