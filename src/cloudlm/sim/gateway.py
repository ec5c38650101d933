"""The gateway in virtual time: the same questions to the same deciders, in the handler's order.

Here a request comes, is let in, held or refused, and ends; ``sending`` does what lies between. Must
not decide: ``admission``, ``capacity`` and ``demand`` do.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, cast

from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.errors import Overloaded
from cloudlm.core.settings import GatewaySettings
from cloudlm.core.tenant import LedgerRow, Outcome
from cloudlm.gateway.admission import Admission, Ticket
from cloudlm.gateway.capacity import Capacities, herd_is_over
from cloudlm.gateway.demand import DemandReporter
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.prefixes import BLOCK_BYTES
from cloudlm.gateway.waiting import DOUBLE_EVERY_S
from cloudlm.sim.copies import Copies
from cloudlm.sim.fleet import Fleet
from cloudlm.sim.holding import Holding
from cloudlm.sim.measure import Books
from cloudlm.sim.picture import Picture
from cloudlm.sim.request import Request
from cloudlm.sim.sending import Sending
from cloudlm.sim.state import SimState
from cloudlm.sim.timeline import Timeline, WallClock
from cloudlm.sim.traffic import Arrival

if TYPE_CHECKING:
    from cloudlm.gateway.view import View
    from cloudlm.state.base import State

BYTES_PER_TOKEN = 4
"""How many bytes of a request's body a token of its prompt takes: what tells how many of the
gateway's blocks a prompt has."""


class SimGateway:
    """One gateway process."""

    def __init__(
        self,
        name: str,
        spec: DeploymentSpec,
        settings: GatewaySettings,
        timeline: Timeline,
        state: SimState,
        books: Books,
        fleet: Fleet,
        chance: Random,
        draws: Random,
    ) -> None:
        self.timeline = timeline
        self.clock = WallClock(timeline)
        self.loads = Loads()
        self._spec = spec
        self._settings = settings
        self._state = state
        self._books = books
        self._chance = chance
        self._admission = Admission(settings.max_ongoing_requests, settings.max_queued_requests)
        self._waiting: dict[Ticket, Request] = {}
        self.picture = Picture(spec)
        self._capacities = Capacities(settings.replica_capacity)
        self._holding = Holding(
            timeline, self._look_out, self._herd_is_over, lambda: bool(self.picture.endpoints)
        )
        state.tell_of_writes(self._holding.news)
        self._at_once, self._double_at = 0, math.inf
        self._coming: deque[Ticket] = deque()
        self._serving = False
        self._numbers = 0
        self._demand = DemandReporter(
            name,
            cast("State", None),  # its rows are written here
            cast("View", self.picture),
            self._admission,
            self.loads,
            self.clock,
        )
        self._sending = Sending(
            spec,
            settings,
            timeline,
            self.clock,
            self.loads,
            self.picture,
            fleet,
            books,
            chance,
            draws,
            self._end,
            self._account,
        )
        self._copies = Copies(self.picture, self._sending.copy)

    # What it is told -----------------------------------------------------------------------------

    def follow(self, endpoints: tuple[Endpoint, ...]) -> None:
        """Other replicas serve from now on."""
        picture = self.picture
        if endpoints == picture.written:
            return
        picture.follow(endpoints)
        self._capacities.follow({self._spec.name: len(picture.endpoints)})
        self.loads.keep_only({endpoint.replica for endpoint in endpoints})
        self._let_in(self._admission.pump(self._spec.name, self._capacity()))

    def report(self) -> None:
        """Tell control what was asked for since the last time."""
        if not self._state.down:
            self._state.put_demand(self._demand.measure())

    def arrive(self, arrival: Arrival, number: int) -> None:
        """A client asks."""
        request = Request(arrival, number)
        name, now = self._spec.name, self.timeline.now
        self._demand.count(name, arrival.prompt_tokens * BYTES_PER_TOKEN)
        self._books.arrived(arrival)
        held = not self.picture.endpoints
        if held and not self.picture.model.holds:
            self._end(request, Outcome.REFUSED)
            return
        if held and self._holding.begin():
            self._at_once = math.ceil(self.picture.model.target_ongoing_requests)
            self._double_at = math.inf
            self._capacities.narrow(name, self._at_once)
        limits = self._settings
        ticket = request.ticket = Ticket(
            name,
            arrival.tenant,
            cost=arrival.prompt_tokens + arrival.output_tokens,
            deadline=now + (limits.hold_timeout_s if held else limits.queue_timeout_s),
        )
        try:
            victim = self._admission.enter(ticket, self._capacity(), now)
        except Overloaded:
            self._end(request, Outcome.REFUSED)
            return
        if victim is not None:
            self._end(self._waiting.pop(victim), Outcome.REFUSED)
        if ticket.waits:
            self._waiting[ticket] = request
            self.timeline.at(ticket.deadline, self._too_late, ticket)
        else:
            self._serve(request)

    @property
    def queued(self) -> int:
        """Requests that wait to be let in."""
        return self._admission.queued(self._spec.name)

    # Admission -----------------------------------------------------------------------------------

    def _capacity(self) -> int:
        return self._capacities.of(self._spec.name)

    def _look_out(self, told: bool) -> bool:
        """While requests are held: tell control of them at once, and look for replicas. Whether
        control was told."""
        if self._state.down:
            return told
        if not told:
            self.report()
        self.follow(self._state.endpoints)
        self._double()
        return True

    def _double(self) -> None:
        """Where always somebody waits, replicas get twice as many every few seconds
        (``gateway.waiting``)."""
        now, name = self.timeline.now, self._spec.name
        if not self.picture.endpoints:
            self._double_at = math.inf
        elif self._double_at == math.inf:
            self._double_at = now + DOUBLE_EVERY_S
        elif self._double_at <= now:
            self._at_once, self._double_at = 2 * self._at_once, now + DOUBLE_EVERY_S
            self._capacities.narrow(name, self._at_once)
            self._let_in(self._admission.pump(name, self._capacity()))

    def _herd_is_over(self) -> bool:
        """Whether nobody is held any more; its replicas are then sent as many as others."""
        name, answers = self._spec.name, bool(self.picture.endpoints)
        admission = self._admission
        if not herd_is_over(admission.queued(name), admission.ongoing(name), answers=answers):
            return False
        self._capacities.widen(name)
        return True

    def _let_in(self, tickets: Sequence[Ticket]) -> None:
        """Serve them one after the other: one that ends at once lets in more."""
        self._coming.extend(tickets)
        if self._serving:
            return
        self._serving = True
        while self._coming:
            self._serve(self._waiting.pop(self._coming.popleft()))
        self._serving = False

    def _too_late(self, ticket: Ticket) -> None:
        request = self._waiting.pop(ticket, None)
        if request is not None:
            self._end(request, Outcome.REFUSED)

    def _serve(self, request: Request) -> None:
        request.keys = self._keys(request.arrival)
        self._copies.watch(request)
        self._sending.serve(request)

    def _account(self, row: LedgerRow) -> None:
        """An attempt has ended."""
        self._demand.ended(row)
        self._state.append_ledger(row)
        self._books.attempts += 1
        if self._books.rows is not None:
            self._books.rows.append(row)

    def _end(self, request: Request, outcome: Outcome) -> None:
        """The request is over, whatever becomes of it."""
        assert not request.ended, "a request ended twice"
        request.ended = True
        if request.copy:
            self._copies.end()
            return
        if outcome is Outcome.FINISHED:
            self._score(request)
            if request.mirrored:
                self._copies.begin(request)
        self._books.ended(request.arrival, outcome, request.first_at, self.timeline.now)
        ticket = request.ticket
        if ticket is not None:
            now = self.timeline.now
            self._let_in(self._admission.leave(ticket, self._capacity(), now))

    def _score(self, request: Request) -> None:
        """Some clients say how good an answer was."""
        version, chance = request.version, self._chance
        if version is not None and version.scored and chance.random() < version.scored:
            self._state.score(request.revision, chance.random() < version.score)

    def _keys(self, arrival: Arrival) -> tuple[bytes, ...]:
        """The gateway's blocks of a prompt: those of its beginnings, and its own."""
        each = max(1, arrival.block_tokens * BYTES_PER_TOKEN // BLOCK_BYTES)
        keys = [
            (block * each + part).to_bytes(8, signed=True)
            for block in arrival.blocks
            for part in range(each)
        ]
        own_tokens = arrival.prompt_tokens - len(arrival.blocks) * arrival.block_tokens
        for _ in range(own_tokens * BYTES_PER_TOKEN // BLOCK_BYTES):
            self._numbers += 1
            keys.append((self._numbers | 1 << 62).to_bytes(8))
        return tuple(keys)
