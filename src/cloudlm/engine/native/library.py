"""The native library behind ``contract.Kernels``: loads it, packs weights, passes addresses.

Decides nothing about who computes what; ``__init__.py`` picks the library or PyTorch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from torch import Tensor
from torch.nn import functional

from cloudlm.engine.native import structures as c
from cloudlm.engine.native.cache import HEAD_UNIT, MAX_HEAD_DIM, SLOT_UNIT, runs_heads
from cloudlm.engine.native.contract import LayerCache, Packed, Path, Rotary, StackLayer, Weight
from cloudlm.engine.native.packing import (
    PANEL,
    Int4Weight,
    Int8Weight,
    arrange,
    column_order,
    packed_rows,
    quantize_int4,
    split_scale,
)
from cloudlm.engine.native.plan import AttentionPlan

SPIN_US = 100  # how long a thread waits awake for work: longer than Python's pause between calls
_ALIGNMENT = 2 << 20


@dataclass(frozen=True, slots=True)
class _Stack:
    structs: ctypes.Array[c.LayerStruct]
    layers: tuple[StackLayer, ...]


class NativeKernels:
    """See ``contract.Kernels``. ``threads`` includes the caller's; ``pin`` binds the others to one
    CPU each. ``build`` names the library: its sources, compiler and instruction set. Raises OSError
    if the library cannot be loaded or the CPU refuses its tiles."""

    def __init__(self, path: FilePath, name: str, *, threads: int, pin: bool = False) -> None:
        self._library = ctypes.CDLL(str(path))
        self.name = name
        self.build = path.stem
        if not self._library.cloudlm_start():
            raise OSError("the system does not let this process use the CPU's tile registers")
        self.threads = self.set_threads(threads, pin=pin)

    def set_threads(self, threads: int, *, pin: bool = False, spin_us: int = SPIN_US) -> int:
        """Restart the team of threads; the answer is how many there are."""
        cpus = sorted(os.sched_getaffinity(0))
        places = [cpus[i % len(cpus)] if pin else -1 for i in range(max(threads, 1))]
        array = (ctypes.c_int * len(places))(*places)
        self.threads = int(self._library.cloudlm_threads(threads, array, spin_us))
        return self.threads

    def quantize_int4(self, weight: Tensor, group: int) -> Int4Weight:
        """See ``Kernels``."""
        if weight.dtype != torch.bfloat16:
            raise ValueError(f"expected bfloat16 weights, got {weight.dtype}")
        matrix = weight.contiguous()
        rows, columns = matrix.shape
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        scale = torch.empty(rows, -(-columns // group))
        code = self._library.cloudlm_quantize_int4(
            _at(matrix), rows, columns, group, _at(codes), _at(scale)
        )
        if code:
            return quantize_int4(weight, group)
        return Int4Weight(codes, scale, None, group)

    def rows(self, weight: Packed, numbers: Tensor) -> Tensor | None:
        """See ``Kernels``."""
        struct, (data, *_, bias) = weight.content.struct, weight.content.tensors
        if struct.kind != c.BF16 or weight.gated or bias is not None:
            return None
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < weight.outputs:
            raise IndexError(f"row {int(numbers.max())} of {weight.outputs}")
        return packed_rows(data, struct.panels, numbers, weight.inputs)

    def pack(
        self, weight: Weight, *, gated: bool = False, bias: Tensor | None = None, planes: int = 2
    ) -> Packed:
        """See ``Kernels``."""
        matrix = (weight if isinstance(weight, Tensor) else weight.codes).contiguous()
        rows, inputs = matrix.shape
        group = weight.group if isinstance(weight, Int4Weight) else 64
        if isinstance(weight, Int4Weight) and group != 32 and group % 64:
            raise ValueError(f"groups of {group} inputs: expected 32 or a multiple of 64")
        if isinstance(weight, Tensor) and weight.dtype != torch.bfloat16:
            raise ValueError(f"expected bfloat16 or quantised weights, got {weight.dtype}")
        unit = max(group, 64)
        k = -(-inputs // unit) * unit
        order = column_order(rows, gated=gated)
        kind, bits = _kind(weight)
        data = self._bytes(len(order) * k * bits // 8)
        self._library.cloudlm_pack(kind, _at(matrix), rows, inputs, k, int(gated), _at(data))
        scale, group_scale, zeros = _scales(weight, order, k // group)
        packed_bias = None if bias is None else arrange(bias.float(), order, 0.0)
        tensors = (data, scale, group_scale, zeros, packed_bias)
        outputs = rows // 2 if gated else rows
        numbers = (kind, outputs, inputs, k, len(order) // PANEL, int(gated), group, planes)
        size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return Packed(outputs, inputs, gated, size, c.linear_content(numbers, tensors))

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
        tokens = _expect(x, weight.inputs, "x")
        _expect(out, weight.outputs, "out", tokens)
        if tokens:
            code = self._library.cloudlm_linear(
                ctypes.byref(weight.content.struct),
                ctypes.byref(c.input_struct(x, norm, eps)),
                ctypes.byref(c.output_struct(out, add=add)),
                tokens,
                c.PATHS[path],
            )
            _check_room(code, tokens)
        return out

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
        tokens = _expect(out, weight.shape[0], "out", _expect(x, weight.shape[0], "x"))
        if residual is not None:
            _expect(residual, x.shape[1], "residual", tokens)
            if residual.dtype != torch.float32 or not residual.is_contiguous():
                raise ValueError("residual must be contiguous float32")
        self._library.cloudlm_rms_norm(
            ctypes.byref(c.input_struct(x, weight, eps)),
            _at(residual),
            ctypes.byref(c.output_struct(out)),
            tokens,
            x.shape[1],
        )
        return out

    def ungated(self, weight: Packed) -> tuple[Packed, Tensor]:
        """See ``Kernels``."""
        content: c.LinearContent = weight.content
        struct = c.LinearStruct.from_buffer_copy(content.struct)
        struct.gated, struct.n_out = 0, struct.panels * PANEL
        view = c.LinearContent(struct, content.tensors)
        order = column_order(2 * weight.outputs, gated=True)
        return Packed(struct.n_out, weight.inputs, False, weight.size_bytes, view), order

    def gate(self, weight: Packed, sums: Tensor, out: Tensor) -> Tensor:
        """See ``Kernels``."""
        tokens = _expect(sums, weight.content.struct.panels * PANEL, "sums")
        _expect(out, weight.outputs, "out", tokens)
        self._library.cloudlm_silu_mul(
            ctypes.byref(c.input_struct(sums)),
            ctypes.byref(c.output_struct(out)),
            tokens,
            weight.outputs,
        )
        return out

    def rope_store(self, qkv: Tensor, rotary: Rotary, slots: Tensor, cache: LayerCache) -> Tensor:
        """See ``Kernels``."""
        dim, width = rotary.head_dim, rotary.heads * rotary.head_dim
        tokens = _expect(qkv, width + 2 * rotary.kv_heads * dim, "qkv")
        _expect_heads(dim)
        if qkv.dtype != torch.bfloat16:
            raise ValueError(f"qkv is {qkv.dtype}, expected bfloat16")
        for name, table in (("cos", rotary.cos), ("sin", rotary.sin)):
            _expect(table, dim // 2, name, tokens)
        struct = c.RopeStruct(
            qkv.data_ptr(), qkv.stride(0), rotary.heads, rotary.kv_heads, dim,
            _at(rotary.cos), _at(rotary.sin), _at(rotary.q_norm), _at(rotary.k_norm),
            rotary.eps, cache.block_size, _at(slots), _at(cache.keys), _at(cache.values),
        )  # fmt: skip
        self._library.cloudlm_rope_store(ctypes.byref(struct), tokens)
        return qkv[:, :width]

    def attention(
        self, query: Tensor, cache: LayerCache, plan: AttentionPlan, out: Tensor, scale: float
    ) -> Tensor:
        """See ``Kernels``."""
        dim = cache.keys.shape[2] // cache.block_size
        tokens = _expect(out, query.shape[1], "out", _expect(query, query.shape[1], "query"))
        _expect_heads(dim)
        if tokens != plan.tokens or cache.block_size % SLOT_UNIT:
            raise ValueError(
                f"{tokens} tokens, blocks of {cache.block_size}: expected {plan.tokens} tokens and "
                f"blocks of a multiple of {SLOT_UNIT}"
            )
        struct = _attention_struct(plan, cache, query.shape[1] // dim, scale)
        struct.q, struct.q_stride = query.data_ptr(), query.stride(0)
        struct.out, struct.out_stride = out.data_ptr(), out.stride(0)
        struct.keys, struct.values = cache.keys.data_ptr(), cache.values.data_ptr()
        _check_room(self._library.cloudlm_attention(ctypes.byref(struct)), tokens)
        return out

    def stack(self, layers: Sequence[StackLayer]) -> _Stack:
        """See ``Kernels``."""
        structs = (c.LayerStruct * len(layers))()
        for struct, layer in zip(structs, layers, strict=True):
            for name in ("qkv", "out", "gate_up", "down"):
                setattr(struct, name, getattr(layer, name).content.struct)
            for name in ("input_norm", "post_norm", "q_norm", "k_norm"):
                setattr(struct, name, c.address(getattr(layer, name)))
            struct.keys = layer.cache.keys.data_ptr()
            struct.values = layer.cache.values.data_ptr()
            struct.plan = layer.plan
        return _Stack(structs, tuple(layers))

    def run_stack(
        self,
        stack: _Stack,
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
        first = stack.layers[0]
        dim, cache = rotary.head_dim, first.cache
        _expect_heads(dim)
        tokens = _expect(hidden, first.qkv.inputs, "hidden")
        _expect(rotary.cos, dim // 2, "cos", tokens)
        _expect(rotary.sin, dim // 2, "sin", tokens)
        if hidden.dtype != torch.float32 or not hidden.is_contiguous():
            raise ValueError("hidden must be contiguous float32")
        if len(slots) != tokens or any(plan.tokens != tokens for plan in plans):
            raise ValueError(f"slots and plans must be those of {tokens} tokens")
        if norm is not None and norm.shape != hidden.shape[1:]:
            raise ValueError(f"norm is {tuple(norm.shape)}, expected ({hidden.shape[1]},)")
        width = rotary.heads * dim
        sizes = (first.qkv.outputs, width, first.gate_up.outputs)
        rooms = [torch.empty(tokens, size, dtype=torch.bfloat16) for size in sizes]
        structs = [_attention_struct(plan, cache, rotary.heads, scale) for plan in plans]
        array = (c.AttentionStruct * len(plans))(*structs)
        struct = c.StackStruct(
            hidden.data_ptr(), tokens, hidden.shape[1], c.PATHS[path], rotary.eps, _at(norm),
            *(room.data_ptr() for room in rooms),
            c.RopeStruct(
                None, sizes[0], rotary.heads, rotary.kv_heads, dim,
                _at(rotary.cos), _at(rotary.sin), None, None,
                rotary.eps, cache.block_size, _at(slots), None, None,
            ),
            ctypes.addressof(array),
        )  # fmt: skip
        code = self._library.cloudlm_run_stack(
            stack.structs, len(stack.layers), ctypes.byref(struct), len(plans)
        )
        _check_room(code, tokens)
        return hidden

    def _bytes(self, size: int) -> Tensor:
        """Memory for weights; large pages make reading it quicker."""
        spare = _ALIGNMENT if size >= _ALIGNMENT else 64
        memory = torch.empty(size + spare, dtype=torch.uint8)
        aligned = memory[-memory.data_ptr() % spare :][:size]
        if spare == _ALIGNMENT:
            self._library.cloudlm_large_pages(_at(aligned), ctypes.c_size_t(size))
        return aligned


def _attention_struct(
    plan: AttentionPlan, cache: LayerCache, heads: int, scale: float
) -> c.AttentionStruct:
    """All of it but queries, answers and cache."""
    struct = c.AttentionStruct()
    struct.heads, struct.kv_heads = heads, cache.keys.shape[1]
    struct.dim, struct.block_size = cache.keys.shape[2] // cache.block_size, cache.block_size
    struct.tokens, struct.window, struct.scale = plan.tokens, plan.window, scale
    struct.n_pieces, struct.n_parts = len(plan.pieces), plan.parts
    for name in ("rows", "tables", "limits", "pieces", "merge_first", "merge_parts"):
        setattr(struct, name, getattr(plan, name).ctypes.data)
    return struct


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(c.address(tensor))


def _check_room(code: int, tokens: int) -> None:
    """Raises MemoryError, after which the kernels can still be used."""
    if code:
        raise MemoryError(
            f"the system has no memory left to compute a step of {tokens} tokens in; lower "
            "max_batch_tokens, or give the process more"
        )


def _expect(rows: Tensor, size: int, name: str, tokens: int | None = None) -> int:
    """The number of rows. Raises ValueError: the library would write anywhere."""
    count = rows.shape[0] if tokens is None else tokens
    if rows.dim() != 2 or rows.shape != (count, size):
        raise ValueError(f"{name} is {tuple(rows.shape)}, expected ({count}, {size})")
    return count


def _expect_heads(dim: int) -> None:
    """Raises ValueError: longer ones would be written over the stack of the library."""
    if not runs_heads(dim):
        raise ValueError(f"heads of {dim}: expected a multiple of {HEAD_UNIT} up to {MAX_HEAD_DIM}")


def _kind(weight: Weight) -> tuple[int, int]:
    """The number of the kind of weights and its bits."""
    if isinstance(weight, Int8Weight):
        return c.INT8, 8
    return (c.INT4, 4) if isinstance(weight, Int4Weight) else (c.BF16, 16)


def _scales(weight: Weight, order: Tensor, groups: int) -> Sequence[Tensor | None]:
    """Scale by column, scale by group and zero points, as far as the kind has them. Inputs that
    only fill a step up may make one more of ``groups`` than the weight has."""
    if isinstance(weight, Tensor):
        return None, None, None
    if isinstance(weight, Int8Weight):
        return arrange(weight.scale.float(), order, 0.0), None, None
    more = (0, groups - weight.scale.shape[1])
    halves, factor = split_scale(functional.pad(weight.scale, more))
    zeros = None if weight.zeros is None else arrange(functional.pad(weight.zeros, more), order, 0)
    return arrange(factor, order, 0.0), arrange(halves, order, 0.0), zeros
