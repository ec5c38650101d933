"""What every architecture offers to the runner and to the loader of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

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

    ``parameter_name`` says which parameter a tensor of the model's files fills. ``layers_path`` and
    ``embedding_path`` name its list of layers and its token embedding. A pass is ``embed``,
    ``through`` all layers, ``finish``; a process that holds some of the layers does its part.
    """

    shape: Shape
    layers_path: ClassVar[str]
    embedding_path: ClassVar[str]

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
        x = self.embed(token_ids, positions)
        return self.finish(self.through(x, positions, attend))

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """What enters the first layer, [tokens, hidden]."""
        raise NotImplementedError

    def through(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """``x`` [tokens, hidden] after all layers that are here."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """The last hidden states [tokens, hidden] from what leaves the last layer."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab_size] in float32 of some rows of the hidden states."""
        raise NotImplementedError

    def parameter_name(self, stored: str) -> str | None:
        """The parameter that a tensor of the files belongs to, None if it is not needed."""
        return stored
