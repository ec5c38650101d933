"""The product of two tiles, on the GPU and in Triton's interpreter alike."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-any-return"
from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# The interpreter keeps bfloat16 as bare bits, which it would multiply as whole numbers.
_WIDEN = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(left, right):
    """[m, k] times [k, n] in float32; float32 is not cut to fewer bits."""
    if _WIDEN:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")
