"""Who may come in, who waits, who is turned away: one bounded, fair queue per model.

A model takes as many requests at once as its replicas can hold; more wait in the gateway, where
they can still be put in order. Tenants share what comes free in tokens, by weight: start-time fair
queueing (Goyal, Vin, Cheng 1996), so that one tenant's flood delays its own requests. Critical
requests go before usual ones and those before sheddable ones. When the queue is full the request
that would be served last is turned away, the newcomer or another; one that cannot be begun before
its deadline is turned away at once. Pure: no I/O, no clock, no waiting; ``gate`` does that.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from enum import IntEnum

from cloudlm.core.errors import Overloaded

RETRY_AFTER_S = 1.0
_PACE_MEMORY = 0.1
"""How much one departure counts in the mean time between departures."""
_SWEEP_AT = 64


class Criticality(IntEnum):
    """Lower goes first and is turned away last."""

    CRITICAL = 0
    DEFAULT = 1
    SHEDDABLE = 2


@dataclass(slots=True, eq=False)
class Ticket:
    """One request. ``cost`` is in tokens; it must begin before ``deadline``, monotonic seconds.
    One that is ``held`` waits where there is no replica at all."""

    model: str
    tenant: str
    cost: float = 1.0
    weight: float = 1.0
    criticality: Criticality = Criticality.DEFAULT
    deadline: float = float("inf")
    start: float = 0.0
    order: int = 0
    admitted: bool = False
    waits: bool = False
    held: bool = False

    @property
    def end(self) -> float:
        """Where its tenant's share stands after it."""
        return self.start + self.cost / self.weight

    def __hash__(self) -> int:
        """Each is only equal to itself. Said here, because compiled classes with an order are not
        hashable otherwise."""
        return id(self)

    def __lt__(self, other: Ticket) -> bool:
        """Whether this one is served first."""
        mine = (self.criticality, self.start, self.order)
        return mine < (other.criticality, other.start, other.order)


class _Line:
    """The requests of one model: those inside, those that wait, and the shares of tenants.

    Both heaps hold all that wait, the first to be served and the last to be served on top; those
    that wait no longer are passed over, and swept out when they are many.
    """

    __slots__ = (
        "between_s",
        "finish",
        "first",
        "inside",
        "last",
        "left_at",
        "length",
        "lengths",
        "virtual",
    )

    def __init__(self) -> None:
        self.inside = 0
        self.first: list[Ticket] = []
        self.last: list[tuple[int, float, int, Ticket]] = []
        self.length = 0  # requests that wait
        self.lengths = [0] * len(Criticality)  # by criticality
        self.virtual = 0.0
        self.finish: dict[str, float] = {}
        self.left_at: float | None = None
        self.between_s = 0.0  # mean time between departures while others wait

    def push(self, ticket: Ticket) -> None:
        """Have a request wait."""
        ticket.waits = True
        self.length += 1
        self.lengths[ticket.criticality] += 1
        self.finish[ticket.tenant] = ticket.end
        heapq.heappush(self.first, ticket)
        mark = (-ticket.criticality, -ticket.start, -ticket.order, ticket)
        heapq.heappush(self.last, mark)

    def remove(self, ticket: Ticket) -> None:
        """A request waits no longer."""
        ticket.waits = False
        self.length -= 1
        self.lengths[ticket.criticality] -= 1
        if len(self.last) > 2 * self.length + _SWEEP_AT:
            self.first = [one for one in self.first if one.waits]
            self.last = [mark for mark in self.last if mark[3].waits]
            heapq.heapify(self.first)
            heapq.heapify(self.last)

    def drop(self, ticket: Ticket) -> None:
        """As ``remove``, of a request that was not served: its tenant need not pay for it."""
        self.remove(ticket)
        if self.finish.get(ticket.tenant) == ticket.end:
            self.finish[ticket.tenant] = ticket.start

    def last_served(self) -> Ticket | None:
        """Who waits longest."""
        while self.last and not self.last[0][3].waits:
            heapq.heappop(self.last)
        return self.last[0][3] if self.last else None

    def wait_s(self, criticality: Criticality) -> float:
        """How long a newcomer would wait, at the pace of late."""
        return self.between_s * (sum(self.lengths[: criticality + 1]) + 1)

    def admit(self, ticket: Ticket) -> None:
        """Let a request in."""
        ticket.admitted = True
        self.inside += 1
        self.virtual = max(self.virtual, ticket.start)
        end = ticket.end
        if end > self.finish.get(ticket.tenant, 0.0):
            self.finish[ticket.tenant] = end

    def depart(self, now: float) -> None:
        """A request that was inside has ended."""
        self.inside -= 1
        if self.left_at is not None and self.length:
            self.between_s += (now - self.left_at - self.between_s) * _PACE_MEMORY
        self.left_at = now


class Admission:
    """All lines. ``max_ongoing`` bounds what the gateway has to do, ``max_queued`` each line; those
    that are held for a replica's start count only in their line, or they would keep requests out
    for which there is one."""

    def __init__(self, max_ongoing: int, max_queued: int) -> None:
        self._max_ongoing = max_ongoing
        self._max_queued = max_queued
        self._lines: dict[str, _Line] = {}
        self._total = 0
        self._waiting = 0  # in all lines
        self._order = 0

    @property
    def total(self) -> int:
        """Requests in the gateway, waiting or not, but for those that are held."""
        return self._total

    @property
    def crowded(self) -> bool:
        """Whether any line may be full; if not, nobody is turned away for that."""
        return self._waiting >= self._max_queued or self._total >= self._max_ongoing

    def ongoing(self, model: str) -> int:
        """Requests for one model, waiting or not."""
        line = self._lines.get(model)
        return line.inside + line.length if line is not None else 0

    def queued(self, model: str) -> int:
        """Requests that wait for one model."""
        line = self._lines.get(model)
        return line.length if line is not None else 0

    def turned_away(
        self, model: str, tenant: str, criticality: Criticality, capacity: int
    ) -> Overloaded | None:
        """What ``enter`` would raise for a newcomer because the line is full, whatever its cost and
        deadline; None if it may come in or wait. Nothing is counted: asking costs next to nothing,
        so that those who are turned away cost those who are served next to nothing."""
        line = self._lines.get(model)
        length = line.length if line is not None else 0
        full = self._total >= self._max_ongoing and capacity > 0
        if length < self._max_queued and not full:
            return None
        if line is None:
            return _line_is_full(0, 0.0) if full or capacity <= 0 else None
        if line.inside < capacity and not length and self._total < self._max_ongoing:
            return None
        last = line.last_served()
        if last is not None:
            start = max(line.virtual, line.finish.get(tenant, 0.0))
            if (criticality, start) < (last.criticality, last.start):
                return None
        return _line_is_full(length, line.wait_s(criticality))

    def enter(self, ticket: Ticket, capacity: int, now: float) -> Ticket | None:
        """Admit a request or have it wait (``ticket.waits``). Returns the one that is turned away
        in its place, if any. Raises Overloaded if it is itself turned away."""
        line = self._lines.get(ticket.model)
        if line is None:
            line = self._lines[ticket.model] = _Line()
        self._order += 1
        ticket.order = self._order
        ticket.start = max(line.virtual, line.finish.get(ticket.tenant, 0.0))
        length = line.length
        if line.inside < capacity and not length and self._total < self._max_ongoing:
            line.admit(ticket)
            self._total += 1
            return None
        wait_s = line.wait_s(ticket.criticality)
        if now + wait_s > ticket.deadline:
            raise _overloaded(f"it could not begin within its deadline ({wait_s:.1f} s)", wait_s)
        victim = None
        ticket.held = capacity <= 0
        full = self._total >= self._max_ongoing and not ticket.held
        if length >= self._max_queued or full:
            victim = line.last_served()
            if victim is None or not ticket < victim:
                raise _line_is_full(length, wait_s)
            line.drop(victim)
            self._waiting -= 1
            self._total -= not victim.held
        line.push(ticket)
        self._waiting += 1
        self._total += not ticket.held
        return victim

    def leave(self, ticket: Ticket, capacity: int, now: float) -> list[Ticket]:
        """A request has ended, or waits no longer. Returns those that come in now."""
        line = self._lines.get(ticket.model)
        if line is None or not (ticket.waits or ticket.admitted):
            return []  # it was turned away
        self._total -= not ticket.held
        if ticket.waits:
            line.drop(ticket)
            self._waiting -= 1
        else:
            ticket.admitted = False
            line.depart(now)
        admitted = self.pump(ticket.model, capacity) if line.first else []
        if not line.inside and not line.length:
            del self._lines[ticket.model]  # shares are forgotten: nobody is kept waiting
        return admitted

    def pump(self, model: str, capacity: int) -> list[Ticket]:
        """Let in those who wait, as far as there is room: the fairest first."""
        admitted: list[Ticket] = []
        line = self._lines.get(model)
        while line is not None and line.first and line.inside < capacity:
            ticket = heapq.heappop(line.first)
            if ticket.waits:
                line.remove(ticket)
                self._waiting -= 1
                line.admit(ticket)
                self._total += ticket.held
                ticket.held = False
                admitted.append(ticket)
        return admitted


def _overloaded(why: str, wait_s: float) -> Overloaded:
    return Overloaded(
        f"the model is busy: {why}; try again shortly", retry_after_s=max(wait_s, RETRY_AFTER_S)
    )


def _line_is_full(length: int, wait_s: float) -> Overloaded:
    return _overloaded(f"{length} requests wait already", wait_s)


def turned_away() -> Overloaded:
    """What a request is told that waited and had to make room."""
    return _overloaded("others go first", RETRY_AFTER_S)


def too_late() -> Overloaded:
    """What a request is told whose deadline passed while it waited."""
    return _overloaded("it could not begin within its deadline", RETRY_AFTER_S)
