"""The gateway in virtual time: the same questions to the same deciders, in the handler's order.

admit → choose → send → first token → end, with retries, resumes and the ledger's rows, as
``gateway.chat`` does it over HTTP; what differs is who carries the bytes. Every request is taken
for a stream. Must not decide: ``router``, ``admission``, ``retry`` and ``demand`` do.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, cast

from cloudlm.core.chat import Usage
from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.errors import Overloaded
from cloudlm.core.price import FREE
from cloudlm.core.routing import Policy
from cloudlm.core.settings import GatewaySettings
from cloudlm.core.tenant import LedgerRow, Outcome
from cloudlm.gateway.admission import Admission, Ticket
from cloudlm.gateway.capacity import Capacities, herd_is_over
from cloudlm.gateway.demand import DemandReporter
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.prefixes import BLOCK_BYTES
from cloudlm.gateway.retry import RetryBudget, full_jitter
from cloudlm.gateway.router import choose
from cloudlm.gateway.view import ServedModel, Snapshot
from cloudlm.sim.fleet import Fleet
from cloudlm.sim.holding import Holding
from cloudlm.sim.measure import Books
from cloudlm.sim.replica import Work
from cloudlm.sim.state import SimState
from cloudlm.sim.timeline import Timeline, WallClock
from cloudlm.sim.traffic import Arrival

if TYPE_CHECKING:
    from cloudlm.gateway.view import View
    from cloudlm.state.base import State

BYTES_PER_TOKEN = 4
"""How many bytes of a request's body a token of its prompt takes: what tells how many of the
gateway's blocks a prompt has."""
WORKER_RETRY_AFTER_S = 1.0


class Request:
    """One request on its way. ``shown`` are tokens that its client has."""

    __slots__ = (
        "arrival",
        "attempts",
        "ended",
        "first_at",
        "keys",
        "number",
        "resumes",
        "revision",
        "shown",
        "ticket",
        "tried",
    )

    def __init__(self, arrival: Arrival, number: int) -> None:
        self.arrival = arrival
        self.number = number
        self.keys: tuple[bytes, ...] = ()
        self.ticket: Ticket | None = None
        self.tried: set[str] = set()
        self.attempts = 0
        self.resumes = 0
        self.revision = 0
        self.shown = 0
        self.first_at = -1.0
        self.ended = False


class Attempt(Work):
    """One request sent to one replica."""

    __slots__ = ("gateway", "open", "replica", "request", "sent_at", "spoke", "turn")

    def __init__(self, gateway: SimGateway, request: Request, endpoint: Endpoint) -> None:
        arrival = request.arrival
        super().__init__(
            arrival.prompt_tokens + request.shown,
            max(arrival.output_tokens - request.shown, 1),
            arrival.blocks,
            arrival.block_tokens,
        )
        self.gateway = gateway
        self.request = request
        self.replica = endpoint.replica
        now = gateway.timeline.now
        self.turn = gateway.loads.begin(endpoint.replica, request.keys, now)
        self.sent_at = now
        self.spoke = -1.0  # when its first token was shown
        self.open = True


class _Picture:
    """What stands in for ``gateway.view.View``: one model and its endpoints."""

    ready = True

    def __init__(self, spec: DeploymentSpec) -> None:
        self.spec = spec
        self.follow(())

    def follow(self, endpoints: tuple[Endpoint, ...]) -> None:
        spec = self.spec
        model = ServedModel(
            spec.name,
            0.0,
            endpoints,
            routing=spec.routing,
            holds=spec.may_be_none,
            target_ongoing_requests=spec.target_ongoing_requests,
        )
        self._snapshot = Snapshot(0, {model.name: model})
        self.endpoints = endpoints
        self.model = model

    def snapshot(self) -> Snapshot:
        return self._snapshot


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
    ) -> None:
        self.timeline = timeline
        self.clock = WallClock(timeline)
        self.loads = Loads()
        self.fleet = fleet
        self._spec = spec
        self._settings = settings
        self._state = state
        self._books = books
        self._chance = chance
        self._budget = RetryBudget()
        self._admission = Admission(settings.max_ongoing_requests, settings.max_queued_requests)
        self._waiting: dict[Ticket, Request] = {}
        self._picture = _Picture(spec)
        self._capacities = Capacities(settings.replica_capacity)
        self._holding = Holding(timeline, self._look_out, self._herd_is_over)
        self._coming: deque[Ticket] = deque()
        self._serving = False
        self._numbers = 0
        self._demand = DemandReporter(
            name,
            cast("State", None),  # its rows are written here
            cast("View", self._picture),
            self._admission,
            self.loads,
            self.clock,
        )

    # What it is told -----------------------------------------------------------------------------

    def follow(self, endpoints: tuple[Endpoint, ...]) -> None:
        """Other replicas serve from now on."""
        if endpoints == self._picture.endpoints:
            return
        self._picture.follow(endpoints)
        self._capacities.follow({self._spec.name: len(endpoints)})
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
        held = not self._picture.endpoints
        if held and not self._picture.model.holds:
            self._end(request, Outcome.REFUSED)
            return
        if held and self._holding.begin():
            at_once = math.ceil(self._picture.model.target_ongoing_requests)
            self._capacities.narrow(name, at_once)
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
        return True

    def _herd_is_over(self) -> bool:
        """Whether nobody is held any more; its replicas are then sent as many as others."""
        name, answers = self._spec.name, bool(self._picture.endpoints)
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

    def _end(self, request: Request, outcome: Outcome) -> None:
        """The request is over, whatever becomes of it."""
        assert not request.ended, "a request ended twice"
        request.ended = True
        self._books.ended(request.arrival, outcome, request.first_at, self.timeline.now)
        ticket = request.ticket
        if ticket is not None:
            now = self.timeline.now
            self._let_in(self._admission.leave(ticket, self._capacity(), now))

    # Choosing and sending ------------------------------------------------------------------------

    def _serve(self, request: Request) -> None:
        self._budget.count_request(self.timeline.now)
        request.keys = self._keys(request.arrival)
        endpoint = self._choose(request, retrying=False)
        if endpoint is None:
            self._end(request, Outcome.REFUSED)
        else:
            self._send(request, endpoint)

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

    def _choose(
        self, request: Request, *, retrying: bool, among: Sequence[Endpoint] | None = None
    ) -> Endpoint | None:
        routing = self._spec.routing
        draws = (0.0, 0.0)
        if routing.policy is Policy.POWER_OF_TWO:
            draws = (self._chance.random(), self._chance.random())
        return choose(
            self._picture.endpoints if among is None else among,
            self.loads,
            self.timeline.now,
            tried=request.tried,
            retrying=retrying,
            keys=request.keys,
            policy=routing.policy,
            session=request.arrival.session,
            draws=draws,
        )

    def _send(self, request: Request, endpoint: Endpoint) -> None:
        request.attempts += 1
        request.revision = endpoint.revision
        request.tried.add(endpoint.replica)
        attempt = Attempt(self, request, endpoint)
        unit = self.fleet.units.get(endpoint.replica)
        now = self.timeline.now
        if unit is not None and unit.cut_until > now:
            wait_s = self._settings.connect_timeout_s
            self.timeline.after(wait_s, self.lost, attempt, 0, True)
        elif unit is None or unit.serving is None:
            self.lost(attempt, away=True)
        elif not unit.serving.submit(attempt):
            self.loads.cool(endpoint.replica, now + WORKER_RETRY_AFTER_S)
            self._settle(attempt, Outcome.REFUSED, 0)
            self._retry(request, Outcome.REFUSED)
        else:
            unit.open[attempt] = None
            if unit.serving.paused:
                self.watch(attempt)

    # What replicas tell --------------------------------------------------------------------------

    def first_token(self, attempt: Attempt) -> None:
        """The first token of an attempt."""
        if not attempt.open or self._held_up(attempt, self.first_token):
            return
        now = self.timeline.now
        attempt.spoke = now
        self.loads.computed(attempt.replica, attempt.turn)
        self.loads.answered(attempt.replica)
        request = attempt.request
        if request.first_at < 0:
            request.first_at = now
            self._books.began(request.arrival, attempt.begun_at, now)

    def finished(self, attempt: Attempt) -> None:
        """The last token of an attempt."""
        if not attempt.open or self._held_up(attempt, self.finished):
            return
        request = attempt.request
        self._settle(attempt, Outcome.FINISHED, attempt.output_tokens)
        request.shown = request.arrival.output_tokens
        self._end(request, Outcome.FINISHED)

    def _held_up(self, attempt: Attempt, action: Callable[[Attempt], None]) -> bool:
        """Whether its replica cannot be reached now; what it said comes later."""
        unit = self.fleet.units.get(attempt.replica)
        if unit is None or unit.cut_until <= self.timeline.now:
            return False
        self.timeline.at(unit.cut_until, action, attempt)
        return True

    # Failures ------------------------------------------------------------------------------------

    def watch(self, attempt: Attempt, produced: int = 0) -> None:
        """Its replica is silent after ``produced`` tokens: nobody waits for it for ever."""
        limits = self._settings
        if attempt.spoke >= 0:
            self.timeline.after(limits.idle_timeout_s, self._silent, attempt, produced)
        else:
            until = attempt.sent_at + limits.first_token_timeout_s
            self.timeline.at(until, self._silent, attempt, produced)

    def _silent(self, attempt: Attempt, produced: int) -> None:
        unit = self.fleet.units.get(attempt.replica)
        if not attempt.open or unit is None or unit.serving is None:
            return
        if unit.serving.paused or unit.cut_until > self.timeline.now:
            unit.serving.cancel(attempt)
            self.lost(attempt, produced)

    def lost(self, attempt: Attempt, produced: int = 0, away: bool = False) -> None:
        """Its replica broke off after ``produced`` tokens, was silent too long, or took no
        connection (``away``)."""
        if not attempt.open:
            return
        request = attempt.request
        # The end of an answer was not shown, or it would not have been lost.
        shown = min(produced, attempt.output_tokens - 1) if attempt.spoke >= 0 else 0
        self._settle(attempt, Outcome.FAILED, shown)
        self.loads.failed(attempt.replica, self.timeline.now, unreachable=away)
        request.shown += shown
        if request.first_at < 0:
            self._retry(request, Outcome.FAILED)
        else:
            self._resume(request, attempt)

    def _retry(self, request: Request, verdict: Outcome) -> None:
        """Another replica, if the attempts, the replicas and the budget allow it."""
        now = self.timeline.now
        if (
            request.attempts < self._settings.max_attempts
            and self._choose(request, retrying=True) is not None
            and self._budget.take(now)
        ):
            self._books.retried += 1
            wait_s = full_jitter(request.attempts, self._chance.random())
            self.timeline.after(wait_s, self._again, request, verdict)
        else:
            self._end(request, verdict)

    def _again(self, request: Request, verdict: Outcome) -> None:
        endpoint = self._choose(request, retrying=True)
        if endpoint is None:
            self._end(request, verdict)
        else:
            self._send(request, endpoint)

    def _resume(self, request: Request, attempt: Attempt) -> None:
        """Another replica of the same revision goes on, as ``gateway.resume`` has it."""
        serving = self._picture.endpoints
        same = [one for one in serving if one.revision == request.revision]
        if attempt.spoke >= 0:
            request.tried = {attempt.replica}
        endpoint = self._choose(request, retrying=False, among=same)
        if endpoint is None or request.resumes >= self._settings.max_resumes:
            self._end(request, Outcome.FAILED)
            return
        request.resumes += 1
        self._books.resumed += 1
        self._send(request, endpoint)

    def _settle(self, attempt: Attempt, outcome: Outcome, shown: int) -> None:
        """The attempt is over, and showed so many tokens: one row."""
        attempt.open = False
        unit = self.fleet.units.get(attempt.replica)
        if unit is not None:
            unit.open.pop(attempt, None)
        self.loads.end(attempt.replica, attempt.turn)
        self._books.attempts += 1
        row = self._row(attempt, outcome, shown)
        self._demand.ended(row)
        if self._books.rows is not None:
            self._books.rows.append(row)

    def _row(self, attempt: Attempt, outcome: Outcome, shown: int) -> LedgerRow:
        request = attempt.request
        usage = Usage(attempt.prompt_tokens, shown, attempt.cached_tokens)
        if attempt.spoke < 0:
            usage = Usage()  # nothing was relayed
        took_s = self.timeline.now - attempt.sent_at
        return LedgerRow(
            id=f"{request.number}-{request.attempts}",
            request_id=str(request.number),
            attempt=request.attempts,
            tenant=request.arrival.tenant,
            key_id="",
            model=self._spec.name,
            replica=attempt.replica,
            outcome=outcome,
            status=200 if outcome is Outcome.FINISHED else 503,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            started_at=self.clock.now() - took_s,
            duration_s=took_s,
            first_token_s=attempt.spoke - attempt.sent_at if attempt.spoke >= 0 else None,
            cost=(self._spec.prices or FREE).cost(usage),
        )


class Switchboard:
    """Passes on what replicas tell to the gateway that asked."""

    def first_token(self, work: Work) -> None:
        assert isinstance(work, Attempt)
        work.gateway.first_token(work)

    def finished(self, work: Work) -> None:
        assert isinstance(work, Attempt)
        work.gateway.finished(work)

    def lost(self, work: Work, produced: int) -> None:
        assert isinstance(work, Attempt)
        work.gateway.lost(work, produced)
