"""Attention over the paged cache as Triton kernels. Launched by ``triton_ops`` alone.

Sources: online softmax and tiling by Dao et al., "FlashAttention", 2022; keys split over programs
by Dao et al., "Flash-Decoding", 2023; blocks by Kwon et al., "PagedAttention", 2023. Scores are
kept as powers of two: ``scale`` has the logarithm of e in it, and ``softcap`` too.
"""

# Triton passes what these functions get, whose types Python does not know.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-any-return"
from __future__ import annotations

import triton
import triton.language as tl

from cloudlm.engine.gpu.dot_kernels import dot


@triton.jit
def _scores(query, key, scale, softcap, CAPPED: tl.constexpr):
    """[rows, keys], times log2(e). tanh by way of the sigmoid, which all versions have."""
    scores = dot(query, key) * scale
    if CAPPED:
        scores = softcap * (2.0 / (1.0 + tl.exp2(scores * (-2.0 * 1.4426950408889634))) - 1.0)
    return scores


@triton.jit
def _weighed(most, total, sums, scores, value):
    """One step of the online softmax. Rows that have seen nothing keep ``most`` at -inf."""
    above = tl.maximum(most, tl.max(scores, 1))
    safe = tl.where(above == float("-inf"), 0.0, above)
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(most - safe)
    total = total * shrink + tl.sum(weights, 1)
    sums = sums * shrink[:, None]
    sums += dot(weights.to(value.dtype), value)
    return above, total, sums


@triton.jit
def _attend(
    asked,
    own,
    keys,
    values,
    table,
    begin,
    end,
    kv_head,
    scale,
    window,
    softcap,
    KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Queries ``asked`` [ROWS, WIDTH] of positions ``own`` [ROWS] over the keys ``begin`` to
    ``end`` of one sequence, whose blocks ``table`` points to, as far as each may see them. The
    largest score, the sum of the weights, and the weighted values, of each row."""
    dim = tl.arange(0, WIDTH)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for at in range(begin, end, KEYS):
        position = at + tl.arange(0, KEYS)
        known = position < end
        block = tl.load(table + position // BLOCK, mask=known, other=0)
        slot = block.to(tl.int64) * BLOCK + position % BLOCK
        line = (slot * KV_HEADS + kv_head) * DIM
        key = tl.load(
            keys + line[None, :] + dim[:, None],
            mask=known[None, :] & (dim < DIM)[:, None],
            other=0.0,
        )
        seen = (position[None, :] <= own[:, None]) & known[None, :]
        if WINDOWED:
            seen = seen & (position[None, :] > own[:, None] - window)
        scores = _scores(asked, key, scale, softcap, CAPPED)
        scores = tl.where(seen, scores, float("-inf"))
        value = tl.load(
            values + line[:, None] + dim[None, :],
            mask=known[:, None] & (dim < DIM)[None, :],
            other=0.0,
        )
        most, total, sums = _weighed(most, total, sums, scores, value)
    return most, total, sums


@triton.jit(do_not_specialize=["table_stride", "window"])
def decode_kernel(
    query,
    keys,
    values,
    tables,
    lengths,
    rows,
    answer,
    partial,
    partial_most,
    partial_total,
    table_stride,
    query_stride,
    answer_stride,
    scale,
    window,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Program (sequence, key head, split): the query heads of one key head over a share of the
    keys. With one split the answer is final, otherwise ``combine_kernel`` joins the shares."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + sequence)
    row = tl.load(rows + sequence).to(tl.int64)
    first = 0
    if WINDOWED:
        first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), KEYS) * KEYS
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    member = tl.arange(0, ROWS)
    dim = tl.arange(0, WIDTH)
    head = kv_head * GROUP + member
    real = (member < GROUP)[:, None] & (dim < DIM)[None, :]
    place = head[:, None] * DIM + dim[None, :]
    asked = tl.load(query + row * query_stride + place, mask=real, other=0.0)
    own = tl.zeros((ROWS,), tl.int32) + length - 1  # all of them are of the last token
    most, total, sums = _attend(
        asked,
        own,
        keys,
        values,
        tables + sequence.to(tl.int64) * table_stride,
        begin,
        end,
        kv_head,
        scale,
        window,
        softcap,
        KV_HEADS,
        ROWS,
        DIM,
        WIDTH,
        BLOCK,
        KEYS,
        WINDOWED,
        CAPPED,
    )
    if SPLITS == 1:
        final = sums / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(answer + row * answer_stride + place, final.to(answer.dtype.element_ty), mask=real)
    else:
        part = (sequence * KV_HEADS * GROUP + head) * SPLITS + split
        tl.store(partial + part[:, None] * WIDTH + dim[None, :], sums, mask=real)
        tl.store(partial_most + part, most, mask=member < GROUP)
        tl.store(partial_total + part, total, mask=member < GROUP)


@triton.jit
def combine_kernel(
    partial,
    partial_most,
    partial_total,
    rows,
    answer,
    answer_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Program (sequence, head): joins the shares that ``decode_kernel`` left behind."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(rows + sequence).to(tl.int64)
    dim = tl.arange(0, WIDTH)
    part = (sequence * HEADS + head) * SPLITS + tl.arange(0, SPLITS)
    most = tl.load(partial_most + part)
    above = tl.max(most, 0)
    weight = tl.exp2(most - tl.where(above == float("-inf"), 0.0, above))
    total = tl.sum(weight * tl.load(partial_total + part), 0)
    real = (dim < DIM)[None, :] & (part >= 0)[:, None]
    sums = tl.load(partial + part[:, None] * WIDTH + dim[None, :], mask=real, other=0.0)
    final = tl.sum(weight[:, None] * sums, 0) / tl.where(total > 0.0, total, 1.0)
    place = row * answer_stride + head * DIM + dim
    tl.store(answer + place, final.to(answer.dtype.element_ty), mask=dim < DIM)


@triton.jit(do_not_specialize=["table_stride", "window"])
def prefill_kernel(
    query,
    keys,
    values,
    tables,
    tiles,
    begins,
    counts,
    starts,
    answer,
    table_stride,
    query_stride,
    answer_stride,
    scale,
    window,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Program (tile, head): ROWS tokens of one run, causally over all keys of their sequence."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // GROUP
    run = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1)
    count = tl.load(counts + run)
    start = tl.load(starts + run)
    member = first + tl.arange(0, ROWS)
    at_row = (tl.load(begins + run) + member).to(tl.int64)
    own = start + member
    dim = tl.arange(0, WIDTH)
    real = (member < count)[:, None] & (dim < DIM)[None, :]
    place = head * DIM + dim
    asked = tl.load(query + at_row[:, None] * query_stride + place[None, :], mask=real, other=0.0)
    end = start + tl.minimum(first + ROWS, count)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(start + first - window + 1, 0) // KEYS * KEYS
    _, total, sums = _attend(
        asked,
        own,
        keys,
        values,
        tables + run.to(tl.int64) * table_stride,
        begin,
        end,
        kv_head,
        scale,
        window,
        softcap,
        KV_HEADS,
        ROWS,
        DIM,
        WIDTH,
        BLOCK,
        KEYS,
        WINDOWED,
        CAPPED,
    )
    final = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(
        answer + at_row[:, None] * answer_stride + place[None, :],
        final.to(answer.dtype.element_ty),
        mask=real,
    )
