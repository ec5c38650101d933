"""What stands between a layer's products as Triton kernels: norms, gates, rotation, storing.

Launched by ``triton_ops`` alone. All arithmetic is float32, rounded once where it is stored.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-any-return"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _finite(x):
    """Infinities and NaN of one sequence must not stay in a block that another one gets later."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def rms_norm_kernel(
    x, weight, answer, stride, eps, SIZE: tl.constexpr, WIDTH: tl.constexpr, OFFSET: tl.constexpr
):
    """Program: one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    real = at < SIZE
    wide = tl.load(x + row * stride + at, mask=real, other=0.0).to(tl.float32)
    factor = tl.load(weight + at, mask=real, other=0.0).to(tl.float32)
    if OFFSET:
        factor = factor + 1.0
    normed = wide / tl.sqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    tl.store(answer + row * SIZE + at, (normed * factor).to(answer.dtype.element_ty), mask=real)


@triton.jit
def gated_kernel(
    fused, answer, stride, INNER: tl.constexpr, WIDTH: tl.constexpr, GELU: tl.constexpr
):
    """Program (row, part of it). gelu is the tanh form, written with the logistic function."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real = at < INNER
    gate = tl.load(fused + row * stride + at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(fused + row * stride + INNER + at, mask=real, other=0.0).to(tl.float32)
    bent = gate
    if GELU:
        bent = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    # Below -80 the answer is 0 in every type; further down the exponential would overflow.
    active = gate / (1.0 + tl.exp(-tl.maximum(bent, -80.0)))
    tl.store(answer + row * INNER + at, (active * up).to(answer.dtype.element_ty), mask=real)


@triton.jit
def rotate_and_store_kernel(
    fused,
    cos,
    sin,
    query_norm,
    key_norm,
    slots,
    keys,
    values,
    answer,
    stride,
    turn_stride,
    eps,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TURNED: tl.constexpr,
    NORMED: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Program (token, head): heads are those of queries, then keys, then values."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, WIDTH)
    real = dim < DIM
    line = fused + token * stride + head * DIM
    x = tl.load(line + dim, mask=real, other=0.0).to(tl.float32)
    is_query = head < QUERIES
    is_value = head >= QUERIES + KEYS
    # Dimension i turns with i + TURNED / 2; those from TURNED on stay.
    other = tl.where(dim < TURNED // 2, dim + TURNED // 2, dim - TURNED // 2)
    turned = dim < TURNED
    partner = tl.load(line + other, mask=turned, other=0.0).to(tl.float32)
    if NORMED:  # noqa: SIM102  (decided by the compiler, and the next line by the program)
        if not is_value:
            norm = key_norm
            if is_query:
                norm = query_norm
            factor = tl.load(norm + dim, mask=real, other=0.0).to(tl.float32)
            partner_factor = tl.load(norm + other, mask=turned, other=0.0).to(tl.float32)
            if OFFSET:
                factor = factor + 1.0
                partner_factor = partner_factor + 1.0
            size = 1.0 / tl.sqrt(tl.sum(x * x, 0) / DIM + eps)
            x = x * size * factor
            partner = partner * size * partner_factor
    if not is_value:
        c = tl.load(cos + token * turn_stride + dim, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + token * turn_stride + dim, mask=turned, other=0.0).to(tl.float32)
        x = x * c + tl.where(dim < TURNED // 2, -partner, partner) * s
    if is_query:
        place = answer + (token * QUERIES + head) * DIM + dim
        tl.store(place, x.to(answer.dtype.element_ty), mask=real)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        stored = _finite(x.to(keys.dtype.element_ty).to(tl.float32)).to(keys.dtype.element_ty)
        if is_value:
            place = values + (slot * KEYS + head - QUERIES - KEYS) * DIM + dim
            tl.store(place, stored, mask=real)
        else:
            place = keys + (slot * KEYS + head - QUERIES) * DIM + dim
            tl.store(place, stored, mask=real)


@triton.jit
def store_kernel(
    key,
    value,
    slots,
    keys,
    values,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (token, key head)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, WIDTH)
    real = dim < DIM
    slot = tl.load(slots + token).to(tl.int64)
    place = (slot * HEADS + head) * DIM + dim
    one = tl.load(key + token * key_stride + head * key_head_stride + dim, mask=real, other=0.0)
    tl.store(keys + place, _finite(one.to(tl.float32)).to(keys.dtype.element_ty), mask=real)
    two = tl.load(
        value + token * value_stride + head * value_head_stride + dim, mask=real, other=0.0
    )
    tl.store(values + place, _finite(two.to(tl.float32)).to(values.dtype.element_ty), mask=real)
