"""Which decoding sequences get a draft in a step, and what becomes of it.

Drafts take what is left: of the token budget after all prompts, of the blocks after everybody's
own. A pure decider beside the scheduler: must not import torch, asyncio, time or threading.
"""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import replace

from cloudlm.engine.blocks import BlockPool
from cloudlm.engine.sequence import Sequence
from cloudlm.engine.speculate import Drafter, Lookup, agreed
from cloudlm.engine.step import Chunk, Sampled

MOST_ROWS = 16
"""Tokens of a step, decoding and drafted, up to which one more costs a CPU little: the weights must
be read anyway, and a tile of a matrix unit has so many rows. Beyond, only guesses that are mostly
right would pay, so where as many sequences decode nothing is guessed."""


class Drafts:
    """``lookup`` None: nothing is ever guessed. So many ``spare_blocks`` stay free for others."""

    def __init__(self, lookup: Lookup | None, pool: BlockPool, spare_blocks: int) -> None:
        self._lookup = lookup
        self._pool = pool
        self._spare_blocks = spare_blocks
        self._drafters: dict[int, Drafter] = {}
        self.drafts = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0

    def begin(self, sequence: Sequence) -> None:
        """The sequence may get drafts from now on."""
        if self._lookup is not None:
            self._drafters[sequence.sequence_id] = Drafter(self._lookup)

    def end(self, sequence: Sequence) -> None:
        self._drafters.pop(sequence.sequence_id, None)

    def lengthen(self, chunks: list[Chunk], decoding: Listing[Sequence], budget: int) -> None:
        """Append drafts to the first chunks, which are those of ``decoding``, up to ``budget``
        tokens in all."""
        left = min(budget, MOST_ROWS - len(decoding)) if self._drafters else 0
        for place, sequence in enumerate(decoding):
            if left <= 0:
                return
            drafter = self._drafters.get(sequence.sequence_id)
            if drafter is None or not chunks[place].samples or sequence.scores_prompt:
                continue
            share = -(-left // (len(decoding) - place))
            # One token more than are accepted is generated in any case.
            room = sequence.token_limit - len(sequence.tokens) - 1
            draft = drafter.propose(sequence.tokens, min(share, room)) if room > 0 else ()
            draft = draft[: self._hold(sequence, len(draft))]
            if draft:
                left -= len(draft)
                chunks[place] = self._longer(chunks[place], sequence, draft)

    def settle(self, chunk: Chunk, sampled: Listing[Sampled]) -> Listing[Sampled]:
        """Those of the chunk's samples that count: up to the first that is not what was guessed."""
        if not chunk.drafts:
            return sampled
        draft = chunk.token_ids[-chunk.drafts :]
        accepted = agreed(draft, [-1 if one.token_id is None else one.token_id for one in sampled])
        self.drafts += 1
        self.drafted_tokens += len(draft)
        self.accepted_tokens += accepted
        drafter = self._drafters.get(chunk.sequence_id)
        if drafter is not None:
            drafter.judge(len(draft), accepted)
        return sampled[: accepted + 1]

    def _hold(self, sequence: Sequence, count: int) -> int:
        """Take blocks for so many tokens behind the known ones; for how many there were any. They
        stay the sequence's: it will fill them soon, with the guessed tokens or others."""
        pool, table = self._pool, sequence.block_table
        needed = pool.blocks_for(len(sequence.tokens) + count) if count else 0
        while len(table) < needed and pool.free_blocks > self._spare_blocks:
            pool.append(table)
        return min(count, len(table) * pool.block_size - len(sequence.tokens))

    def _longer(self, chunk: Chunk, sequence: Sequence, draft: tuple[int, ...]) -> Chunk:
        end = len(sequence.tokens) + len(draft)
        return replace(
            chunk,
            token_ids=(*chunk.token_ids, *draft),
            drafts=len(draft),
            block_table=tuple(sequence.block_table[: self._pool.blocks_for(end)]),
        )
