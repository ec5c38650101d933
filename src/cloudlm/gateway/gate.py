"""Waiting to be let in: what ``admission`` decides, done to the tasks of requests.

Also reads what a request says of itself: how critical it is and when its answer is of no use any
more. Must not decide who goes first.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping

from cloudlm.core.clock import Clock
from cloudlm.core.errors import CloudlmError, InvalidRequest, Overloaded
from cloudlm.gateway.account import Exchange
from cloudlm.gateway.admission import Admission, Criticality, Ticket, too_late, turned_away
from cloudlm.gateway.capacity import Capacities
from cloudlm.gateway.view import Snapshot

PRIORITY_HEADER = "x-request-priority"
DEADLINE_HEADER = "x-cloudlm-deadline-ms"
MAX_DEADLINE_MS = 24 * 3600 * 1000
_USUAL = Criticality.DEFAULT
_PRIORITIES = {one.name.lower(): one for one in Criticality}


class Gate:
    """Lets requests in. A model takes ``replica_capacity`` at once for each of its replicas."""

    def __init__(
        self,
        admission: Admission,
        clock: Clock,
        replica_capacity: int,
        longest_wait_s: float,
    ) -> None:
        self._admission = admission
        self._clock = clock
        self._longest_wait_s = longest_wait_s
        self._capacities = Capacities(replica_capacity)
        self._waiting: dict[Ticket, asyncio.Future[CloudlmError | None]] = {}

    @property
    def crowded(self) -> bool:
        """Whether any model's line may be full."""
        return self._admission.crowded

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def queued(self, model: str) -> int:
        """Requests that wait for one model."""
        return self._admission.queued(model)

    def ongoing(self, model: str) -> int:
        """Requests for one model, waiting or not."""
        return self._admission.ongoing(model)

    def turned_away(self, model: str, tenant: str, headers: Mapping[str, str]) -> Overloaded | None:
        """What a request would be told that is turned away whatever else it says, because too many
        wait before it; None if it has to be asked for in full: it may come in or wait, or claims to
        be critical, or its header says nothing known."""
        criticality = _USUAL
        if PRIORITY_HEADER in headers:
            found = _PRIORITIES.get(headers[PRIORITY_HEADER].strip().lower())
            if found is None or found < _USUAL:
                return None
            criticality = found
        capacity = self._capacities.of(model)
        return self._admission.turned_away(model, tenant, criticality, capacity)

    def ticket(
        self,
        exchange: Exchange,
        headers: Mapping[str, str],
        *,
        may_lead: bool,
        held_s: float | None = None,
    ) -> Ticket:
        """A request's ticket. Only who ``may_lead`` can be critical; for others it is usual. One
        that is held for a replica's start may wait ``held_s``. Raises InvalidRequest for a header
        that says nothing known."""
        assert exchange.key is not None
        criticality = _USUAL
        if PRIORITY_HEADER in headers:
            criticality = read_priority(headers)
            if not may_lead:
                criticality = max(criticality, _USUAL)
        wait_s = self._longest_wait_s if held_s is None else held_s
        if DEADLINE_HEADER in headers:
            wait_s = min(read_deadline_s(headers, wait_s), wait_s)
        return Ticket(
            exchange.model,
            exchange.key.tenant,
            criticality=criticality,
            deadline=exchange.started + wait_s,
        )

    async def enter(self, ticket: Ticket, exchange: Exchange) -> None:
        """Come in, at once or when it is this request's turn; leaves when the exchange leaves the
        model. Raises Overloaded, or what the exchange was cut with."""
        now = self._clock.monotonic()
        victim = self._admission.enter(ticket, self._capacities.of(ticket.model), now)
        exchange.at_leave(functools.partial(self._leave, ticket))
        if victim is not None:
            self._tell(victim, turned_away())
        if ticket.waits:
            await self._wait(ticket, exchange, ticket.deadline - now)

    async def _wait(self, ticket: Ticket, exchange: Exchange, longest_s: float) -> None:
        loop = asyncio.get_running_loop()
        turn = self._waiting[ticket] = loop.create_future()
        alarm = loop.call_later(longest_s, self._tell, ticket, too_late())
        try:
            with exchange.interrupt:
                error = await turn
        finally:
            alarm.cancel()
            del self._waiting[ticket]
        if error is not None:
            raise error

    def follow(self, view: Snapshot) -> None:
        """Called when the state changed: more replicas hold more."""
        models = view.models.items()
        self._capacities.follow({name: len(model.endpoints) for name, model in models})
        self._reckon()

    def narrow(self, model: str, at_once: int) -> None:
        """From now on send each replica of ``model`` only so many requests at once."""
        self._capacities.narrow(model, at_once)
        self._reckon()

    def widen(self, model: str) -> None:
        """Send each replica of ``model`` as many as any other's again."""
        if self._capacities.widen(model):
            self._reckon()

    def _reckon(self) -> None:
        """Let in who has a place by what each model takes now."""
        for name in self._capacities:
            if self._admission.queued(name):
                self._let_in(self._admission.pump(name, self._capacities.of(name)))

    def _leave(self, ticket: Ticket) -> None:
        capacity = self._capacities.of(ticket.model)
        self._let_in(self._admission.leave(ticket, capacity, self._clock.monotonic()))

    def _let_in(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            self._tell(ticket, None)

    def _tell(self, ticket: Ticket, error: CloudlmError | None) -> None:
        turn = self._waiting.get(ticket)
        if turn is not None and not turn.done():
            turn.set_result(error)


def read_priority(headers: Mapping[str, str]) -> Criticality:
    """``x-request-priority``. Raises InvalidRequest."""
    text = headers.get(PRIORITY_HEADER)
    if text is None:
        return Criticality.DEFAULT
    found = _PRIORITIES.get(text.strip().lower())
    if found is None:
        raise InvalidRequest(
            f"{PRIORITY_HEADER} must be one of {', '.join(_PRIORITIES)}, not {text[:40]!r}",
            param=PRIORITY_HEADER,
        )
    return found


def read_deadline_s(headers: Mapping[str, str], usual_s: float) -> float:
    """``x-cloudlm-deadline-ms``: seconds from now in which an answer must begin. Raises
    InvalidRequest."""
    text = headers.get(DEADLINE_HEADER)
    if text is None:
        return usual_s
    text = text.strip()
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 10) or not (
        1 <= int(text) <= MAX_DEADLINE_MS
    ):
        raise InvalidRequest(
            f"{DEADLINE_HEADER} must be a whole number of milliseconds from 1 to "
            f"{MAX_DEADLINE_MS}, not {text[:40]!r}",
            param=DEADLINE_HEADER,
        )
    return int(text) / 1000
