"""Microbenchmarks of the engine's kernels: one JSON line per figure.

    python bench/engine/bench_kernels.py --ops linear,attention --tokens 1,16,512

Weights cycle over enough copies (--megabytes in all) that none stays in a cache, as in decoding.
Figures stand beside what this machine reads and multiplies in the same minute (the lines "read" and
"matmul"): on a shared machine only the ratios mean anything; the least disturbed pass counts. With
``--threads 1 --clock cpu`` the time is the thread's own, without the turns of other processes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cloudlm.engine.native import load_kernels
from cloudlm.engine.native.contract import Kernels, LayerCache, Packed, Rotary, StackLayer
from cloudlm.engine.native.packing import quantize_int4, quantize_int8
from cloudlm.engine.native.plan import Query, plan_attention

SHAPES = {"qkv": (4096, 1024, False), "up": (6144, 1024, True), "down": (1024, 3072, False)}
CLOCK = "wall"
PRECISIONS = ("bf16", "int8", "int8-a8", "int4", "int4-a8")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--ops", default="machine,linear,attention")
    ask.add_argument("--tokens", default="1,4,16,64,512")
    ask.add_argument("--precisions", default=",".join(PRECISIONS))
    ask.add_argument("--shapes", default=",".join(SHAPES))
    ask.add_argument("--cases", default="W1,W2,W4,W3")
    ask.add_argument("--path", default="auto")
    ask.add_argument("--instructions", default=None)
    ask.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    ask.add_argument("--megabytes", type=int, default=256)
    ask.add_argument("--seconds", type=float, default=1.0)
    ask.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = ask.parse_args()
    global CLOCK
    CLOCK = options.clock
    torch.set_num_threads(options.threads)
    kernels = load_kernels(options.threads, instructions=options.instructions)
    for op in options.ops.split(","):
        {"machine": machine, "linear": linears, "attention": attentions, "step": steps}[op](
            kernels, options
        )


def machine(kernels: Kernels, options: argparse.Namespace) -> None:
    del kernels
    values = torch.ones(2**27)
    seconds = best_time([lambda: values.sum()], options.seconds)
    say(op="read", gb_per_s=round(values.nbytes / seconds / 1e9, 1))
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    seconds = best_time([lambda: a @ a.T], options.seconds)
    say(op="matmul", tflop_per_s=round(2 * 2048**3 / seconds / 1e12, 2))


def linears(kernels: Kernels, options: argparse.Namespace) -> None:
    for shape in options.shapes.split(","):
        rows, inputs, gated = SHAPES[shape]
        weight = (torch.randn(rows, inputs) * 0.02).bfloat16()
        for precision in options.precisions.split(","):
            copies = [packed(kernels, weight, precision, gated)]
            while len(copies) * copies[0].size_bytes < options.megabytes << 20:
                copies.append(packed(kernels, weight, precision, gated))
            for tokens in map(int, options.tokens.split(",")):
                x = torch.randn(tokens, inputs).bfloat16()
                out = torch.empty(tokens, copies[0].outputs, dtype=torch.bfloat16)

                def call(copy: Packed, x: Tensor = x, out: Tensor = out) -> Tensor:
                    return kernels.linear(copy, x, out, path=options.path)

                calls = [lambda copy=copy, call=call: call(copy) for copy in copies]
                seconds = best_time(calls, options.seconds)
                say(
                    op="linear", shape=shape, precision=precision, tokens=tokens,
                    kernels=kernels.name, path=options.path, us=round(seconds * 1e6, 1),
                    gb_per_s=round(copies[0].size_bytes / seconds / 1e9, 1),
                    tflop_per_s=round(2 * tokens * rows * inputs / seconds / 1e12, 3),
                )  # fmt: skip


def attentions(kernels: Kernels, options: argparse.Namespace) -> None:
    heads, kv_heads, dim, size = 16, 8, 128, 32
    blocks = 1280
    layers = [
        LayerCache(*torch.randn(2, blocks, kv_heads, size * dim).bfloat16(), size) for _ in range(6)
    ]
    for name, queries, read in (
        ("decode 1 x 1024", [Query(1023, 1, range(32))], 1024),
        (
            "decode 16 x 1024",
            [Query(1023, 1, range(i * 32, i * 32 + 32)) for i in range(16)],
            16384,
        ),
        (
            "shared 1024, 16 x 64 own",
            [Query(1087, 1, [*range(32), 32 + 2 * i, 33 + 2 * i]) for i in range(16)],
            2048,
        ),
        ("prefill 2048", [Query(0, 2048, range(64))], 0),
    ):
        plan = plan_attention(queries, size)
        q = torch.randn(plan.tokens, heads * dim).bfloat16()
        out = torch.empty_like(q)

        def call(layer: LayerCache, q: Tensor = q, out: Tensor = out, plan=plan) -> Tensor:  # type: ignore[no-untyped-def]
            return kernels.attention(q, layer, plan, out, dim**-0.5)

        calls = [lambda layer=layer, call=call: call(layer) for layer in layers]
        seconds = best_time(calls, options.seconds)
        work = sum(4 * heads * dim * (q.start + (q.count + 1) / 2) * q.count for q in queries)
        say(
            op="attention", case=name, kernels=kernels.name, us=round(seconds * 1e6, 1),
            gb_per_s=round(read * kv_heads * dim * 4 / seconds / 1e9, 1),
            tflop_per_s=round(work / seconds / 1e12, 3),
        )  # fmt: skip


def steps(kernels: Kernels, options: argparse.Namespace) -> None:
    """Whole forward passes of the benchmark model (28 layers, head included) on random weights."""
    size, heads, kv_heads, dim, block, layers = 1024, 16, 8, 128, 32, 28
    cases = {
        "W1": [Query(192, 1, range(7))],
        "W2": [Query(320, 1, range(i * 11, i * 11 + 11)) for i in range(16)],
        "W4": [Query(1087, 1, [*range(32), 32 + 2 * i, 33 + 2 * i]) for i in range(16)],
        "W3": [Query(0, 2048, range(64))],
    }
    memory = torch.zeros(layers, 2, 180, kv_heads, block * dim, dtype=torch.bfloat16)
    for precision in options.precisions.split(","):

        def pack(
            rows: int, inputs: int, *, gated: bool = False, p: str = precision
        ) -> list[Packed]:
            weight = (torch.randn(rows, inputs) * 0.02).bfloat16()
            return [packed(kernels, weight, p, gated) for _ in range(layers)]

        parts = zip(
            pack((heads + 2 * kv_heads) * dim, size),
            pack(size, heads * dim),
            pack(6144, size, gated=True),
            pack(size, 3072),
            memory,
            strict=True,
        )
        ones = torch.ones(size)
        stack = kernels.stack(
            [
                StackLayer(
                    *four, ones, ones, LayerCache(cache[0], cache[1], block), ones[:dim], ones[:dim]
                )
                for *four, cache in parts
            ]
        )
        head = pack(32000, size)[0]
        weight_bytes = head.size_bytes + sum(
            w.size_bytes for one in stack.layers for w in (one.qkv, one.out, one.gate_up, one.down)
        )
        for case in options.cases.split(","):
            queries = cases[case]
            plan = plan_attention(queries, block)
            angles = torch.ones(plan.tokens, dim // 2)
            rotary = Rotary(heads, kv_heads, dim, angles, angles * 0)
            slots = torch.full((plan.tokens,), -1)
            rows = torch.tensor(
                [sum(q.count for q in queries[: i + 1]) for i in range(len(queries))]
            )
            logits = torch.empty(len(queries), 32000)

            def step(
                queries=queries, rotary=rotary, slots=slots, rows=rows, logits=logits,
                stack=stack, head=head, tokens=plan.tokens, ones=ones,
            ) -> None:  # type: ignore[no-untyped-def] # fmt: skip
                hidden = torch.randn(tokens, size)
                plans = [plan_attention(queries, block)]
                kernels.run_stack(stack, hidden, rotary, slots, plans, dim**-0.5)
                kernels.linear(head, hidden[rows - 1], logits, norm=ones, eps=1e-6)
                logits.argmax(1)

            seconds = best_time([step], options.seconds)
            keys = sum((end - begin) for *_, begin, end, _ in plan.pieces.tolist())
            moved = weight_bytes + keys * kv_heads * dim * 4 * layers
            body = 2 * plan.tokens * layers * (4096 + 2048 + 9216) * size
            say(
                op="step", case=case, precision=precision, kernels=kernels.name,
                ms=round(seconds * 1e3, 2), gb_per_s=round(moved / seconds / 1e9, 1),
                tflop_per_s=round(body / seconds / 1e12, 2),
                tokens_per_s=round((plan.tokens if case == "W3" else len(queries)) / seconds, 1),
            )  # fmt: skip


def packed(kernels: Kernels, weight: Tensor, precision: str, gated: bool) -> Packed:
    kind, _, activations = precision.partition("-")
    planes = 1 if activations == "a8" else 2
    quantised = {"bf16": lambda w: w, "int8": quantize_int8, "int4": quantize_int4}[kind](weight)
    return kernels.pack(quantised, gated=gated, planes=planes)


def best_time(calls: Sequence[Callable[[], object]], seconds: float) -> float:
    """The quickest pass over all ``calls``, per call."""
    clock = time.thread_time if CLOCK == "cpu" else time.perf_counter
    best, until = float("inf"), time.perf_counter() + seconds
    for call in calls:
        call()
    while True:
        begin = clock()
        for call in calls:
            call()
        best = min(best, (clock() - begin) / len(calls))
        if time.perf_counter() > until:
            return best


def say(**figures: object) -> None:
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
