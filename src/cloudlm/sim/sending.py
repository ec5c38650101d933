"""Sending in virtual time: a request goes to one replica after the other until it has its answer.

choose → send → first token → end, with retries, resumes and the ledger's rows, as
``gateway.errands`` and ``gateway.resume`` have it over HTTP; what differs is who carries the bytes.
Every request is taken for a stream. Must not decide: ``router``, ``split`` and ``retry`` do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random

from cloudlm.core.chat import Usage
from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.price import FREE
from cloudlm.core.settings import GatewaySettings
from cloudlm.core.tenant import LedgerRow, Outcome
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.mirror import MIRROR_KEY, choose_for_copy
from cloudlm.gateway.retry import RetryBudget, full_jitter
from cloudlm.gateway.router import choose, may_retry
from cloudlm.gateway.split import choose_side, mark_of
from cloudlm.sim.fleet import Fleet
from cloudlm.sim.measure import Books
from cloudlm.sim.picture import Picture
from cloudlm.sim.request import Attempt, Request
from cloudlm.sim.timeline import Timeline, WallClock

WORKER_RETRY_AFTER_S = 1.0


class Sending:
    """What one gateway process does with requests that were let in. ``draws`` is the chance that
    policies choose by, apart from all other chance, so that it is the same for every policy.
    ``on_end`` is told how each ended, ``on_row`` of every row of the ledger."""

    def __init__(
        self,
        spec: DeploymentSpec,
        settings: GatewaySettings,
        timeline: Timeline,
        clock: WallClock,
        loads: Loads,
        picture: Picture,
        fleet: Fleet,
        books: Books,
        chance: Random,
        draws: Random,
        on_end: Callable[[Request, Outcome], None],
        on_row: Callable[[LedgerRow], None],
    ) -> None:
        self.timeline = timeline
        self.loads = loads
        self._spec = spec
        self._settings = settings
        self._clock = clock
        self._picture = picture
        self._fleet = fleet
        self._books = books
        self._chance = chance
        self._draws = draws
        self._end = on_end
        self._on_row = on_row
        self._budget = RetryBudget()

    # Choosing and sending ------------------------------------------------------------------------

    def serve(self, request: Request) -> None:
        """Send a request that was let in. ``keys`` are known."""
        self._budget.count_request(self.timeline.now)
        endpoint = self._choose(request, retrying=False)
        if endpoint is None:
            self._end(request, Outcome.REFUSED)
        else:
            self._send(request, endpoint)

    def copy(self, request: Request) -> None:
        """Send a copy, if there is who takes it."""
        endpoint = choose_for_copy(self._picture.beside, self.loads, self.timeline.now)
        if endpoint is None:
            self._end(request, Outcome.REFUSED)
        else:
            self._send(request, endpoint)

    def _choose(self, request: Request, *, retrying: bool) -> Endpoint | None:
        routing, model = self._spec.routing, self._picture.model
        among = choose
        if model.split:
            among = partial(choose_side, mark=mark_of(request.who, model.name))
        return among(
            model.endpoints,
            self.loads,
            self.timeline.now,
            tried=request.tried,
            retrying=retrying,
            keys=request.keys,
            policy=routing.policy,
            session=request.arrival.session,
            draws=(self._draws.random(), self._draws.random()),
        )

    def _send(self, request: Request, endpoint: Endpoint) -> None:
        request.attempts += 1
        request.revision = endpoint.revision
        request.tried.add(endpoint.replica)
        attempt = Attempt(self, request, endpoint)
        unit = self._fleet.units.get(endpoint.replica)
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
            request.version = unit.version
            rate = unit.version.error_rate
            attempt.fails = rate > 0 and self._chance.random() < rate
            unit.open[attempt] = None
            if unit.serving.paused:
                self.watch(attempt)

    # What replicas tell --------------------------------------------------------------------------

    def first_token(self, attempt: Attempt) -> None:
        """The first token of an attempt, or the error in its place."""
        if not attempt.open or self._held_up(attempt, self.first_token):
            return
        if attempt.fails:
            self._give_up(attempt)
            self.lost(attempt)
            return
        now = self.timeline.now
        attempt.spoke = now
        self.loads.computed(attempt.replica, attempt.turn)
        self.loads.answered(attempt.replica)
        request = attempt.request
        if request.first_at < 0:
            request.first_at = now
            if not request.copy:
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
        unit = self._fleet.units.get(attempt.replica)
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
        unit = self._fleet.units.get(attempt.replica)
        if not attempt.open or unit is None or unit.serving is None:
            return
        if unit.serving.paused or unit.cut_until > self.timeline.now:
            self._give_up(attempt)
            self.lost(attempt, produced)

    def _give_up(self, attempt: Attempt) -> None:
        """Nobody wants it from its replica any more."""
        unit = self._fleet.units.get(attempt.replica)
        if unit is not None and unit.serving is not None:
            unit.serving.cancel(attempt)

    def lost(self, attempt: Attempt, produced: int = 0, away: bool = False) -> None:
        """Its replica broke off after ``produced`` tokens, was silent too long, answered with an
        error, or took no connection (``away``)."""
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
            not request.copy
            and request.attempts < self._settings.max_attempts
            and may_retry(self._picture.model.endpoints, self.loads, now, request.tried)
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
        """Another replica of the same revision goes on, as ``gateway.resume`` has it: one that
        takes no new requests may."""
        picture = self._picture
        known: Sequence[Endpoint] = (*picture.endpoints, *picture.beside)
        same = [one for one in known if one.revision == request.revision]
        if attempt.spoke >= 0:
            request.tried = {attempt.replica}
        now, tried = self.timeline.now, request.tried
        endpoint = choose(same, self.loads, now, tried=tried, keys=request.keys)
        if endpoint is None or request.resumes >= self._settings.max_resumes:
            self._end(request, Outcome.FAILED)
            return
        request.resumes += 1
        self._books.resumed += not request.copy
        self._send(request, endpoint)

    # The ledger ----------------------------------------------------------------------------------

    def _settle(self, attempt: Attempt, outcome: Outcome, shown: int) -> None:
        """The attempt is over, and showed so many tokens: one row."""
        attempt.open = False
        unit = self._fleet.units.get(attempt.replica)
        if unit is not None:
            unit.open.pop(attempt, None)
        self.loads.end(attempt.replica, attempt.turn)
        self._on_row(self._row(attempt, outcome, shown))

    def _row(self, attempt: Attempt, outcome: Outcome, shown: int) -> LedgerRow:
        request = attempt.request
        usage = Usage(attempt.prompt_tokens, shown, attempt.cached_tokens)
        if attempt.spoke < 0:
            usage = Usage()  # nothing was relayed
        took_s = self.timeline.now - attempt.sent_at
        copy = request.copy
        return LedgerRow(
            id=f"{request.number}-{'copy-' if copy else ''}{request.attempts}",
            request_id=str(request.number),
            attempt=0 if copy else request.attempts,
            tenant=request.arrival.tenant,
            key_id=MIRROR_KEY if copy else "",
            model=self._spec.name,
            replica=attempt.replica,
            outcome=outcome,
            status=200 if outcome is Outcome.FINISHED else 503,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            started_at=self._clock.now() - took_s,
            duration_s=took_s,
            first_token_s=attempt.spoke - attempt.sent_at if attempt.spoke >= 0 else None,
            cost=0 if copy else (self._spec.prices or FREE).cost(usage),
        )
