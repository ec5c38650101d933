"""Every Triton kernel, in Triton's interpreter, against its PyTorch twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cloudlm.engine.gpu import matrices
from cloudlm.engine.gpu.contract import TILE, Decoding, Heads, Look, Prefilling
from cloudlm.engine.gpu.torch_ops import TorchOperations
from cloudlm.engine.ops.rope import Rope, cos_sin

TWIN = TorchOperations()
BLOCKS, BLOCK = 40, 16
FLOATS = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def close(found: Tensor, wanted: Tensor) -> None:
    loose = found.dtype != torch.float32
    torch.testing.assert_close(
        found, wanted, rtol=2e-2 if loose else 1e-5, atol=2e-2 if loose else 1e-5
    )


def cache(kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (BLOCKS, BLOCK, kv_heads, dim)
    # What lies behind a sequence's end may be anything, and must not be looked at.
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def tables(lengths: list[int]) -> Tensor:
    width = max(1, max(-(-length // BLOCK) for length in lengths))
    order = torch.randperm(BLOCKS, dtype=torch.int32)
    picked = torch.zeros(len(lengths), width, dtype=torch.int32)
    begin = 0
    for row, length in enumerate(lengths):
        count = -(-length // BLOCK)
        picked[row, :count] = order[begin : begin + count]
        begin += count
    assert begin <= BLOCKS
    return picked


def ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (8, 1, 80), (3, 3, 16)])
@pytest.mark.parametrize(
    "look", [Look(0.2), Look(0.2, window=20), Look(0.3, softcap=2.0), Look(0.3, 5, 3.0)]
)
def test_decode(
    triton_operations: Any, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, look: Look
) -> None:
    """Lengths at the edges of blocks and of tiles, a long one that is split, and padding."""
    lengths = [1, 16, 17, 64, 65, 200, 0]
    query = torch.randn(9, heads, dim).to(dtype)
    plan = Decoding(ints([8, 0, 3, 2, 5, 4, 6]), tables(lengths), ints(lengths), longest=256)
    kept = cache(kv_heads, dim, dtype)
    found, wanted = (torch.full_like(query, 7.0) for _ in range(2))
    triton_operations.decode(query, kept, plan, look, found)
    TWIN.decode(query, kept, plan, look, wanted)
    close(found, wanted)
    assert bool((found[6] == 0).all()), "padding"
    assert bool((found[1] == 7).all()), "a row that is not planned"


def test_decode_uses_as_many_splits_as_fill_the_device(triton_operations: Any) -> None:
    splits = triton_operations._splits
    assert [splits(2, longest) for longest in (1, 128, 129, 256, 300, 10**6)] == [1, 1, 2, 2, 2, 4]
    assert splits(8, 10**6) == 1 and splits(9, 10**6) == 1
    assert splits(1, 10**6) == 8


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "look", [Look(0.2), Look(0.2, window=20), Look(0.3, softcap=2.0), Look(0.3, 5, 3.0)]
)
def test_prefill(triton_operations: Any, dtype: torch.dtype, look: Look) -> None:
    """Whole prompts, a chunk in the middle of one, and few tokens at the end of a long one."""
    heads, kv_heads, dim = 4, 2, 24
    starts, counts = [0, 40, 150], [70, 33, 2]
    begins = [3, 73, 106]
    tiles = [(run, at) for run, count in enumerate(counts) for at in range(0, count, TILE)]
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    plan = Prefilling(ints(tiles), ints(begins), ints(counts), ints(starts), tables(ends))
    query = torch.randn(110, heads, dim).to(dtype)
    kept = cache(kv_heads, dim, dtype)
    found, wanted = (torch.full_like(query, 7.0) for _ in range(2))
    triton_operations.prefill(query, kept, plan, look, found)
    TWIN.prefill(query, kept, plan, look, wanted)
    close(found, wanted)
    assert bool((found[:3] == 7).all() and (found[108:] == 7).all()), "rows of nobody"


def test_what_lies_behind_a_sequence_is_never_seen(triton_operations: Any) -> None:
    """NaN in slots of others, or not yet written, changes nothing."""
    heads, dim, length = 2, 16, 21
    clean = tuple(torch.randn(BLOCKS, BLOCK, heads, dim) for _ in range(2))
    table = ints([[3, 5]])
    dirty = tuple(torch.full_like(blocks, torch.nan) for blocks in clean)
    for blocks, source in zip(dirty, clean, strict=True):
        blocks[3], blocks[5, : length - BLOCK] = source[3], source[5, : length - BLOCK]
    query = torch.randn(1, heads, dim)
    answers = []
    for kept in (clean, dirty):
        answer = torch.empty_like(query)
        plan = Decoding(ints([0]), table, ints([length]), longest=32)
        triton_operations.decode(query, kept, plan, Look(0.25), answer)
        answers.append(answer)
    assert torch.equal(answers[1], answers[0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 80), (1, 2050)])
def test_rms_norm(
    triton_operations: Any, dtype: torch.dtype, offset: bool, shape: tuple[int, ...]
) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    found = triton_operations.rms_norm(x, weight, 1e-5, offset=offset)
    close(found, TWIN.rms_norm(x, weight, 1e-5, offset=offset))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated(triton_operations: Any, dtype: torch.dtype, activation: str) -> None:
    fused = (4 * torch.randn(3, 2 * 1100)).to(dtype)
    close(triton_operations.gated(fused, activation), TWIN.gated(fused, activation))


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's NumPy, of the infinity
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("normed", ["none", "plain", "offset"])
@pytest.mark.parametrize(("dim", "turned"), [(32, 32), (80, 80), (64, 16)])
def test_rotate_and_store(
    triton_operations: Any, dtype: torch.dtype, normed: str, dim: int, turned: int
) -> None:
    queries, keys, tokens = 4, 2, 5
    norm = [torch.randn(dim).to(dtype) if normed != "none" else None for _ in range(2)]
    heads = Heads(queries, keys, dim, norm[0], norm[1], 1e-5, offset=normed == "offset")
    fused = torch.randn(tokens, (queries + 2 * keys) * dim).to(dtype)
    fused[2, queries * dim] = torch.inf  # a key
    fused[3, -1] = torch.nan  # a value
    rope = Rope(turned, 1e4)
    frequencies = rope.scaling.frequencies(turned, 1e4, 256)
    turn = cos_sin(ints([0, 1, 7, 99, 255]), frequencies, 1.0, dtype)
    slots = ints([5, 100, 17, 16, 639])
    both = [cache(keys, dim, dtype) for _ in range(2)]
    for one, other in zip(*both, strict=True):
        other.copy_(one)
    found = triton_operations.rotate_and_store(fused, heads, turn, slots, both[0])
    wanted = TWIN.rotate_and_store(fused, heads, turn, slots, both[1])
    close(found, wanted)
    for one, other in zip(*both, strict=True):
        close(one, other)
        assert bool(one.isfinite().all())


def test_store(triton_operations: Any) -> None:
    """Keys and values as slices of one matrix, as some families have them."""
    fused = torch.randn(3, 6, 24)
    fused[1, 3, 5] = -torch.inf
    both = [cache(2, 24, torch.float32) for _ in range(2)]
    for one, other in zip(*both, strict=True):
        other.copy_(one)
    slots = ints([639, 0, 50])
    triton_operations.store(fused[:, 2:4], fused[:, 4:], slots, both[0])
    TWIN.store(fused[:, 2:4], fused[:, 4:], slots, both[1])
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 17, 70])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(
    triton_operations: Any, dtype: torch.dtype, bits: int, rows: int, biased: bool
) -> None:
    """Few rows and many, inputs that fill no whole group, outputs that fill no whole tile."""
    matrix = matrices.pack(torch.randn(50, 200).to(dtype), bits)
    x = torch.randn(rows, 200).to(dtype)
    bias = torch.randn(50).to(dtype) if biased else None
    found = triton_operations.linear(x, matrix, bias)
    exact = TWIN.linear(x.float(), matrix, bias)
    torch.testing.assert_close(
        found.float(), exact, rtol=2e-2, atol=0.2 if dtype == torch.bfloat16 else 1e-3
    )


def test_sums_of_codes_need_not_fit_into_float16(triton_operations: Any) -> None:
    matrix = matrices.pack(torch.full((4, 1024), 0.01), 8)  # every code is 127
    found = triton_operations.linear(torch.ones(70, 1024, dtype=torch.float16), matrix, None)
    torch.testing.assert_close(found, torch.full((70, 4), 10.24).half(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_unpack_int4(triton_operations: Any, dtype: torch.dtype) -> None:
    from cloudlm.engine.gpu.triton_ops import unpack_int4

    matrix = matrices.pack(torch.randn(5, 2500), 4)
    # The interpreter cuts to bfloat16 where a GPU rounds.
    torch.testing.assert_close(
        unpack_int4(matrix, dtype),
        matrices.unpacked(matrix, dtype),
        rtol=2**-7 if dtype == torch.bfloat16 else 0,
        atol=0,
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_packing_keeps_the_codes_of_the_cpu_path(bits: int) -> None:
    """The same numbers as ``native.packing`` quantises to, asymmetric ones too."""
    from cloudlm.engine.native.packing import quantize_int4, quantize_int8

    weight = torch.randn(7, 200)
    if bits == 8:
        eight = quantize_int8(weight)
        matrix = matrices.unpacked(matrices.arrange_int8(eight), torch.float32)
        assert torch.equal(matrix, eight.codes.float() * eight.scale[:, None])
        return
    for symmetric in (True, False):
        four = quantize_int4(weight, 64, symmetric=symmetric)
        scale = four.scale.repeat_interleave(64, 1)[:, :200]
        zeros = torch.full_like(four.scale, 8.0) if four.zeros is None else four.zeros.float()
        wanted = (four.codes.float() - zeros.repeat_interleave(64, 1)[:, :200]) * scale
        found = matrices.unpacked(matrices.arrange_int4(four), torch.float32)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
