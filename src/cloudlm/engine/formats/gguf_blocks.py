"""The blocks of GGUF's quantised tensors as numbers. Layouts: ggml-common.h of llama.cpp.

``n`` blocks are bytes [n, size]. In the small kinds a block has a scale (and a minimum or not) for
32 numbers; in the K kinds a block of 256 has scales for its parts, which are scaled themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def half(raw: Tensor) -> Tensor:
    """Bytes [n, 2 * m] as float16 numbers, in float32 [n, m]."""
    return raw.contiguous().view(torch.float16).float()


def nibbles(raw: Tensor) -> Tensor:
    """Low halves, then high halves, of bytes [..., m] as [..., 2 * m]."""
    return torch.cat((raw & 15, raw >> 4), dim=-1)


def _fields(raw: Tensor, bits: int, run: int = 32) -> Tensor:
    """Bytes [n, m] cut into runs; of each run first all lowest fields, then all next ones:
    [n, m * 8 / bits]."""
    runs = raw.view(len(raw), -1, 1, run)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(1, 1, -1, 1)
    fields: Tensor = (runs >> shifts) & (2**bits - 1)
    return fields.flatten(1)


def _fifth_bits(raw: Tensor) -> Tensor:
    """Bytes [n, 4]: bit i is that of number i; as 0 or 16 [n, 32]."""
    shifts = torch.arange(8, dtype=torch.uint8)
    found: Tensor = ((raw.unsqueeze(2) >> shifts) & 1) << 4
    return found.flatten(1)


def _q4_0(raw: Tensor) -> Tensor:
    return half(raw[:, :2]) * (nibbles(raw[:, 2:]).float() - 8)


def _q4_1(raw: Tensor) -> Tensor:
    return half(raw[:, :2]) * nibbles(raw[:, 4:]).float() + half(raw[:, 2:4])


def _q5_0(raw: Tensor) -> Tensor:
    codes = nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6])
    return half(raw[:, :2]) * (codes.float() - 16)


def _q5_1(raw: Tensor) -> Tensor:
    codes = nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8])
    return half(raw[:, :2]) * codes.float() + half(raw[:, 2:4])


def _q8_0(raw: Tensor) -> Tensor:
    return half(raw[:, :2]) * raw[:, 2:].contiguous().view(torch.int8).float()


def _q2_k(raw: Tensor) -> Tensor:
    parts, codes = raw[:, :16], _fields(raw[:, 16:80], 2)
    scale = half(raw[:, 80:82]) * (parts & 15).float()
    least = half(raw[:, 82:84]) * (parts >> 4).float()
    return _spread(codes, scale, least)


def _q3_k(raw: Tensor) -> Tensor:
    third = _fields(raw[:, :32], 1)
    codes = _fields(raw[:, 32:96], 2).float() - (4 - 4 * third.float())
    parts = raw[:, 96:108]
    scales = nibbles(parts[:, :8]) | (_fields(parts[:, 8:], 2, run=4) << 4)
    return _spread(codes, half(raw[:, 108:110]) * (scales.float() - 32), None)


def _scales_6_bits(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits from 12 bytes."""
    first, second, rest = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 6) << 4)), dim=1)
    least = torch.cat((second & 63, (rest >> 4) | ((second >> 6) << 4)), dim=1)
    return scales.float(), least.float()


def _q4_k(raw: Tensor) -> Tensor:
    scales, least = _scales_6_bits(raw[:, 4:16])
    codes = _fields(raw[:, 16:], 4)
    return _spread(codes, half(raw[:, :2]) * scales, half(raw[:, 2:4]) * least)


def _q5_k(raw: Tensor) -> Tensor:
    scales, least = _scales_6_bits(raw[:, 4:16])
    codes = _fields(raw[:, 48:], 4) | (_fields(raw[:, 16:48], 1) << 4)
    return _spread(codes, half(raw[:, :2]) * scales, half(raw[:, 2:4]) * least)


def _q6_k(raw: Tensor) -> Tensor:
    codes = _fields(raw[:, :128], 4, run=64) | (_fields(raw[:, 128:192], 2) << 4)
    scales = raw[:, 192:208].contiguous().view(torch.int8).float()
    return _spread(codes.float() - 32, half(raw[:, 208:210]) * scales, None)


def _spread(codes: Tensor, scale: Tensor, least: Tensor | None) -> Tensor:
    """``scale * codes - least``, each for its equal part of a block."""
    parts = codes.float().view(*scale.shape, -1)
    product = scale.unsqueeze(2) * parts
    return (product if least is None else product - least.unsqueeze(2)).flatten(1)


BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""Bytes of blocks [n, size] to float32 [n, numbers of a block], by kind."""
