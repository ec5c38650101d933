"""Products with quantised weights as Triton kernels: for few rows, when reading the weights is all
the work. Launched by ``triton_ops`` alone. Layouts: ``contract.Int8Matrix`` and ``Int4Matrix``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-any-return"
from __future__ import annotations

import triton
import triton.language as tl

from cloudlm.engine.gpu.dot_kernels import dot


@triton.jit(do_not_specialize=["count"])
def int8_kernel(
    x,
    codes,
    scale,
    bias,
    answer,
    count,
    outputs,
    inputs,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Program (columns, rows): one tile of the product, over all inputs."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    line = column.to(tl.int64) * inputs
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(0, inputs, DEPTH):
        known = at + depth < inputs
        part = tl.load(
            x + row.to(tl.int64)[:, None] * x_stride + (at + depth)[None, :],
            mask=(row < count)[:, None] & known[None, :],
            other=0.0,
        )
        weight = tl.load(
            codes + line[:, None] + (at + depth)[None, :],
            mask=(column < outputs)[:, None] & known[None, :],
            other=0,
        )
        sums += dot(part, tl.trans(weight.to(tl.float32).to(part.dtype)))
    sums = sums * tl.load(scale + column, mask=column < outputs, other=0.0)[None, :]
    if BIASED:
        sums += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(
        answer + row.to(tl.int64)[:, None] * outputs + column[None, :],
        sums.to(answer.dtype.element_ty),
        mask=(row < count)[:, None] & (column < outputs)[None, :],
    )


@triton.jit(do_not_specialize=["count"])
def int4_kernel(
    x,
    packed,
    scale,
    zeros,
    bias,
    answer,
    count,
    outputs,
    inputs,
    groups,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALF: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Program (columns, rows): one tile of the product, group by group. A group's scale meets the
    group's sum, and its zero the sum of the inputs: the codes go into the product as they are."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    half = tl.arange(0, HALF)
    line = column.to(tl.int64) * groups
    real = column < outputs
    at_row = row.to(tl.int64)[:, None] * x_stride
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for group in range(0, groups):
        low_at = group * 2 * HALF + half
        high_at = low_at + HALF
        here = (row < count)[:, None]
        low_x = tl.load(x + at_row + low_at[None, :], mask=here & (low_at < inputs), other=0.0)
        high_x = tl.load(x + at_row + high_at[None, :], mask=here & (high_at < inputs), other=0.0)
        both = tl.load(
            packed + (line + group)[:, None] * HALF + half[None, :], mask=real[:, None], other=0
        )
        low = (both & 15).to(tl.float32).to(low_x.dtype)
        high = (both >> 4).to(tl.float32).to(low_x.dtype)
        own = dot(low_x, tl.trans(low))
        own += dot(high_x, tl.trans(high))
        zero = tl.load(zeros + line + group, mask=real, other=0.0)
        factor = tl.load(scale + line + group, mask=real, other=0.0)
        whole = tl.sum(low_x.to(tl.float32), 1) + tl.sum(high_x.to(tl.float32), 1)
        sums += (own - whole[:, None] * zero[None, :]) * factor[None, :]
    if BIASED:
        sums += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
    tl.store(
        answer + row.to(tl.int64)[:, None] * outputs + column[None, :],
        sums.to(answer.dtype.element_ty),
        mask=(row < count)[:, None] & real[None, :],
    )


@triton.jit
def unpack_int4_kernel(
    packed, scale, zeros, answer, inputs, groups, HALF: tl.constexpr, TOGETHER: tl.constexpr
):
    """Program (output, some groups): the weights themselves, for products of many rows."""
    output = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    half = tl.arange(0, HALF)
    known = (group < groups)[:, None]
    line = output * groups + group
    both = tl.load(packed + line[:, None] * HALF + half[None, :], mask=known, other=0)
    factor = tl.load(scale + line, mask=group < groups, other=0.0)[:, None]
    zero = tl.load(zeros + line, mask=group < groups, other=0.0)[:, None]
    low = ((both & 15).to(tl.float32) - zero) * factor
    high = ((both >> 4).to(tl.float32) - zero) * factor
    at = group[:, None] * 2 * HALF + half[None, :]
    place = answer + output * inputs + at
    tl.store(place, low.to(answer.dtype.element_ty), mask=known & (at < inputs))
    tl.store(place + HALF, high.to(answer.dtype.element_ty), mask=known & (at + HALF < inputs))
