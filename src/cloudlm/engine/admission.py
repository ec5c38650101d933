"""Who may start in one step, and who is looked past. A pure decider's part: see ``scheduler``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Listing

from cloudlm.engine.blocks import BlockPool
from cloudlm.engine.fairness import MAX_BYPASSES, Lines
from cloudlm.engine.prefixes import Prefixes, Underway
from cloudlm.engine.sequence import Sequence

# Sequences of a tenant, and of all, that do not fit and are looked past in one step: bounds its
# cost.
_SCAN_WINDOW = 32
_WHOLE_SCAN_WINDOW = 256


class Admission:
    """One step's. ``open`` turns False when nobody can start any more.

    ``running`` are those who run, at most ``places`` of them; to them ``headroom_blocks`` are left.
    ``start`` lets a sequence run with the blocks that were found for it.
    """

    def __init__(
        self,
        waiting: Lines,
        running: Listing[Sequence],
        pool: BlockPool,
        prefixes: Prefixes,
        places: int,
        headroom_blocks: int,
        start: Callable[[Sequence, list[int]], None],
    ) -> None:
        self._waiting = waiting
        self._running = running
        self._pool = pool
        self._prefixes = prefixes
        self._places = places
        self._headroom_blocks = headroom_blocks
        self._start = start
        self.open = bool(waiting) and self._has_room()
        self._underway = prefixes.underway(running) if self.open else Underway()
        self._unfit: list[Sequence] = []
        self._unfit_of: Counter[str] = Counter()
        self._closed: set[str] = set()  # tenants whose next ones wait for an earlier one

    def admit(self, sequence: Sequence) -> bool:
        """Start the sequence, or look past it and return False."""
        if not self.open or sequence.tenant in self._closed:
            return False
        wanted, matched = self._prefixes.found(sequence)
        if self._underway.awaited(sequence, wanted, matched):
            return False
        if not self._fits(sequence, matched):
            self._look_past(sequence)
            return False
        self._waiting.passed(sequence, self._unfit)
        self._start(sequence, matched)
        self._underway.add(sequence, self._prefixes.full(sequence)[len(matched) :])
        self._close()
        return True

    def _has_room(self) -> bool:
        return len(self._running) < self._places and self._pool.free_blocks > 0

    def _fits(self, sequence: Sequence, matched: list[int]) -> bool:
        headroom = self._headroom_blocks if self._running else 0
        return self._prefixes.cost(sequence, matched) + headroom <= self._pool.free_blocks

    def _look_past(self, sequence: Sequence) -> None:
        self._unfit.append(sequence)
        self._unfit_of[sequence.tenant] += 1
        if self._unfit_of[sequence.tenant] >= _SCAN_WINDOW:
            self._closed.add(sequence.tenant)
        self._close()
        self.open = self.open and len(self._unfit) < _WHOLE_SCAN_WINDOW

    def _close(self) -> None:
        """Let nobody pass those that were passed often enough, unless they held others up for as
        long as they may."""
        shut = False
        for one in self._unfit:
            bypassed, overdue = one.bypasses >= MAX_BYPASSES, self._waiting.overdue(one)
            if (bypassed or overdue) and self._waiting.hold(one):
                self._closed.update([one.tenant] if bypassed else [])
                shut = shut or overdue
        self.open = self._has_room() and not shut
