"""The kernels are compiled for GPUs, which needs none: the interpreter takes what a compiler may
refuse. In a process of its own, as Triton decides at its import whether it interprets."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

_SCRIPT = r"""
import json
import sys

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cloudlm.engine.gpu import attention_kernels, layer_kernels, linear_kernels

asked = json.load(sys.stdin)
for name, types, constants in asked["kernels"]:
    module = next(
        one
        for one in (attention_kernels, layer_kernels, linear_kernels)
        if hasattr(one, name)
    )
    kernel = getattr(module, name)
    signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(constants), strict=True))
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = compile(
        source,
        target=GPUTarget("cuda", asked["capability"], 32),
        options={"num_warps": 4, "num_stages": asked["stages"].get(name, 2)},
    )
    print(name, len(compiled.asm["cubin"]), compiled.metadata.shared)
"""
pytestmark = pytest.mark.flow

X, F, N = "*bf16", "*fp32", "*i32"
LOOK = ["fp32", "i32", "fp32"]
# Sizes of Llama 3.1 8B.
HEADS = {"DIM": 128, "WIDTH": 128}
ATTENTION = {"KV_HEADS": 8, "GROUP": 4, **HEADS, "BLOCK": 16, "KEYS": 64}
KERNELS = [
    *(
        [
            "decode_kernel",
            [X, X, X, N, N, N, X, F, F, F, "i32", "i32", "i32", *LOOK],
            {**ATTENTION, "ROWS": 16, "SPLITS": splits, "WINDOWED": bent, "CAPPED": bent},
        ]
        for splits, bent in ((1, False), (32, True))
    ),
    ["combine_kernel", [F, F, F, N, X, "i32"], {"HEADS": 32, **HEADS, "SPLITS": 32}],
    *(
        [
            "prefill_kernel",
            [X, X, X, N, N, N, N, N, X, "i32", "i32", "i32", *LOOK],
            {**ATTENTION, "ROWS": 64, "WINDOWED": bent, "CAPPED": bent},
        ]
        for bent in (False, True)
    ),
    ["rms_norm_kernel", [X, X, X, "i32", "fp32"], {"SIZE": 4096, "WIDTH": 4096, "OFFSET": False}],
    ["gated_kernel", [X, X, "i32"], {"INNER": 14336, "WIDTH": 1024, "GELU": True}],
    [
        "rotate_and_store_kernel",
        [X, X, X, X, X, N, X, X, X, "i32", "i32", "fp32"],
        {"QUERIES": 32, "KEYS": 8, **HEADS, "TURNED": 128, "NORMED": True, "OFFSET": True},
    ],
    ["store_kernel", [X, X, N, X, X, *["i32"] * 4], {"HEADS": 8, **HEADS}],
    *(
        [
            "int8_kernel",
            [X, "*i8", F, X, X, *["i32"] * 4],
            {"ROWS": rows, "COLUMNS": 32, "DEPTH": 128, "BIASED": False},
        ]
        for rows in (16, 64)
    ),
    *(
        [
            "int4_kernel",
            [X, "*u8", F, F, X, X, *["i32"] * 5],
            {"ROWS": rows, "COLUMNS": 32, "HALF": 64, "BIASED": True},
        ]
        for rows in (16, 64)
    ),
    ["unpack_int4_kernel", ["*u8", F, F, X, "i32", "i32"], {"HALF": 64, "TOGETHER": 16}],
]
# Shared memory of a block, bytes, that every GPU of that kind has.
SHARED = {80: 163 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability: int, tmp_path: object) -> None:
    """Ampere and Hopper, at the sizes of an 8B model; shared memory suffices."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install 'cloudlm[gpu]'")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    stages = {"int8_kernel": 4, "int4_kernel": 4}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        input=json.dumps({"kernels": KERNELS, "capability": capability, "stages": stages}),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [kernel[0] for kernel in KERNELS]
    for name, code_bytes, shared_bytes in rows:
        assert int(code_bytes) > 0, name
        assert int(shared_bytes) <= SHARED[capability], name
