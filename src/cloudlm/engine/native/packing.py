"""Weights on their way into the kernels: quantisation and the order of columns. Plain PyTorch.

A packed matrix has panels of 32 outputs. In a gated one (gate and up fused) a panel is 16 gates
and the 16 ups that belong to them. ``src/linear.cpp`` tells the layout of a panel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 32
# The scales that a group of 4-bit codes may have, in 64ths of the one that its largest value asks
# for: exact in binary, and where random and trained weights have their smallest error.
SHARES = (64, 67, 61, 58, 55, 52, 49)
_AT_ONCE = 1 << 20  # values at a time: working memory of several times theirs


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """``weight[n, k] = scale[n] * codes[n, k]``; codes int8, scale float32 [n]."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """``weight[n, k] = scale[n, k // group] * (codes[n, k] - zeros[n, k // group])``.

    codes uint8 0 to 15 (one a byte), scale float32 or float16 [n, groups], zeros uint8 [n, groups]
    or None for 8 everywhere. ``group`` is 32, 64, 128 or another multiple of 64; the last group
    may be shorter than the others.
    """

    codes: Tensor
    scale: Tensor
    zeros: Tensor | None
    group: int


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Per output, symmetric, to the nearest. ``weight`` [n, k], any floating type."""
    wide = weight.float()
    scale = wide.abs().amax(1) / 127
    safe = torch.where(scale > 0, scale, 1.0)
    return Int8Weight((wide / safe[:, None]).round().clamp(-127, 127).to(torch.int8), scale)


def quantize_int4(weight: Tensor, group: int = 128, *, symmetric: bool = True) -> Int4Weight:
    """Groups of ``group`` inputs, to the nearest. ``weight`` [n, k], any floating type. Symmetric,
    each group has the scale, of a few (SHARES), that gives the smallest squared error."""
    k = weight.shape[1]
    groups = -(-k // group)
    rows = max(1, _AT_ONCE // k)
    parts = []
    for first in range(0, len(weight), rows):
        part = weight[first : first + rows]
        wide = torch.zeros(len(part), groups * group, device=weight.device)
        wide[:, :k] = part
        wide = wide.view(-1, groups, group)
        scale, codes, zeros = _searched(wide) if symmetric else _shifted(wide)
        own = codes.view(len(part), -1)[:, :k].contiguous()
        parts.append(Int4Weight(own, scale, zeros, group))
    whole = join(parts)
    assert isinstance(whole, Int4Weight)
    return whole


def _searched(wide: Tensor) -> tuple[Tensor, Tensor, None]:
    """Scales, codes and no zero points. The first scale to try makes the value of largest magnitude
    -8, the one code that has no opposite; a smaller one cuts it off for the good of the others.
    Errors are whole numbers (256ths of a code): exact sums, so that every machine and
    ``src/quantize.cpp`` find the same."""
    high, low = wide.amax(2).clamp(min=0), wide.amin(2).clamp(max=0)
    most = torch.where(-low > high, low, high)
    best = least = codes = None
    for share in SHARES:
        scale = (most * (share / -512)).half().float()
        inverse = 256 / torch.where(scale != 0, scale, 1.0)
        parts = (wide * inverse[..., None]).round_().to(torch.int32).add_(8 * 256)
        found = ((parts + 128) >> 8).clamp_(0, 15)
        miss = parts.sub_(found << 8)
        lost = miss.mul_(miss).sum(2).float() * scale * scale
        found = found.to(torch.uint8)
        if best is None or least is None or codes is None:
            best, least, codes = scale, lost, found
            continue
        better = lost < least
        best, least = torch.where(better, scale, best), torch.where(better, lost, least)
        codes = torch.where(better[..., None], found, codes)
    assert best is not None and codes is not None
    return best, codes, None


def _shifted(wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, codes and zero points that cover all of a group, from its lowest to its highest."""
    low, high = wide.amin(2).clamp(max=0), wide.amax(2).clamp(min=0)
    scale = (high - low) / 15
    shift = (-low / torch.where(scale > 0, scale, 1.0)).round().clamp(0, 15)
    scale = scale.half().float()
    safe = torch.where(scale != 0, scale, 1.0)
    codes = (wide / safe[..., None] + shift[..., None]).round().clamp(0, 15).to(torch.uint8)
    return scale, codes, shift.to(torch.uint8)


def join(parts: Sequence[Int8Weight | Int4Weight]) -> Int8Weight | Int4Weight | None:
    """The matrices below each other as one, None if they are of different kinds or groups."""
    fours = [part for part in parts if isinstance(part, Int4Weight)]
    if fours and (len(fours) < len(parts) or len({part.group for part in fours}) > 1):
        return None
    codes = torch.cat([part.codes for part in parts])
    scale = torch.cat([part.scale for part in parts])
    if not fours:
        return Int8Weight(codes, scale)
    zeros = None
    if any(part.zeros is not None for part in fours):
        middle = [torch.full(part.scale.shape, 8, dtype=torch.uint8) for part in fours]
        own = [part.zeros for part in fours]
        zeros = torch.cat([m if z is None else z for z, m in zip(own, middle, strict=True)])
    return Int4Weight(codes, scale, zeros, fours[0].group)


def column_order(rows: int, *, gated: bool) -> Tensor:
    """Which row of the matrix each packed column is, -1 for padding; [panels * 32]."""
    if not gated:
        order = torch.full((-(-rows // PANEL) * PANEL,), -1)
        order[:rows] = torch.arange(rows)
        return order
    half, width = rows // 2, PANEL // 2
    gates = torch.full((-(-half // width) * width,), -1)
    gates[:half] = torch.arange(half)
    ups = torch.where(gates >= 0, gates + half, -1)
    return torch.stack((gates.view(-1, width), ups.view(-1, width)), 1).flatten()


def packed_rows(data: Tensor, panels: int, numbers: Tensor, inputs: int) -> Tensor:
    """Rows ``numbers`` (int64 [n]) out of the bytes of a bf16 matrix that is not gated, bf16
    [n, ``inputs``]: pairs of inputs lie as far apart as a panel has outputs in a tile."""
    pairs = data.view(torch.int32).view(panels, -1, 2, 16, PANEL // 2)
    found = pairs[numbers // PANEL, :, numbers % PANEL // 16, :, numbers % 16]
    return found.flatten(1).view(torch.bfloat16)[:, :inputs]


def arrange(values: Tensor, order: Tensor, fill: float) -> Tensor:
    """``values`` [rows] or [rows, groups] in the order of packed columns: [columns], or by panel
    [panels, groups, 32]."""
    shape = (len(order), *values.shape[1:])
    placed = torch.full(shape, fill, dtype=values.dtype)
    placed[order >= 0] = values[order[order >= 0]]
    if values.dim() == 1:
        return placed.contiguous()
    return placed.view(-1, PANEL, shape[1]).transpose(1, 2).contiguous()


def split_scale(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Group scales [rows, groups] as float16, and a float32 factor for each row that is a power of
    two: float16 sources stay exact and small scales keep their precision."""
    most = scale.float().abs().amax(1)
    factor = torch.exp2(torch.floor(torch.log2(torch.where(most > 0, most, 1.0))))
    return (scale.float() / factor[:, None]).half(), factor
