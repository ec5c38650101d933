"""The operations of ``contract`` on Triton kernels: sizes are chosen and kernels launched here.

Imports Triton, so it is imported only where Triton is known to be there. The tile sizes are those
that fit the shared memory of GPUs since the A100; they have not been tuned on one.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from torch.nn import functional

from cloudlm.engine.gpu.attention_kernels import combine_kernel, decode_kernel, prefill_kernel
from cloudlm.engine.gpu.contract import (
    TILE,
    Decoding,
    Heads,
    Int4Matrix,
    Int8Matrix,
    Look,
    Matrix,
    Prefilling,
)
from cloudlm.engine.gpu.layer_kernels import (
    gated_kernel,
    rms_norm_kernel,
    rotate_and_store_kernel,
    store_kernel,
)
from cloudlm.engine.gpu.linear_kernels import int4_kernel, int8_kernel, unpack_int4_kernel

# Beyond so many rows a product with the weights in full, which must then be written first, is
# quicker than a kernel that turns codes into weights for every tile of rows anew.
FEW_ROWS = 64
_KEYS = 64  # keys that attention looks at at a time
_MOST_SPLITS = 32
_LOG2_E = math.log2(math.e)


class TritonOperations:
    """See ``contract.Operations``. ``multiprocessors`` of the device: how many programs keep all of
    it busy."""

    name = "triton"

    def __init__(self, multiprocessors: int) -> None:
        self._multiprocessors = multiprocessors

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, offset: bool) -> Tensor:
        """See ``Operations``."""
        size = x.shape[-1]
        rows = x.reshape(-1, size)
        answer = torch.empty_like(rows, memory_format=torch.contiguous_format)
        width = _width(size)
        rms_norm_kernel[(len(rows),)](
            rows,
            weight,
            answer,
            rows.stride(0),
            eps,
            SIZE=size,
            WIDTH=width,
            OFFSET=offset,
            num_warps=_warps(width),
        )
        return answer.view(x.shape)

    def gated(self, fused: Tensor, activation: str) -> Tensor:
        """See ``Operations``."""
        rows, inner = len(fused), fused.shape[1] // 2
        answer = fused.new_empty((rows, inner))
        width = min(1024, _width(inner))
        gated_kernel[(rows, triton.cdiv(inner, width))](
            fused,
            answer,
            fused.stride(0),
            INNER=inner,
            WIDTH=width,
            GELU=activation == "gelu",
            num_warps=4,
        )
        return answer

    def rotate_and_store(
        self,
        fused: Tensor,
        heads: Heads,
        turn: tuple[Tensor, Tensor],
        slots: Tensor,
        cache: tuple[Tensor, Tensor],
    ) -> Tensor:
        """See ``Operations``."""
        cos, sin = turn
        query = fused.new_empty((len(fused), heads.queries, heads.dim))
        normed = heads.query_norm is not None
        rotate_and_store_kernel[(len(fused), heads.queries + 2 * heads.keys)](
            fused,
            cos,
            sin,
            heads.query_norm if normed else fused,
            heads.key_norm if normed else fused,
            slots,
            *cache,
            query,
            fused.stride(0),
            cos.stride(0),
            heads.eps,
            QUERIES=heads.queries,
            KEYS=heads.keys,
            DIM=heads.dim,
            WIDTH=_width(heads.dim),
            TURNED=cos.shape[-1],
            NORMED=normed,
            OFFSET=heads.offset,
            num_warps=1,
        )
        return query

    def store(
        self, key: Tensor, value: Tensor, slots: Tensor, cache: tuple[Tensor, Tensor]
    ) -> None:
        """See ``Operations``."""
        key, value = _dense(key), _dense(value)
        heads, dim = key.shape[1:]
        store_kernel[(len(key), heads)](
            key,
            value,
            slots,
            *cache,
            *key.stride()[:2],
            *value.stride()[:2],
            HEADS=heads,
            DIM=dim,
            WIDTH=_width(dim),
            num_warps=1,
        )

    def decode(
        self,
        query: Tensor,
        cache: tuple[Tensor, Tensor],
        plan: Decoding,
        look: Look,
        answer: Tensor,
    ) -> None:
        """See ``Operations``."""
        query = query.contiguous()
        count, heads, dim = len(plan.rows), query.shape[1], query.shape[2]
        block, kv_heads = cache[0].shape[1:3]
        group, width = heads // kv_heads, _width(dim)
        seen = plan.longest if look.window is None else min(plan.longest, look.window)
        splits = self._splits(count * kv_heads, seen)
        parts = count * heads * splits if splits > 1 else 0
        partial = query.new_empty((parts, width), dtype=torch.float32)
        most, total = (query.new_empty(parts, dtype=torch.float32) for _ in range(2))
        decode_kernel[(count, kv_heads, splits)](
            query,
            *cache,
            plan.tables,
            plan.lengths,
            plan.rows,
            answer,
            partial,
            most,
            total,
            plan.tables.stride(0),
            query.stride(0),
            answer.stride(0),
            *_bending(look),
            KV_HEADS=kv_heads,
            GROUP=group,
            ROWS=_width(group),
            DIM=dim,
            WIDTH=width,
            BLOCK=block,
            KEYS=_keys(width),
            SPLITS=splits,
            WINDOWED=look.window is not None,
            CAPPED=look.softcap is not None,
            num_warps=4,
            num_stages=2,
        )
        if splits > 1:
            combine_kernel[(count, heads)](
                partial,
                most,
                total,
                plan.rows,
                answer,
                answer.stride(0),
                HEADS=heads,
                DIM=dim,
                WIDTH=width,
                SPLITS=splits,
                num_warps=4,
            )

    def prefill(
        self,
        query: Tensor,
        cache: tuple[Tensor, Tensor],
        plan: Prefilling,
        look: Look,
        answer: Tensor,
    ) -> None:
        """See ``Operations``."""
        query = query.contiguous()
        heads, dim = query.shape[1:]
        block, kv_heads = cache[0].shape[1:3]
        width = _width(dim)
        prefill_kernel[(len(plan.tiles), heads)](
            query,
            *cache,
            plan.tables,
            plan.tiles,
            plan.begins,
            plan.counts,
            plan.starts,
            answer,
            plan.tables.stride(0),
            query.stride(0),
            answer.stride(0),
            *_bending(look),
            KV_HEADS=kv_heads,
            GROUP=heads // kv_heads,
            ROWS=TILE,
            DIM=dim,
            WIDTH=width,
            BLOCK=block,
            KEYS=_keys(width),
            WINDOWED=look.window is not None,
            CAPPED=look.softcap is not None,
            num_warps=4,
            num_stages=2,
        )

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        """See ``Operations``."""
        if len(x) > FEW_ROWS:
            return _of_many_rows(x, matrix, bias)
        answer = x.new_empty((len(x), matrix.outputs))
        rows = max(16, _width(len(x)))
        columns = 16 if matrix.outputs <= 32 * 2 * self._multiprocessors else 32
        grid = (triton.cdiv(matrix.outputs, columns), triton.cdiv(len(x), rows))
        x = x if x.stride(1) == 1 else x.contiguous()
        shapes = {"ROWS": rows, "COLUMNS": columns, "BIASED": bias is not None}
        tuned = {"num_warps": 4, "num_stages": 4}
        given = x if bias is None else bias  # never read without one
        if isinstance(matrix, Int8Matrix):
            inputs = matrix.codes.shape[1]
            int8_kernel[grid](
                *(x, matrix.codes, matrix.scale, given, answer),
                *(len(x), matrix.outputs, inputs, x.stride(0)),
                DEPTH=128,
                **shapes,
                **tuned,
            )
        else:
            int4_kernel[grid](
                *(x, matrix.packed, matrix.scale, matrix.zeros, given, answer),
                *(len(x), matrix.outputs, matrix.inputs, matrix.scale.shape[1], x.stride(0)),
                HALF=matrix.group // 2,
                **shapes,
                **tuned,
            )
        return answer

    def _splits(self, programs: int, longest: int) -> int:
        """Shares of a sequence's keys: as many as fill the device twice, a power of two, and none
        without keys for every sequence."""
        wanted = min(2 * self._multiprocessors // programs, -(-longest // (2 * _KEYS)))
        return 1 << (min(max(wanted, 1), _MOST_SPLITS).bit_length() - 1)


def _of_many_rows(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    if isinstance(matrix, Int8Matrix) and x.dtype != torch.float16:
        # Codes are exact in every floating type; the scale meets the sums. Without it these would
        # soon be more than float16 holds.
        answer = (functional.linear(x, matrix.codes.to(x.dtype)) * matrix.scale).to(x.dtype)
        return answer if bias is None else answer + bias.to(x.dtype)
    if isinstance(matrix, Int4Matrix):
        weight = unpack_int4(matrix, x.dtype)
    else:
        weight = torch.empty(matrix.codes.shape, dtype=x.dtype, device=x.device)
        torch.mul(matrix.codes, matrix.scale[:, None], out=weight)
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def unpack_int4(matrix: Int4Matrix, dtype: torch.dtype) -> Tensor:
    """The weights [outputs, inputs] that the matrix stands for."""
    groups, together = matrix.scale.shape[1], 16
    weight = torch.empty((matrix.outputs, matrix.inputs), dtype=dtype, device=matrix.packed.device)
    unpack_int4_kernel[(matrix.outputs, triton.cdiv(groups, together))](
        *(matrix.packed, matrix.scale, matrix.zeros, weight, matrix.inputs, groups),
        HALF=matrix.group // 2,
        TOGETHER=together,
        num_warps=4,
    )
    return weight


def _bending(look: Look) -> tuple[float, int, float]:
    """Scale, window and softcap as the kernels take them."""
    window = look.window or 0
    if look.softcap is None:
        return look.scale * _LOG2_E, window, 0.0
    return look.scale / look.softcap, window, look.softcap * _LOG2_E


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _width(size: int) -> int:
    """The next power of two, and no less than a tile of the matrix units."""
    return max(16, 1 << (size - 1).bit_length())


def _keys(width: int) -> int:
    return _KEYS if width <= 128 else _KEYS // 2


def _warps(width: int) -> int:
    return min(max(width // 512, 1), 16)
