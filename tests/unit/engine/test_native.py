"""The native kernels against PyTorch, for every instruction set that this machine has; building,
and what happens where nothing can be built. Everything is compiled into the test run's own folder.

Tolerances, relative to the largest value: float32 results 2e-5; 2e-3 where inputs are quantised to
8 bits (a code may round the other way); bf16 results 2**-7, one unit in their last place.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cloudlm.core.cache_folder import UNUSED_S, native_folder
from cloudlm.engine.native import build, load_kernels
from cloudlm.engine.native.cache import MAX_HEAD_DIM
from cloudlm.engine.native.plan import MAX_KEYS, Query, plan_attention

if TYPE_CHECKING:
    from torch import Tensor

    from cloudlm.engine.native.contract import Kernels, LayerCache, Rotary

torch = pytest.importorskip("torch")

needs_compiler = pytest.mark.skipif(
    build.find_compiler() is None or not build.instruction_sets(),
    reason="no C++ compiler on PATH, or a CPU without AVX2",
)
PRECISIONS = ("bf16", "int8", "int4-32", "int4-64", "int4-128", "int4-64-zeros", "int4-192")
TOKENS = (1, 2, 3, 4, 7, 16, 17, 33, 70, 530)
UNIT = 2**-7


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="module", params=build.instruction_sets() or ["none"])
def kernels(request: pytest.FixtureRequest, cache_folder: Path) -> Kernels:
    if build.find_compiler() is None or request.param == "none":
        pytest.skip("no C++ compiler on PATH, or a CPU without AVX2")
    from cloudlm.engine.native.library import NativeKernels

    path = build.library(request.param, cache_folder)
    assert path is not None, "the build failed: see the log"
    return NativeKernels(path, request.param, threads=2)


@pytest.fixture(scope="module")
def reference() -> Kernels:
    from cloudlm.engine.native.fallback import TorchKernels

    return TorchKernels()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(3)


def off(answer: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value; infinite if either is not finite."""
    wide, right = answer.double(), expected.double()
    if not bool(wide.isfinite().all() and right.isfinite().all()):
        return float("inf")
    return float((wide - right).abs().max() / right.abs().max())


def weight_of(precision: str, matrix: Tensor) -> Tensor | object:
    from cloudlm.engine.native.packing import quantize_int4, quantize_int8

    kind, *details = precision.split("-")
    if kind == "bf16":
        return matrix
    if kind == "int8":
        return quantize_int8(matrix)
    return quantize_int4(matrix, int(details[0]), symmetric=len(details) == 1)


# ---- linear ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_linear_agrees_for_all_shapes_and_paths(
    kernels: Kernels, reference: Kernels, precision: str, gated: bool
) -> None:
    for rows, inputs in ((70, 100), (256, 384)):
        matrix = (torch.randn(rows, inputs) * 0.05).bfloat16()
        bias = torch.randn(rows)
        weight = weight_of(precision, matrix)
        for planes in (1, 2):
            own = kernels.pack(weight, gated=gated, bias=bias, planes=planes)
            right = reference.pack(weight, gated=gated, bias=bias, planes=planes)
            allowed = 2e-3 if planes == 1 and precision != "bf16" else 2e-5
            for tokens in TOKENS:
                x = torch.randn(tokens, inputs)
                expected = reference.linear(right, x, torch.empty(tokens, own.outputs))
                for path in ("auto", "vector", "tiles"):
                    answer = kernels.linear(own, x, torch.empty(tokens, own.outputs), path=path)
                    assert off(answer, expected) < allowed, (rows, planes, tokens, path)


@pytest.mark.parametrize("shape", [(1, 64), (45, 70), (96, 32), (130, 200)])
def test_rows_of_a_plain_matrix_come_out_as_they_went_in(
    kernels: Kernels, reference: Kernels, shape: tuple[int, int]
) -> None:
    matrix = torch.randn(shape).bfloat16()
    numbers = torch.tensor([0, shape[0] - 1, *range(0, shape[0], 7), 0])
    for made in (kernels, reference):
        packed = made.pack(matrix)
        found = made.rows(packed, numbers)
        assert found is not None and torch.equal(found, matrix[numbers])
        assert torch.equal(made.rows(packed, numbers[:0]), matrix[:0])
        for outside in (shape[0], -shape[0] - 1):
            with pytest.raises(IndexError):
                made.rows(packed, torch.tensor([outside]))


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_rows_that_packing_changed_are_not_had(
    kernels: Kernels, reference: Kernels, precision: str
) -> None:
    matrix = torch.randn(64, 192).bfloat16()
    one = torch.tensor([1])
    for made in (kernels, reference):
        assert made.rows(made.pack(weight_of(precision, matrix)), one) is None
        assert made.rows(made.pack(matrix, gated=True), one) is None
        assert made.rows(made.pack(matrix, bias=torch.ones(64)), one) is None


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("path", ["vector", "tiles"])
def test_a_row_does_not_depend_on_the_other_rows(
    kernels: Kernels, precision: str, path: str
) -> None:
    weight = kernels.pack(weight_of(precision, torch.randn(96, 256).bfloat16()))
    x = torch.randn(70, 256)
    together = kernels.linear(weight, x, torch.empty(70, 96), path=path)
    for row in (0, 1, 17, 40, 69):
        alone = kernels.linear(weight, x[row : row + 1], torch.empty(1, 96), path=path)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_deep_weights_and_long_prompts_are_cut_without_a_trace(
    kernels: Kernels, precision: str
) -> None:
    weight = kernels.pack(weight_of(precision, torch.randn(72, 4224).bfloat16()))
    x = torch.randn(530, 4224)
    together = kernels.linear(weight, x, torch.empty(530, 72), path="tiles")
    for begin, end in ((0, 5), (250, 270), (511, 514), (525, 530)):
        few = kernels.linear(weight, x[begin:end], torch.empty(end - begin, 72), path="tiles")
        assert torch.equal(few, together[begin:end])


@pytest.mark.parametrize("precision", PRECISIONS[1:])
@pytest.mark.parametrize("planes", [1, 2])
def test_quantised_products_do_not_depend_on_the_path(
    kernels: Kernels, precision: str, planes: int
) -> None:
    weight = kernels.pack(
        weight_of(precision, torch.randn(64, 320).bfloat16()), gated=True, planes=planes
    )
    x = torch.randn(37, 320).bfloat16()
    by_vector = kernels.linear(weight, x, torch.empty(37, 32), path="vector")
    assert torch.equal(by_vector, kernels.linear(weight, x, torch.empty(37, 32), path="tiles"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("outputs", [35, 64])
def test_a_gate_is_to_the_bit_what_the_gated_product_makes_of_it(
    kernels: Kernels, reference: Kernels, precision: str, outputs: int
) -> None:
    matrix, bias = torch.randn(2 * outputs, 192).bfloat16() * 0.1, torch.randn(2 * outputs)
    x = torch.randn(37, 192)
    plain = reference.pack(weight_of(precision, matrix), bias=bias)
    exact = reference.linear(plain, x, torch.empty(37, 2 * outputs))
    for one in (kernels, reference):
        weight = one.pack(weight_of(precision, matrix), gated=True, bias=bias)
        ungated, order = one.ungated(weight)
        sums = one.linear(ungated, x, torch.empty(37, ungated.outputs))
        there = order >= 0
        assert sorted(order[there].tolist()) == list(range(2 * outputs))
        assert off(sums[:, there], exact[:, order[there]]) < 2e-5
        for kind in (torch.float32, torch.bfloat16):
            expected = one.linear(weight, x, torch.empty(37, outputs, dtype=kind))
            answer = one.gate(weight, sums, torch.empty(37, outputs, dtype=kind))
            assert torch.equal(answer, expected)


def test_linear_norms_adds_and_rounds(kernels: Kernels, reference: Kernels) -> None:
    matrix = torch.randn(64, 200).bfloat16()
    own, right = kernels.pack(matrix), reference.pack(matrix)
    wide = torch.randn(9, 300)
    x, norm = wide[:, :200], torch.rand(200)  # rows that do not touch
    start = torch.randn(9, 64)
    answer = kernels.linear(own, x, start.clone(), add=True, norm=norm, eps=1e-5)
    expected = reference.linear(right, x, start.clone(), add=True, norm=norm, eps=1e-5)
    assert off(answer, expected) < UNIT  # the normed inputs are rounded to bf16 in both
    narrow = torch.zeros(9, 80, dtype=torch.bfloat16)
    kernels.linear(own, x.bfloat16(), narrow[:, 8:72])
    expected = reference.linear(right, x.bfloat16(), torch.empty(9, 64))
    assert off(narrow[:, 8:72], expected) < UNIT
    assert not narrow[:, :8].any() and not narrow[:, 72:].any()


def test_extremes_of_quantisation_do_not_overflow(kernels: Kernels, reference: Kernels) -> None:
    from cloudlm.engine.native.packing import Int4Weight, Int8Weight

    inputs = 4096
    for sign in (1, -1):
        codes = torch.full((32, inputs), 127 * sign, dtype=torch.int8)
        eight = Int8Weight(codes, torch.ones(32))
        zeros = torch.full((32, inputs // 128), 0 if sign > 0 else 15, dtype=torch.uint8)
        codes = torch.full((32, inputs), 15 if sign > 0 else 0, dtype=torch.uint8)
        four = Int4Weight(codes, torch.ones(32, inputs // 128), zeros, 128)
        x = torch.full((5, inputs), -3.0)
        for weight in (eight, four):
            for planes in (1, 2):
                own = kernels.pack(weight, planes=planes)
                right = reference.pack(weight, planes=planes)
                expected = reference.linear(right, x, torch.empty(5, 32))
                for path in ("vector", "tiles"):
                    answer = kernels.linear(own, x, torch.empty(5, 32), path=path)
                    assert off(answer, expected) < 1e-6


def test_a_last_step_that_is_half_of_padding_counts_for_nothing(
    kernels: Kernels, reference: Kernels
) -> None:
    """96 inputs in groups of 32 make three groups; the kernels compute in steps of 64."""
    matrix, x = torch.randn(64, 96).bfloat16(), torch.randn(5, 96)
    weight = weight_of("int4-32", matrix)
    for _ in range(4):  # what lies behind the scales is seldom zero
        own, right = kernels.pack(weight), reference.pack(weight)
        answer = kernels.linear(own, x, torch.empty(5, 64))
        assert off(answer, reference.linear(right, x, torch.empty(5, 64))) < 2e-5


@pytest.mark.parametrize("planes", [1, 2])
def test_the_least_number_of_8_bits_is_as_good_as_any(
    kernels: Kernels, reference: Kernels, planes: int
) -> None:
    """Our own quantisation never has it, others' does."""
    from cloudlm.engine.native.packing import Int8Weight

    codes = torch.randint(-128, 128, (64, 192), dtype=torch.int8)
    codes[::3] = -128
    weight = Int8Weight(codes, torch.rand(64))
    x = torch.randn(9, 192).sign()  # every quantised input is as large as it can be
    own, right = (one.pack(weight, planes=planes) for one in (kernels, reference))
    expected = reference.linear(right, x, torch.empty(9, 64))
    for path in ("vector", "tiles"):
        answer = kernels.linear(own, x, torch.empty(9, 64), path=path)
        assert off(answer, expected) < 2e-5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_finite_is_not_hidden(kernels: Kernels, precision: str) -> None:
    weight = kernels.pack(weight_of(precision, torch.randn(32, 64).bfloat16()))
    for poison in (float("nan"), float("inf")):
        x = torch.randn(2, 64)
        x[0, 5] = poison
        answer = kernels.linear(weight, x, torch.empty(2, 32))
        assert not answer[0].isfinite().any()
        assert answer[1].isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_stay_close_to_the_matrix(reference: Kernels, bits: int) -> None:
    matrix = torch.randn(64, 256)
    x = torch.randn(8, 256)
    weight = weight_of("int8" if bits == 8 else "int4-32", matrix)
    packed = reference.pack(weight)
    assert off(reference.linear(packed, x, torch.empty(8, 64)), x @ matrix.T) < 2.0 ** (2 - bits)


def test_scales_of_four_bits_are_searched_alike_everywhere(
    kernels: Kernels, reference: Kernels
) -> None:
    from cloudlm.engine.native.packing import Int4Weight

    matrix = torch.randn(70, 300) * torch.logspace(-9, 4, 70)[:, None]
    matrix[3] = 0.0
    matrix[4, ::7] *= 50.0
    matrix[5] = 1.0
    matrix[6] = torch.arange(300) % 17 - 8.0
    weight = matrix.bfloat16()
    for group in (32, 64, 128, 192, 8192):
        own, right = (each.quantize_int4(weight, group) for each in (kernels, reference))
        assert isinstance(own, Int4Weight) and own.zeros is None and own.group == group
        assert torch.equal(own.scale, right.scale), group
        assert torch.equal(own.codes, right.codes), group


def test_what_is_not_finite_stays_so_in_four_bits(kernels: Kernels, reference: Kernels) -> None:
    weight = torch.randn(2, 128).bfloat16()
    weight[0, 5] = float("nan")
    weight[1, 6] = float("-inf")
    for each in (kernels, reference):
        assert not each.quantize_int4(weight, 128).scale.isfinite().any()


@pytest.mark.parametrize("group", [32, 128])
def test_the_searched_scale_loses_less_than_that_of_the_largest_value(group: int) -> None:
    from cloudlm.engine.native.packing import quantize_int4

    matrix = torch.randn(128, 512)
    found = quantize_int4(matrix, group)
    scale = found.scale.repeat_interleave(group, 1)
    lost = (matrix - scale * (found.codes.float() - 8)).view(128, -1, group).square().sum(2)
    most = matrix.view(128, -1, group)
    most = most.gather(2, most.abs().argmax(2, keepdim=True)) / -8
    codes = (matrix.view(128, -1, group) / most).round().clamp(-8, 7)
    plain = (matrix.view(128, -1, group) - codes * most).square().sum(2)
    assert (lost <= plain * 1.01).all()  # codes are chosen among 256ths, scales in float16
    assert lost.sum() < (0.92 if group == 128 else 0.95) * plain.sum()


def test_tiny_scales_keep_their_precision() -> None:
    from cloudlm.engine.native.packing import split_scale

    scale = torch.rand(16, 4) * 1e-6 + 1e-7
    halves, factor = split_scale(scale)
    assert off(halves.float() * factor[:, None], scale) < 1e-3
    exact = scale.half().float() * 1024
    halves, factor = split_scale(exact)
    assert torch.equal(halves.float() * factor[:, None], exact)


def test_matrices_of_different_kinds_or_groups_are_not_joined() -> None:
    from cloudlm.engine.native.packing import join, quantize_int4, quantize_int8

    weight = torch.randn(32, 128)
    eight, wide, narrow = (
        quantize_int8(weight),
        quantize_int4(weight, 64),
        quantize_int4(weight, 32),
    )
    for parts in ((eight, wide), (wide, eight), (wide, narrow)):
        assert join(parts) is None
    both = join((wide, wide))
    assert both is not None and torch.equal(both.codes[32:], wide.codes)


def test_wrong_shapes_are_refused(kernels: Kernels) -> None:
    weight = kernels.pack(torch.randn(32, 64).bfloat16())
    with pytest.raises(ValueError, match=r"x is \(2, 63\), expected \(2, 64\)"):
        kernels.linear(weight, torch.empty(2, 63), torch.empty(2, 32))
    with pytest.raises(ValueError, match=r"out is \(3, 32\), expected \(2, 32\)"):
        kernels.linear(weight, torch.empty(2, 64), torch.empty(3, 32))
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        kernels.linear(weight, torch.empty(2, 64, dtype=torch.float64), torch.empty(2, 32))
    with pytest.raises(ValueError, match="added to float32 only"):
        narrow = torch.empty(2, 32, dtype=torch.bfloat16)
        kernels.linear(weight, torch.empty(2, 64), narrow, add=True)


# ---- the small operations ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 1024])
def test_norms_agree(kernels: Kernels, reference: Kernels, size: int) -> None:
    x, weight = torch.randn(70, size).bfloat16(), torch.randn(size)
    for residual in (None, torch.randn(70, size)):
        answers, kept = [], []
        for one in (kernels, reference):
            kept.append(None if residual is None else residual.clone())
            out = torch.empty(70, size)
            answers.append(one.rms_norm(x, weight, 1e-6, out, residual=kept[-1]))
        assert off(*answers) < 2e-5
        if residual is not None:
            assert torch.equal(kept[0], kept[1])
            assert torch.equal(kept[0], residual + x)


def layer_cache(blocks: int, kv_heads: int, dim: int, block_size: int) -> LayerCache:
    from cloudlm.engine.native.contract import LayerCache

    memory = torch.randn(2, blocks, kv_heads, block_size * dim).bfloat16()
    return LayerCache(memory[0], memory[1], block_size)


def rotary_of(heads: int, kv_heads: int, dim: int, tokens: int, *, normed: bool) -> Rotary:
    from cloudlm.engine.native.contract import Rotary

    angles = torch.randn(tokens, dim // 2)
    norms = (torch.rand(dim), torch.rand(dim)) if normed else (None, None)
    return Rotary(heads, kv_heads, dim, angles.cos(), angles.sin(), *norms)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "size"),
    [(4, 2, 128, 32), (3, 3, 96, 64), (2, 1, MAX_HEAD_DIM, 32)],
)
def test_rope_store_agrees_and_puts_keys_where_they_belong(
    kernels: Kernels,
    reference: Kernels,
    heads: int,
    kv_heads: int,
    dim: int,
    size: int,
    normed: bool,
) -> None:
    from cloudlm.engine.native.cache import unpack_keys, unpack_values

    tokens, blocks = 37, 9
    own, right = layer_cache(blocks, kv_heads, dim, size), layer_cache(blocks, kv_heads, dim, size)
    right.keys.copy_(own.keys)
    right.values.copy_(own.values)
    rotary = rotary_of(heads, kv_heads, dim, tokens, normed=normed)
    slots = torch.tensor(random.Random(1).sample(range(blocks * size), tokens))
    slots[4] = -1
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).bfloat16()
    qkv[2, -1] = float("inf")
    query = kernels.rope_store(qkv.clone(), rotary, slots, own)
    expected = reference.rope_store(qkv.clone(), rotary, slots, right)
    assert off(query, expected) < UNIT
    assert off(own.keys, right.keys) < UNIT
    assert torch.equal(own.values, right.values)
    plain = qkv.unflatten(1, (-1, dim))[:, -kv_heads:].nan_to_num(0.0, 0.0, 0.0)
    stored = unpack_values(own.values, dim).flatten(0, 1)
    kept = slots >= 0
    assert torch.equal(stored[slots[kept]], plain[kept])
    if not normed:  # a turn keeps every head's length
        lengths = unpack_keys(own.keys, dim).flatten(0, 1)[slots[kept]].float().norm(dim=-1)
        before = qkv.unflatten(1, (-1, dim))[:, heads : heads + kv_heads][kept].float()
        assert off(lengths, before.norm(dim=-1)) < UNIT


@pytest.mark.parametrize("dim", [48, MAX_HEAD_DIM + 32])
def test_heads_that_the_library_has_no_room_for_are_refused(kernels: Kernels, dim: int) -> None:
    """It computes a head on its stack: a longer one would be written over what stands behind."""
    from cloudlm.engine.native.contract import StackLayer

    cache, rotary = layer_cache(2, 1, dim, 32), rotary_of(1, 1, dim, 1, normed=False)
    plan = plan_attention([Query(1100, 1, [0] * 35)], 32)
    query, words = torch.randn(1, dim).bfloat16(), "multiple of 32 up to 512"
    with pytest.raises(ValueError, match=words):
        qkv = torch.randn(1, 3 * dim).bfloat16()
        kernels.rope_store(qkv, rotary, torch.tensor([0]), cache)
    with pytest.raises(ValueError, match=words):
        kernels.attention(query, cache, plan, torch.empty_like(query), 1.0)
    layer = StackLayer(
        qkv=kernels.pack(torch.randn(3 * dim, 64).bfloat16()),
        out=kernels.pack(torch.randn(64, dim).bfloat16()),
        gate_up=kernels.pack(torch.randn(64, 64).bfloat16(), gated=True),
        down=kernels.pack(torch.randn(64, 32).bfloat16()),
        input_norm=torch.ones(64),
        post_norm=torch.ones(64),
        cache=cache,
    )
    stack, hidden = kernels.stack([layer]), torch.randn(1, 64)
    with pytest.raises(ValueError, match=words):
        kernels.run_stack(stack, hidden, rotary, torch.tensor([0]), [plan], 1.0)


def test_the_sources_have_room_for_the_longest_head() -> None:
    header = (build.SOURCES / "kernels.h").read_text("utf-8")
    assert f"constexpr int MAX_HEAD_DIM = {MAX_HEAD_DIM};" in header
    sources = "".join(path.read_text("utf-8") for path in build.SOURCES.glob("*.cpp"))
    assert sources.count("[MAX_HEAD_DIM]") == 2


# ---- attention --------------------------------------------------------------------------------


def naive_attention(
    query: Tensor, cache: LayerCache, queries: list[Query], window: int | None, dim: int
) -> Tensor:
    """Token by token in float64, straight from the definition."""
    from cloudlm.engine.native.cache import unpack_keys, unpack_values

    keys, values = unpack_keys(cache.keys, dim).double(), unpack_values(cache.values, dim).double()
    heads, kv_heads = query.shape[1] // dim, keys.shape[2]
    answers = []
    rows = iter(query.double().unflatten(1, (heads, dim)))
    for asked in queries:
        table = torch.tensor(list(asked.table))
        key, value = keys[table].flatten(0, 1), values[table].flatten(0, 1)
        for position in range(asked.start, asked.start + asked.count):
            first = 0 if window is None else max(0, position + 1 - window)
            spread = heads // kv_heads
            seen = key[first : position + 1].repeat_interleave(spread, 1)
            scores = torch.einsum("hd,shd->hs", next(rows), seen) * dim**-0.5
            seen = value[first : position + 1].repeat_interleave(spread, 1)
            answers.append(torch.einsum("hs,shd->hd", scores.softmax(1), seen).flatten())
    return torch.stack(answers)


def batches(size: int, blocks: int) -> dict[str, tuple[list[Query], int | None]]:
    draw = random.Random(5)

    def table(tokens: int) -> list[int]:
        return [draw.randrange(blocks) for _ in range(-(-tokens // size))]

    prefix = table(256)
    ends = (0, 5, 31, 32, 100, 500, MAX_KEYS - 1, MAX_KEYS, 2 * MAX_KEYS + 7)
    decode = [Query(start, 1, table(start + 1)) for start in ends]
    chunk = Query(77, 33, table(110))
    followers = [Query(256 + 9 * i, 1, prefix + table(9 * i + 1)) for i in range(20)]
    return {
        "decode": (decode, None),
        "window": ([*decode[:-1], chunk], 50),
        "prefill": ([Query(0, 100, table(100)), decode[5], chunk], None),
        "shared": ([*followers, chunk], None),
    }


@pytest.mark.parametrize("case", ["decode", "window", "prefill", "shared"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "size"),
    [(4, 2, 128, 32), (4, 1, 64, 64), (6, 2, 96, 32), (2, 1, MAX_HEAD_DIM, 32)],
)
def test_attention_agrees(
    kernels: Kernels,
    reference: Kernels,
    case: str,
    heads: int,
    kv_heads: int,
    dim: int,
    size: int,
) -> None:
    cache = layer_cache(80, kv_heads, dim, size)
    queries, window = batches(size, 80)[case]
    plan = plan_attention(queries, size, window=window)
    query = torch.randn(plan.tokens, heads * dim).bfloat16()
    exact = naive_attention(query, cache, queries, window, dim)
    own = kernels.attention(query, cache, plan, torch.empty_like(query), dim**-0.5)
    torch_answer = reference.attention(query, cache, plan, torch.empty_like(query), dim**-0.5)
    assert off(own, exact) < UNIT
    assert off(torch_answer, exact) < UNIT


def test_a_token_attends_alike_whatever_else_is_in_the_batch(kernels: Kernels) -> None:
    cache = layer_cache(80, 2, 64, 32)
    queries = batches(32, 80)["decode"][0]
    query = torch.randn(len(queries), 4 * 64).bfloat16()
    together = plan_attention(queries, 32, share=False)
    answer = kernels.attention(query, cache, together, torch.empty_like(query), 0.1)
    for row, one in enumerate(queries):
        alone = query[row : row + 1]
        plan = plan_attention([one], 32, share=False)
        expected = kernels.attention(alone, cache, plan, torch.empty_like(alone), 0.1)
        assert torch.equal(answer[row], expected[0])


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("start", [20, MAX_KEYS - 3, 2 * MAX_KEYS - 1])
def test_drafts_attend_as_single_tokens_would(
    kernels: Kernels, start: int, window: int | None
) -> None:
    cache = layer_cache(80, 2, 64, 32)
    table = list(range(70))
    query = torch.randn(6, 4 * 64).bfloat16()
    plan = plan_attention([Query(start, 6, table, alike=True)], 32, window=window)
    answer = kernels.attention(query, cache, plan, torch.empty_like(query), 0.1)
    for row in range(6):
        alone = query[row : row + 1]
        plan = plan_attention([Query(start + row, 1, table)], 32, window=window)
        expected = kernels.attention(alone, cache, plan, torch.empty_like(alone), 0.1)
        assert torch.equal(answer[row], expected[0])


@pytest.mark.parametrize("window", [None, 70, 1500])
def test_alike_tokens_attend_alike_however_their_prompts_are_cut(
    kernels: Kernels, window: int | None
) -> None:
    """Cut anywhere, beside others that share its keys: what counts is the position."""
    chance = random.Random(4)
    cache = layer_cache(80, 2, 64, 32)
    table = [*range(20, 80), *range(12)]
    positions = (0, 1, 31, 32, 100, MAX_KEYS - 1, MAX_KEYS, MAX_KEYS + 40, 2 * MAX_KEYS + 5)
    query = torch.randn(len(table) * 32, 4 * 64).bfloat16()

    def attend(parts: list[tuple[int, int]]) -> torch.Tensor:
        """The answers of parts of one sequence, each as a sequence of its own."""
        queries = [Query(start, count, table, alike=True) for start, count in parts]
        asked = torch.cat([query[start : start + count] for start, count in parts])
        plan = plan_attention(queries, 32, window=window)
        return kernels.attention(asked, cache, plan, torch.empty_like(asked), 0.1)

    alone = {position: attend([(position, 1)])[0] for position in positions}
    for _ in range(12):
        begins = [max(0, position - chance.randrange(60)) for position in positions]
        parts = [
            (begin, position - begin + chance.randint(1, 50))
            for begin, position in zip(begins, positions, strict=True)
        ]
        if chance.random() < 0.3:  # single tokens, which share what stands before them
            parts = [(position, 1) for position in positions]
        order = chance.sample(range(len(parts)), chance.randint(1, len(parts)))
        answers = attend([parts[at] for at in order]).split([parts[at][1] for at in order])
        for at, answer in zip(order, answers, strict=True):
            place = positions[at] - parts[at][0]
            assert torch.equal(answer[place], alone[positions[at]])


def test_alike_tokens_share_whole_stretches_only(kernels: Kernels) -> None:
    """Sixteen behind the same 2,080 tokens read 2,048 of them once, with each one's own answers."""
    cache = layer_cache(120, 2, 64, 32)
    head, start = list(range(65)), 2 * MAX_KEYS + 33
    queries = [Query(start, 1, [*head, 65 + i], alike=True) for i in range(16)]
    plan = plan_attention(queries, 32)
    shared = [piece[3:5] for piece in plan.pieces.tolist() if piece[1] == 16]
    assert shared == [[0, MAX_KEYS], [MAX_KEYS, 2 * MAX_KEYS]]
    query = torch.randn(16, 4 * 64).bfloat16()
    together = kernels.attention(query, cache, plan, torch.empty_like(query), 0.1)
    for row, one in enumerate(queries):
        asked = query[row : row + 1]
        alone = kernels.attention(
            asked, cache, plan_attention([one], 32), torch.empty_like(asked), 0.1
        )
        assert torch.equal(together[row], alone[0])


def test_slots_beyond_the_limit_are_never_seen(kernels: Kernels) -> None:
    cache = layer_cache(2, 1, 64, 32)
    query = torch.randn(1, 64).bfloat16()
    plan = plan_attention([Query(36, 1, [0, 1])], 32)
    before = kernels.attention(query, cache, plan, torch.empty_like(query), 1.0)
    from cloudlm.engine.native.cache import key_places, value_places

    key_places(cache.keys, 64)[1, 0, 5:] = 1e30
    key_places(cache.keys, 64)[1, 1] = 1e30
    value_places(cache.values, 64)[1, 2, 1] = 1e30
    value_places(cache.values, 64)[1, 3:] = 1e30
    assert torch.equal(before, kernels.attention(query, cache, plan, torch.empty_like(query), 1.0))


def test_shared_keys_become_one_piece() -> None:
    prefix = list(range(8))
    queries = [Query(256 + i, 1, [*prefix, 20 + i]) for i in range(5)]
    plan = plan_attention([*queries, Query(300, 1, list(range(40, 50)))], 32)
    shared = [piece for piece in plan.pieces.tolist() if piece[1] == 5]
    assert [piece[3:5] for piece in shared] == [[0, 256]]
    own = sorted(piece[3:5] for piece in plan.pieces.tolist() if piece[1] == 1)
    assert own == [[0, 301], *([256, 257 + i] for i in range(5))]
    assert plan.parts == 10 and len(plan.merge_parts) == 10


def test_a_block_that_is_still_written_is_not_shared() -> None:
    table = list(range(9))
    plan = plan_attention([Query(270, 1, table), Query(280, 1, table)], 32)
    assert sorted(piece[3:5] for piece in plan.pieces.tolist()) == [
        [0, 256],
        [256, 271],
        [256, 281],
    ]


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4-64"])
def test_a_stack_is_its_layers_one_by_one(
    kernels: Kernels, reference: Kernels, precision: str
) -> None:
    from dataclasses import replace

    from cloudlm.engine.native.contract import StackLayer
    from cloudlm.engine.native.fallback import run_layers

    size, heads, kv_heads, dim, inner = 96, 4, 2, 64, 160
    tables = [[3, 1], [5], [0, 2, 4]]
    queries = [Query(40, 1, tables[0]), Query(0, 20, tables[1]), Query(70, 1, tables[2])]
    plans = [plan_attention(queries, 32), plan_attention(queries, 32, window=16)]
    slots = torch.tensor([1 * 32 + 8, *range(5 * 32, 5 * 32 + 20), 4 * 32 + 6])
    rotary = rotary_of(heads, kv_heads, dim, 22, normed=False)
    shapes = {
        "qkv": ((heads + 2 * kv_heads) * dim, size),
        "out": (size, heads * dim),
        "gate_up": (2 * inner, size),
        "down": (size, inner),
    }
    caches = [layer_cache(6, kv_heads, dim, 32) for _ in range(2)]
    hidden = torch.randn(22, size)
    matrices = [
        {name: (torch.randn(shape) * shape[1] ** -0.5).bfloat16() for name, shape in shapes.items()}
        for _ in caches
    ]

    def layers(maker: Kernels) -> list[StackLayer]:
        return [
            StackLayer(
                **{
                    name: maker.pack(weight_of(precision, matrix), gated=name == "gate_up")
                    for name, matrix in matrices[i].items()
                },
                input_norm=torch.ones(size),
                post_norm=torch.ones(size),
                q_norm=torch.ones(dim),
                k_norm=torch.ones(dim) if i else None,
                cache=replace(cache, keys=cache.keys.clone(), values=cache.values.clone()),
                plan=i,
            )
            for i, cache in enumerate(caches)
        ]

    own = layers(kernels)
    norm = torch.rand(size)
    stack, others = kernels.stack(own), layers(kernels)
    whole = kernels.run_stack(stack, hidden.clone(), rotary, slots, plans, 0.1, norm=norm)
    again = run_layers(kernels, others, hidden.clone(), rotary, slots, plans, 0.1, norm=norm)
    assert torch.equal(whole, again)
    right = layers(reference)
    expected = reference.run_stack(
        reference.stack(right), hidden.clone(), rotary, slots, plans, 0.1, norm=norm
    )
    assert off(whole, expected) < 2 * UNIT  # two layers, each rounding its activations to bf16
    with pytest.raises(ValueError, match="norm is"):
        kernels.run_stack(stack, hidden, rotary, slots, plans, 0.1, norm=norm[1:])
    for one, other in zip(own, right, strict=True):
        assert off(one.cache.keys, other.cache.keys) < 4 * UNIT


# ---- building ---------------------------------------------------------------------------------


@needs_compiler
def test_a_library_is_built_once_and_whole(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = build.instruction_sets()[0]
    first = build.library(name, cache_folder)
    assert first is not None

    def never(*args: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(build, "_build", never)
    assert build.library(name, cache_folder) == first
    assert not [path for path in cache_folder.iterdir() if path.name.startswith("building-")]


@needs_compiler
def test_a_library_that_others_may_have_changed_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = build.instruction_sets()[0]
    tmp_path.chmod(0o700)

    def compiles(compiler: str, instructions: str, target: Path) -> None:
        target.write_text("compiled")
        target.chmod(0o755)

    monkeypatch.setattr(build, "_build", compiles)
    target = build.library(name, tmp_path)
    assert target is not None
    for mode in (0o775, 0o757):
        target.write_text("changed")
        target.chmod(mode)
        assert build.library(name, tmp_path) == target
        assert target.read_text() == "compiled"


@needs_compiler
@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_nothing_is_built_or_loaded_where_others_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    """It is built for this process alone instead, and the log says what would end that."""
    build._private_folder.cache_clear()  # another test's
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    built: list[Path] = []

    def compiles(compiler: str, instructions: str, target: Path) -> None:
        built.append(target)
        target.write_text("compiled")
        target.chmod(0o755)

    monkeypatch.setattr(build, "_build", compiles)
    name = build.instruction_sets()[0]
    target = build.library(name, shared)
    assert target is not None
    assert build.library(name, shared) == target, "once for each process"
    assert built == [target]
    assert target.parent.stat().st_mode & 0o777 == 0o700
    assert list(shared.iterdir()) == []
    refused = [record for record in caplog.records if record.message == "native_folder_refused"]
    assert "CLOUDLM_NATIVE_CACHE" in refused[0].fields["reason"]
    assert str(shared) in refused[0].fields["reason"]
    assert refused[0].fields["instead"] == str(target.parent)


@needs_compiler
def test_what_is_built_to_be_kept_is_not_built_for_one_process(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``make native`` would name a file that is gone when it has ended."""
    monkeypatch.setenv("CLOUDLM_NATIVE_CACHE", str(tmp_path))
    tmp_path.chmod(0o777)

    def never(*args: object) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(build, "_build", never)
    assert build.main() == 1
    assert "no native library" in capsys.readouterr().out
    failed = [record for record in caplog.records if record.message == "native_build_failed"]
    assert "CLOUDLM_NATIVE_CACHE" in failed[0].fields["reason"]


def test_what_was_built_for_one_process_goes_with_it() -> None:
    code = "from cloudlm.engine.native import build; print(build._private_folder())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert not Path(done.stdout.strip()).exists()


@needs_compiler
def test_what_is_loaded_needs_no_file_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is killed leaves nothing behind."""
    build._private_folder.cache_clear()
    monkeypatch.setenv("CLOUDLM_NATIVE_CACHE", str(tmp_path))
    tmp_path.chmod(0o777)
    mine = build._private_folder()
    kernels = load_kernels(1, instructions=build.instruction_sets()[-1])
    assert kernels.name != "torch"
    assert not mine.exists()


@needs_compiler
def test_old_libraries_go_when_a_new_one_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    old, used = tmp_path / "cloudlm-avx2-old.so", tmp_path / "cloudlm-avx2-used.so"
    for path, age_s in ((old, UNUSED_S + 60), (used, 60)):
        path.touch()
        os.utime(path, (time.time() - age_s,) * 2)

    def compiles(compiler: str, instructions: str, target: Path) -> None:
        target.write_text("compiled")

    monkeypatch.setattr(build, "_build", compiles)
    name = build.instruction_sets()[0]
    target = build.library(name, tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([target, used])
    assert target is not None
    os.utime(target, (0, 0))
    build.library(name, tmp_path)
    assert time.time() - target.stat().st_mtime < UNUSED_S, "taken from the cache it counts as used"


def test_a_failing_compiler_means_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such flag" >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("CLOUDLM_NATIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "instruction_sets", lambda: ("avx2",))
    kernels = load_kernels(2)
    assert kernels.name == "torch"
    (record,) = [record for record in caplog.records if record.message == "native_build_failed"]
    assert "no such flag" in record.fields["reason"]


def test_working_memory_that_cannot_be_had_is_an_error_and_no_end(kernels: Kernels) -> None:
    inputs, tokens = 65536, 2**31 - 33  # 256 TiB of prepared inputs: more than addresses go
    weight = kernels.pack(torch.randn(32, inputs).bfloat16())
    x, out = torch.randn(1, inputs), torch.empty(1, 32)
    kernels.linear(weight, x, out)
    with pytest.raises(MemoryError, match="lower max_batch_tokens"):
        kernels.linear(weight, x.expand(tokens, -1), torch.empty(1, 32).expand(tokens, -1))
    again = kernels.linear(weight, x, torch.empty(1, 32))
    assert torch.equal(again, out)


def test_no_compiler_means_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("CLOUDLM_NATIVE_CACHE", str(tmp_path / "cache"))
    assert load_kernels(1).name == "torch"


def test_a_named_compiler_that_is_not_there_means_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "none")
    monkeypatch.setenv("CLOUDLM_NATIVE_CACHE", str(tmp_path / "cache"))
    assert build.find_compiler() is None
    assert load_kernels(1).name == "torch"


def test_a_file_that_is_no_library_means_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "fake.so"
    fake.write_text("no library")
    monkeypatch.setattr(build, "instruction_sets", lambda: ("avx2",))
    monkeypatch.setattr(build, "library", lambda name: fake)
    assert load_kernels(1).name == "torch"


def test_instruction_sets_follow_the_cpu() -> None:
    old = frozenset({"avx2", "fma", "f16c"})
    assert build.instruction_sets(frozenset({"sse2"})) == ()
    assert build.instruction_sets(old) == ("avx2",)
    vnni = "avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16"
    newer = old | frozenset(vnni.split())
    assert build.instruction_sets(newer) == ("avx512", "avx2")
    newest = newer | {"amx_tile", "amx_int8", "amx_bf16"}
    assert build.instruction_sets(newest) == ("amx", "avx512", "avx2")


def test_importing_builds_and_loads_nothing() -> None:
    code = "import sys, cloudlm.engine.native.build; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_where_libraries_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CLOUDLM_NATIVE_CACHE", "CLOUDLM_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native_folder() == tmp_path / ".cache/cloudlm/native"
    monkeypatch.setenv("CLOUDLM_HOME", str(tmp_path / "installation"))
    assert native_folder() == tmp_path / "installation/cache/native"
    monkeypatch.setenv("CLOUDLM_NATIVE_CACHE", str(tmp_path / "own"))
    assert native_folder() == tmp_path / "own"
