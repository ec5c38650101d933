"""Who is next: one waiting line per tenant, and how much each tenant was served.

Every tenant has a counter that grows with the tokens computed for it, divided by its weight; the
one with the least counter is served next. A tenant that comes back does so at the counter of those
who wait: to have been away saves nothing up. Source: virtual token counters, Sheng et al.,
"Fairness in Serving Large Language Models", OSDI 2024 (arXiv 2401.00588), which is start-time fair
queueing with tokens for packets. Higher priorities come first whatever the counters say, but from
time to time the sequence that got nothing for longest, in line or in the midst of its prompt, is
lifted to them, so that nothing starves. Among equal priorities an answer that another engine began
goes before those that nobody has begun: its client has seen its first tokens and waits for the
next, and its tenant was served for it there.

A pure decider's part: must not import torch, asyncio, time, logging or threading.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace, merge
from itertools import chain

from cloudlm.engine.sequence import Sequence, Status

PROMPT_TOKEN_COST = 1.0
ANSWER_TOKEN_COST = 2.0
"""What a computed prompt token and a generated one add to a counter, as in the source."""

PROMOTION_STEPS = 64
"""Steps after which a sequence may have waited too long; one per so many steps is lifted."""

MAX_BYPASSES = 16
"""Later sequences that may be admitted while an earlier one does not fit; then they wait for it."""

HOLD_STEPS = 64
"""Steps in which others wait for a tenant's sequences that do not fit, until one of those starts.
Then they go on passing it, and give way to it as soon as that is enough."""

_MANY_TENANTS = 1024  # counters kept before those that say nothing any more are dropped


@dataclass(slots=True)
class _Tenant:
    """``waiting`` is in the order of ``_place``; ``stuck`` is the first that did not fit, of those
    of the highest level. Others were ``held`` up for so many steps, at last in step ``held_at``,
    since a stuck one started."""

    counter: float = 0.0
    sequences: int = 0
    waiting: list[Sequence] = field(default_factory=list)
    stuck: Sequence | None = None
    held: int = 0
    held_at: int = 0


class Lines:
    """All sequences that wait, and every tenant's counter. Iterates in no particular order."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._present = 0  # sequences that have entered and not left
        self._waiting = 0
        self._level = 0.0  # counters that are no greater say nothing: a newcomer begins here
        self._last = _Tenant()  # the last one whose sequence started
        self._step = 0
        self._promoted_at = 0

    def __len__(self) -> int:
        return self._waiting

    def __iter__(self) -> Iterator[Sequence]:
        for tenant in self._tenants.values():
            yield from tenant.waiting

    def counter(self, tenant: str) -> float:
        """Tokens computed for the tenant, weighted; only differences between tenants mean
        anything."""
        known = self._tenants.get(tenant)
        return self._level if known is None else known.counter

    def enter(self, sequence: Sequence) -> None:
        """A new sequence waits. Its tenant's counter is lifted if none of its others waits."""
        if self._present == 0:  # nobody is here to be compared with: all begin anew
            self._tenants.clear()
            self._level, self._last = 0.0, _Tenant()
        self._forget()
        self._present += 1
        tenant = self._tenants.setdefault(sequence.tenant, _Tenant(self._level))
        if not tenant.waiting:
            tenant.counter = max(tenant.counter, self._least())
        tenant.sequences += 1
        self._queue(sequence)

    def wait(self, sequence: Sequence) -> None:
        """A sequence that ran gives way. It goes before others no more, or it would take its place
        back from whom it gave way to."""
        sequence.resumed = False
        self._queue(sequence)

    def _queue(self, sequence: Sequence) -> None:
        """Put a sequence of a known tenant into its line."""
        sequence.idle_since = self._step
        insort(self._tenants[sequence.tenant].waiting, sequence, key=_place)
        self._waiting += 1

    def start(self, sequence: Sequence) -> None:
        """The sequence waits no longer, it runs."""
        tenant = self._tenants[sequence.tenant]
        if tenant.stuck is sequence:
            tenant.held = 0
        self._take_out(sequence, tenant)

    def _take_out(self, sequence: Sequence, tenant: _Tenant) -> None:
        self._level = max(self._level, self._least())
        tenant.waiting.remove(sequence)
        self._waiting -= 1
        self._last = tenant
        if tenant.stuck is sequence:
            tenant.stuck = None

    def leave(self, sequence: Sequence, waiting: bool) -> None:
        """The sequence has ended."""
        tenant = self._tenants[sequence.tenant]
        if waiting:
            self._take_out(sequence, tenant)
        tenant.sequences -= 1
        self._present -= 1

    def computes(self, sequence: Sequence) -> None:
        """More of its prompt is computed in this step."""
        sequence.idle_since = self._step

    def charge(self, sequence: Sequence, cost: float) -> None:
        """Count what is computed for a sequence, in prompt tokens."""
        self._tenants[sequence.tenant].counter += cost / sequence.weight

    def tick(self, running: Iterable[Sequence]) -> None:
        """A step begins. Lift the sequence that waited longest, in line or for more of its prompt
        to be computed, to the best standing there is, if it waited too long behind others and none
        was lifted lately."""
        self._step += 1
        for tenant in self._lines():
            if tenant.stuck is not None and self.overdue(tenant.stuck):
                self.hold(tenant.stuck)
        if self._step - self._promoted_at < PROMOTION_STEPS:
            return
        self._promoted_at = self._step
        behind = [one for one in chain(self, running) if self._idle(one)]
        if not behind:
            return
        heads = (tenant.waiting[0] for tenant in self._lines())
        best = min(map(standing, chain(running, heads)))
        low = [one for one in behind if standing(one) > best]
        if low:
            self._lift(min(low, key=lambda one: (one.idle_since, one.arrival)), best)

    def _idle(self, sequence: Sequence) -> bool:
        """Whether it got nothing for too long. What decodes gets a token in every step."""
        decodes = sequence.status is Status.RUNNING and sequence.remaining == 1
        return not decodes and self._step - sequence.idle_since >= PROMOTION_STEPS

    def _lift(self, sequence: Sequence, best: tuple[int, bool]) -> None:
        line = self._tenants[sequence.tenant].waiting
        waits = sequence.status is Status.WAITING
        if waits:
            line.remove(sequence)
        level, begun_here = best
        sequence.level, sequence.resumed = -level, sequence.resumed or not begun_here
        if waits:
            insort(line, sequence, key=_place)

    def asking(self) -> Iterator[Sequence]:
        """Those for whom others may have to give way, next first: the next one, and behind such as
        are overdue the next that is not. Nobody passes an overdue one that may still hold them up.
        """
        overdue = [t.stuck for t in self._lines() if t.stuck and self.overdue(t.stuck)]
        plain = (s for t in self._lines() for s in t.waiting[:2] if not self.overdue(s))
        first = min(plain, key=self._rank, default=None)
        for sequence in sorted(overdue if first is None else [*overdue, first], key=self._rank):
            yield sequence
            if self.overdue(sequence) and not self.insists(sequence):
                return

    def ranked(self, prefilling: list[Sequence], admitting: bool) -> Iterator[Sequence]:
        """Who gets prompt tokens computed, next first: those that are at it and, if ``admitting``,
        those that wait. What is charged meanwhile changes who comes later."""
        lines: dict[str, Iterator[Sequence]] = {}
        heap: list[tuple[tuple[int, bool, bool, float, int], Sequence]] = []
        names = {one.tenant for one in prefilling}
        if admitting:
            names.update(name for name, tenant in self._tenants.items() if tenant.waiting)
        for name in names:
            begun = sorted((s for s in prefilling if s.tenant == name), key=_place)
            waiting = self._tenants[name].waiting[:] if admitting else []
            # Merging is stable: what has begun stays before what waits in the same class.
            lines[name] = merge(begun, waiting, key=standing)
            head = next(lines[name])
            heap.append((self._rank(head), head))
        heapify(heap)
        while heap:
            (rank, sequence) = heap[0]
            now = self._rank(sequence)
            if now > rank:  # a stale counter; they only grow
                heapreplace(heap, (now, sequence))
                continue
            following = next(lines[sequence.tenant], None)
            if following is None:
                heappop(heap)
            else:
                heapreplace(heap, (self._rank(following), following))
            yield sequence

    def overdue(self, sequence: Sequence) -> bool:
        """Whether this sequence was passed too often."""
        stuck = self._tenants[sequence.tenant].stuck
        return stuck is sequence and sequence.overtaken >= MAX_BYPASSES

    def insists(self, sequence: Sequence) -> bool:
        """Whether it is overdue and has held others up for as long as it may: from now on those
        that came after it give way to it."""
        return self.overdue(sequence) and self._tenants[sequence.tenant].held >= HOLD_STEPS

    def hold(self, sequence: Sequence) -> bool:
        """Count a step in which others wait for this sequence, which does not fit. False if they
        did so for ``HOLD_STEPS`` steps: then they need not."""
        tenant = self._tenants[sequence.tenant]
        if tenant.held_at != self._step:
            if tenant.held >= HOLD_STEPS:
                return False
            tenant.held += 1
            tenant.held_at = self._step
        return True

    def passed(self, by: Sequence, unfit: list[Sequence]) -> None:
        """``by`` is admitted and these, ranked before it, do not fit. Who is stuck for longer
        counts as well, even if ``by`` is ranked before it now."""
        for sequence in unfit:
            tenant = self._tenants[sequence.tenant]
            if sequence.tenant == by.tenant:
                sequence.bypasses += 1
            if tenant.stuck is None or tenant.stuck.level < sequence.level:
                tenant.stuck = sequence
        for tenant in self._tenants.values():
            stuck = tenant.stuck
            if stuck is not None and stuck.arrival < by.arrival and stuck.level >= by.level:
                stuck.overtaken += 1

    def _rank(self, sequence: Sequence) -> tuple[int, bool, bool, float, int]:
        tenant = self._tenants[sequence.tenant]
        level, begun_here = standing(sequence)
        overdue = self.overdue(sequence)
        return level, not overdue, begun_here, tenant.counter, sequence.arrival

    def _lines(self) -> Iterator[_Tenant]:
        return (tenant for tenant in self._tenants.values() if tenant.waiting)

    def _least(self) -> float:
        waiting = min((tenant.counter for tenant in self._lines()), default=self._last.counter)
        return max(waiting, self._level)

    def _forget(self) -> None:
        """Drop the counters that are no more than a newcomer's: the same without them."""
        if len(self._tenants) > _MANY_TENANTS:
            self._tenants = {
                name: tenant
                for name, tenant in self._tenants.items()
                if tenant.sequences or tenant.counter > self._level
            }


def _place(sequence: Sequence) -> tuple[int, bool, int]:
    return *standing(sequence), sequence.arrival


def standing(sequence: Sequence) -> tuple[int, bool]:
    """What decides before tenants do: the less, the sooner."""
    return -sequence.level, not sequence.resumed
