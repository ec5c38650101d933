"""Which blocks of a sequence the cache holds already, will hold soon, or may hold from now on.

A pure decider's part: hashes and counts. Decides nothing about who runs.
"""

from __future__ import annotations

from collections.abc import Iterable

from cloudlm.engine.blocks import BlockPool
from cloudlm.engine.fairness import standing
from cloudlm.engine.sequence import Sequence


class Underway:
    """Blocks that are about to be computed, by their hashes, each with the best standing of those
    who compute it."""

    def __init__(self) -> None:
        self._standings: dict[bytes, tuple[int, bool]] = {}

    def add(self, sequence: Sequence, hashes: Iterable[bytes]) -> None:
        """The sequence is about to compute these."""
        own = standing(sequence)
        for one in hashes:
            self._standings[one] = min(own, self._standings.get(one, own))

    def awaited(self, sequence: Sequence, wanted: list[bytes], matched: list[int]) -> bool:
        """Whether another sequence is computing the very block that this one needs next: it then
        waits for it and shares it. Not for one of lower standing, which others may keep waiting."""
        if len(matched) == len(wanted):
            return False
        theirs = self._standings.get(wanted[len(matched)])
        return theirs is not None and theirs <= standing(sequence)


class Prefixes:
    """Sequences as blocks of ``pool``; a block is found by the hash of all tokens up to its end."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size

    def found(self, sequence: Sequence) -> tuple[list[bytes], list[int]]:
        """Hashes of the blocks that may come from the cache, and those that do: all full ones, but
        never the one of the last token, whose logits are needed."""
        if sequence.needs_every_position:
            return [], []
        size = self._block_size
        wanted = sequence.block_hashes((len(sequence.tokens) - 1) // size, size)
        return wanted, self._pool.match_prefix(wanted)

    def full(self, sequence: Sequence) -> list[bytes]:
        """Hashes of all blocks that are full of known tokens."""
        return sequence.block_hashes(len(sequence.tokens) // self._block_size, self._block_size)

    def underway(self, running: Iterable[Sequence]) -> Underway:
        """What running sequences are about to compute."""
        underway = Underway()
        for sequence in running:
            if sequence.remaining > 1:
                done = sequence.computed // self._block_size
                underway.add(sequence, self.full(sequence)[done:])
        return underway

    def fresh(self, sequence: Sequence, matched: list[int]) -> int:
        """Blocks that it needs besides those found."""
        return self._pool.blocks_for(len(sequence.tokens)) - len(matched)

    def cost(self, sequence: Sequence, matched: list[int]) -> int:
        """Free blocks that its admission takes."""
        return self._pool.cost(matched, self.fresh(sequence, matched))

    def publish(self, sequence: Sequence, count: int) -> None:
        """Count so many tokens more as computed and make the blocks they filled findable."""
        size = self._block_size
        before = sequence.computed // size
        sequence.computed += count
        after = sequence.computed // size
        if after > before:
            hashes = sequence.block_hashes(after, size)
            for position in range(before, after):
                self._pool.publish(sequence.block_table[position], hashes[position])
