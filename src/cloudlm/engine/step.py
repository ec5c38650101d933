"""What the scheduler asks of the runner in one step. Plain data; no PyTorch.

Positions count tokens of prompt and output together, from 0. The key-value cache is a pool of
blocks of ``block_size`` tokens; token ``p`` of a sequence lies in slot ``p % block_size`` of block
``block_table[p // block_size]``.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import StrEnum

from cloudlm.core.chat import Sampling


class Pooling(StrEnum):
    """How a prompt's hidden states become one vector: the last one, or the mean of all."""

    LAST = "last"
    MEAN = "mean"


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one sequence that this step computes: positions ``start`` to
    ``start + len(token_ids)``.

    ``block_table`` covers all positions up to the chunk's end. ``samples`` says whether the chunk
    reaches the end of the known tokens, so that the last one's logits choose the next token.
    ``prompt_token_ids`` and ``output_token_ids`` are the sequence's tokens so far (for penalties;
    ``len(output_token_ids)`` is the position that keys the seed), ``index`` the choice number.
    The last ``drafts`` of ``token_ids`` are guesses behind the known tokens: a token is sampled
    behind each of them, too, as if all before it were known.
    ``pooling`` asks for hidden states in place of a token. ``adapter`` is the key under which the
    runner knows the LoRA adapter to apply, empty for the base.
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    samples: bool
    sampling: Sampling
    prompt_token_ids: tuple[int, ...] = ()
    output_token_ids: tuple[int, ...] = ()
    index: int = 0
    prompt_logprobs: bool = False
    pooling: Pooling | None = None
    adapter: str = ""
    drafts: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass over all chunks, after the ``copies`` (source block, target block)."""

    chunks: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of one sequence; a chunk with drafts gives several, in their order. ``top`` as
    in ``engine.api.TokenLogprob``; ``logprob`` is None unless asked for. ``prompt_logprobs``: for a
    chunk that asked, one (logprob, top) per position of the chunk, about the token that follows it.
    ``pooled``: for a chunk with ``pooling`` the hidden state of the prompt's last token, or the sum
    over the chunk's tokens."""

    sequence_id: int
    token_id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = ()
    pooled: array[float] | None = None
