"""What the runner asks of whoever computes hidden states and logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from cloudlm.engine.adapters import Adapting
from cloudlm.engine.ops.cache import BlockPool
from cloudlm.engine.step import Chunk


class ComputePath(Protocol):
    """A loaded network with its block pool; used by one thread at a time.

    ``precision`` names the numbers that most weights are held in, ``weights`` those of all, what
    stayed as it is stored apart from the rest; ``kernels`` what computes. ``adapters`` takes LoRA
    adapters for ``hidden`` to apply; None if it applies none.
    """

    pool: BlockPool
    precision: str
    weights: str
    kernels: str
    adapters: Adapting | None

    def hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """Normed last hidden states [tokens, hidden] of all chunks, one behind the other; stores
        their keys and values in the pool."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab_size] in float32 of some rows of the hidden states."""
        ...
