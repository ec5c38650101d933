"""Rotary position embedding: frequencies, scaling for long contexts, rotation.

Sources: Su et al., "RoFormer", 2021; the ``llama3`` scaling is that of Llama 3.1's reference code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How positions are stretched beyond the trained context of ``original_context`` tokens.

    ``kind`` is ``default`` (not at all), ``linear`` (all frequencies divided by ``factor``) or
    ``llama3`` (low frequencies divided, high ones kept, a ramp between the two).
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


def frequencies(head_dim: int, theta: float, scaling: RopeScaling, device: torch.device) -> Tensor:
    """Angle per position of each pair of dimensions, float32, shape [head_dim / 2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    plain = 1.0 / (theta**exponent)
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    return plain


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    wavelength = 2 * math.pi / plain
    longest_kept = scaling.original_context / scaling.high_freq_factor
    shortest_stretched = scaling.original_context / scaling.low_freq_factor
    ramp = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    stretched = plain / scaling.factor
    between = (1 - ramp) * stretched + ramp * plain
    kept_or_between = torch.where(wavelength < longest_kept, plain, between)
    return torch.where(wavelength > shortest_stretched, stretched, kept_or_between)


def cos_sin(positions: Tensor, frequency: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for ``positions`` [tokens], each [tokens, 1, head_dim]; angles are
    computed in float32 and only then rounded to ``dtype``."""
    angles = positions.float().unsqueeze(1) * frequency
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``x`` [tokens, heads, head_dim]; dimension i is paired with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
