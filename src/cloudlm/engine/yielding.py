"""Who gives way to whom. A pure decider's part: see ``scheduler``.

One that waits takes the place of such as have less priority, or whose tenant is far ahead of its
own (see ``FAIRNESS_LAG_STEPS``). One that was passed too often and held others up for long enough
also takes the place of those that came after it, unless its own tenant is that far ahead of theirs:
they could take the place back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Listing

from cloudlm.engine.blocks import BlockPool
from cloudlm.engine.fairness import PROMPT_TOKEN_COST, Lines
from cloudlm.engine.prefixes import Prefixes
from cloudlm.engine.sequence import Sequence

FAIRNESS_LAG_STEPS = 1
"""How far a tenant may be ahead before its sequences give way to one that waits for a place: so
many full steps, and all that may be lost by it."""


class Yielding:
    """A scheduler's. ``lag_tokens`` are those of ``FAIRNESS_LAG_STEPS``, ``places`` how many may
    run, ``headroom_blocks`` what an admission leaves to those who run."""

    def __init__(
        self,
        waiting: Lines,
        pool: BlockPool,
        prefixes: Prefixes,
        lag_tokens: int,
        places: int,
        headroom_blocks: int,
    ) -> None:
        self._waiting = waiting
        self._pool = pool
        self._prefixes = prefixes
        self._lag_tokens = lag_tokens
        self._places = places
        self._headroom_blocks = headroom_blocks

    def rank(self, sequence: Sequence) -> tuple[int, float, int]:
        """The greater, the sooner it gives way."""
        return -sequence.level, self._waiting.counter(sequence.tenant), sequence.arrival

    def victims(self, running: Listing[Sequence]) -> list[Sequence]:
        """Those who give way in this step, all to one that waits: just enough, or nobody."""
        for sequence in self._waiting.asking():
            outranked = [one for one in running if self._outranks(sequence, one)]
            victims = self._enough(sequence, outranked, running) if outranked else None
            if victims is not None:
                return victims
        return []

    def _outranks(self, waiting: Sequence, running: Sequence) -> bool:
        if waiting.level != running.level:
            return waiting.level > running.level
        if self._far_ahead(running, waiting):
            return True
        passed = running.arrival > waiting.arrival and self._waiting.insists(waiting)
        return passed and not self._far_ahead(waiting, running)

    def _far_ahead(self, one: Sequence, other: Sequence) -> bool:
        """Whether its tenant is ahead by more than what is lost if it gives way to the other."""
        ahead = self._waiting.counter(one.tenant) - self._waiting.counter(other.tenant)
        lost_tokens = self._lag_tokens + len(other.tokens) + len(one.tokens)
        return ahead * one.weight > lost_tokens * PROMPT_TOKEN_COST

    def _enough(
        self, sequence: Sequence, outranked: list[Sequence], running: Listing[Sequence]
    ) -> list[Sequence] | None:
        """The first of the outranked ones to give way without whom the sequence fits. None if it
        waits for a prefix or would not fit without all of them."""
        wanted, matched = self._prefixes.found(sequence)
        if self._prefixes.underway(running).awaited(sequence, wanted, matched):
            return None
        cost = self._prefixes.cost(sequence, matched)
        growing = sum(self._grows(one) for one in running)
        free = self._pool.free_blocks
        # What it finds in the cache stays held when its present holders give way: by itself.
        dropped = Counter(dict.fromkeys(matched, -1))
        victims: list[Sequence] = []
        for victim in (None, *sorted(outranked, key=self.rank, reverse=True)):
            if victim is not None:
                victims.append(victim)
                free += self._pool.freed(victim.block_table, dropped)
                growing -= self._grows(victim)
            staying = len(running) - len(victims)
            left = self._headroom_blocks + growing if staying else 0
            if staying < self._places and free >= cost + left:
                return victims
        return None

    def _grows(self, sequence: Sequence) -> bool:
        """Whether its next token needs one more block."""
        return len(sequence.block_table) < self._pool.blocks_for(len(sequence.tokens))
