"""What every architecture offers to the runner and to the loader of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.ops.attention import Attend


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that the cache and the runner need. ``context`` is the longest sequence, tokens;
    ``windows`` the attention window of each layer, None for all positions; ``hidden_size`` the
    length of a hidden state."""

    vocab_size: int
    kv_heads: int
    head_dim: int
    context: int
    windows: tuple[int | None, ...]
    hidden_size: int = 0

    @property
    def layers(self) -> int:
        return len(self.windows)


class Decoder(nn.Module):
    """A decoder over a ragged batch: all tokens of all sequences stand one behind the other.

    ``parameter_name`` says which parameter a tensor of the model's files fills.
    """

    shape: Shape

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        """Build the network of a ``config.json``. Raises BrokenModel or UnsupportedModel."""
        raise NotImplementedError

    def limit(self, longest: int) -> None:
        """Told once, before the first pass: no sequence will have more than ``longest`` tokens,
        which is what the rotary scalings that depend on length go by."""

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Last hidden states [tokens, hidden] of ``token_ids`` [tokens] at ``positions``
        [tokens]."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab_size] in float32 of some rows of the hidden states."""
        raise NotImplementedError

    def parameter_name(self, stored: str) -> str | None:
        """The parameter that a tensor of the files belongs to, None if it is not needed."""
        return stored
