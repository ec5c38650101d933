"""Rotary position embedding: frequencies, scaling for long contexts, rotation.

Source of the rotation: Su et al., "RoFormer", 2021. A scaling never looks at the sequence at hand:
keys that are cached stay valid, whatever shares them and however long their sequence grows. What
depends on length depends on the longest sequence that is ever run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scaling:
    """No scaling at all; the other kinds stretch positions beyond the trained context.

    ``magnitude`` multiplies cosines and sines.
    """

    magnitude: float = field(default=1.0, kw_only=True)

    def frequencies(self, dim: int, theta: float, longest: int) -> Tensor:
        """Angle per position of each pair of ``dim`` dimensions, float32, when no sequence has
        more than ``longest`` tokens."""
        return _plain(dim, theta)

    def reach(self, context: int) -> int:
        """The longest sequence, tokens, that a model of that ``context`` is then meant for."""
        return context


@dataclass(frozen=True, slots=True)
class Linear(Scaling):
    """All frequencies divided. Source: Chen et al., "Extending Context Window of Large Language
    Models via Position Interpolation", 2023."""

    factor: float

    def frequencies(self, dim: int, theta: float, longest: int) -> Tensor:
        """See ``Scaling``."""
        return _plain(dim, theta) / self.factor


@dataclass(frozen=True, slots=True)
class Dynamic(Scaling):
    """A greater theta for sequences beyond ``context`` tokens, none for shorter ones. Source: the
    "dynamic NTK" interpolation described in Peng et al., "YaRN", 2023, section 3."""

    factor: float
    context: int

    def frequencies(self, dim: int, theta: float, longest: int) -> Tensor:
        """See ``Scaling``."""
        stretched = self.factor * max(longest, self.context) / self.context - (self.factor - 1)
        return _plain(dim, theta * stretched ** (dim / (dim - 2)))

    def reach(self, context: int) -> int:
        """See ``Scaling``."""
        return int(context * self.factor)


@dataclass(frozen=True, slots=True)
class Llama3(Scaling):
    """Low frequencies divided, high ones kept, a ramp between the two. Source: Llama 3.1's
    reference code."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def frequencies(self, dim: int, theta: float, longest: int) -> Tensor:
        """See ``Scaling``."""
        plain = _plain(dim, theta)
        wavelength = 2 * math.pi / plain
        ramp = (self.original_context / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        stretched = plain / self.factor
        between = (1 - ramp) * stretched + ramp * plain
        longest_kept = self.original_context / self.high_freq_factor
        kept_or_between = torch.where(wavelength < longest_kept, plain, between)
        shortest_stretched = self.original_context / self.low_freq_factor
        return torch.where(wavelength > shortest_stretched, stretched, kept_or_between)


@dataclass(frozen=True, slots=True)
class Yarn(Scaling):
    """Dimensions that turn less than ``slow`` times in the trained context are divided, those that
    turn more than ``fast`` times kept. Source: Peng et al., "YaRN", 2023."""

    factor: float
    original_context: int
    fast: float = 32.0
    slow: float = 1.0
    whole_bounds: bool = True

    def frequencies(self, dim: int, theta: float, longest: int) -> Tensor:
        """See ``Scaling``."""
        plain = _plain(dim, theta)
        low, high = self._turning(self.fast, dim, theta), self._turning(self.slow, dim, theta)
        if self.whole_bounds:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low or 0.001
        divided = ((torch.arange(len(plain)) - low) / width).clamp(0, 1)
        return plain / self.factor * divided + plain * (1 - divided)

    def reach(self, context: int) -> int:
        """See ``Scaling``."""
        return max(context, int(self.original_context * self.factor))

    def _turning(self, turns: float, dim: int, theta: float) -> float:
        """The dimension that turns so many times in the trained context."""
        ratio = self.original_context / (turns * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(theta))


@dataclass(frozen=True, slots=True)
class LongRope(Scaling):
    """A divisor per frequency: one set where no sequence is longer than the trained context,
    another one where some may be. Source: Ding et al., "LongRoPE", 2024."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context: int

    def frequencies(self, dim: int, theta: float, longest: int) -> Tensor:
        """See ``Scaling``."""
        divisors = self.long if longest > self.original_context else self.short
        return _plain(dim, theta) / torch.tensor(divisors)


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotation of one layer: the first ``dim`` dimensions of every head are turned."""

    dim: int
    theta: float
    scaling: Scaling = Scaling()


def _plain(dim: int, theta: float) -> Tensor:
    exponent = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim
    return 1.0 / (theta**exponent)


def cos_sin(
    positions: Tensor, frequency: Tensor, magnitude: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for ``positions`` [tokens], each [tokens, 1, dim]; angles are computed in
    float32 and only then rounded to ``dtype``."""
    angles = positions.float().unsqueeze(1) * frequency
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    if magnitude != 1.0:
        cos, sin = cos * magnitude, sin * magnitude
    return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``x`` [tokens, heads, head_dim]; dimension i is paired with i + dim / 2, and those
    beyond the dim of ``cos`` and ``sin`` stay as they are."""
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((rotate(x[..., :dim], cos, sin), x[..., dim:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
