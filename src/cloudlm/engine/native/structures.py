"""The C structures of ``src/kernels.h``, field by field, and the addresses of tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

BF16, INT8, INT4 = 0, 1, 2
TYPE_BF16, TYPE_F32, TYPE_ADD_F32 = 0, 1, 2
PATHS = {"auto": 0, "vector": 1, "tiles": 2}


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class LinearStruct(ctypes.Structure):
    _fields_ = [
        *_fields(c_int32, "kind n_out k_in k panels gated group planes"),
        *_fields(c_void_p, "data scale group_scale zero bias"),
    ]


@dataclass(frozen=True, slots=True)
class LinearContent:
    """What a packed matrix is to the library: the structure that it reads, and the tensors that the
    structure's addresses belong to."""

    struct: LinearStruct
    tensors: tuple[Tensor | None, ...]


# Of what type the tensors of a LinearContent are, in the order of LinearStruct.
LINEAR_TENSORS = (torch.uint8, torch.float32, torch.float16, torch.uint8, torch.float32)
LINEAR_NUMBERS = len(LinearStruct._fields_) - len(LINEAR_TENSORS)


def linear_content(numbers: Sequence[int], tensors: tuple[Tensor | None, ...]) -> LinearContent:
    """``numbers`` and ``tensors`` (types: LINEAR_TENSORS) in the order of LinearStruct."""
    return LinearContent(LinearStruct(*numbers, *map(address, tensors)), tensors)


class InputStruct(ctypes.Structure):
    _fields_ = [
        ("rows", c_void_p),
        *_fields(c_int32, "type stride"),
        ("norm", c_void_p),
        ("eps", c_float),
    ]


class OutputStruct(ctypes.Structure):
    _fields_ = [("rows", c_void_p), *_fields(c_int32, "type stride")]


class RopeStruct(ctypes.Structure):
    _fields_ = [
        ("qkv", c_void_p),
        *_fields(c_int32, "stride heads kv_heads dim"),
        *_fields(c_void_p, "cos sin q_norm k_norm"),
        ("eps", c_float),
        ("block_size", c_int32),
        *_fields(c_void_p, "slots keys values"),
    ]


class AttentionStruct(ctypes.Structure):
    _fields_ = [
        *_fields(c_void_p, "q out"),
        *_fields(c_int32, "q_stride out_stride heads kv_heads dim block_size tokens window"),
        *_fields(c_void_p, "keys values rows tables limits pieces"),
        *_fields(c_int32, "n_pieces n_parts"),
        *_fields(c_void_p, "merge_first merge_parts"),
        ("scale", c_float),
    ]


class LayerStruct(ctypes.Structure):
    _fields_ = [
        *((name, LinearStruct) for name in ("qkv", "out", "gate_up", "down")),
        *_fields(c_void_p, "input_norm post_norm q_norm k_norm keys values"),
        *_fields(c_int32, "plan reserved"),
    ]


class StackStruct(ctypes.Structure):
    _fields_ = [
        ("hidden", c_void_p),
        *_fields(c_int32, "tokens size path"),
        ("eps", c_float),
        *_fields(c_void_p, "norm qkv seen inner"),
        ("rope", RopeStruct),
        ("plans", c_void_p),
    ]


def address(tensor: Tensor | None) -> int | None:
    """Where the tensor's memory begins; None for None."""
    return None if tensor is None else tensor.data_ptr()


def row_type(tensor: Tensor) -> int:
    """bf16 or float32 as the kernels number them. The rows may lie apart, not their elements."""
    if tensor.dim() != 2 or tensor.stride(1) != 1 or tensor.device.type != "cpu":
        raise ValueError(f"expected rows of consecutive elements on the CPU, got {tensor.shape}")
    if tensor.dtype == torch.bfloat16:
        return TYPE_BF16
    if tensor.dtype == torch.float32:
        return TYPE_F32
    raise ValueError(f"expected bfloat16 or float32, got {tensor.dtype}")


def input_struct(x: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> InputStruct:
    """``x`` [tokens, size]; ``norm`` float32 [size]."""
    return InputStruct(x.data_ptr(), row_type(x), x.stride(0), address(norm), eps)


def output_struct(out: Tensor, *, add: bool = False) -> OutputStruct:
    """``out`` [tokens, size]; with ``add`` results are added to it (float32 only)."""
    kind = row_type(out)
    if add and kind != TYPE_F32:
        raise ValueError("results can be added to float32 only")
    return OutputStruct(out.data_ptr(), TYPE_ADD_F32 if add else kind, out.stride(0))
