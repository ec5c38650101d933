"""One attempt from its choice to its ledger row, and one request from its door to its end.

Whatever way an attempt ends, ``settle`` writes exactly one row; later calls change nothing. Must
not send or choose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cloudlm.core.chat import Usage
from cloudlm.core.clock import Clock
from cloudlm.core.errors import CloudlmError, InternalError, RequestCancelled
from cloudlm.core.price import FREE
from cloudlm.core.routing import DEFAULT_ROUTING
from cloudlm.core.tenant import KeyRecord, LedgerRow, Outcome
from cloudlm.gateway.exchange import unique
from cloudlm.gateway.interrupt import Interrupt
from cloudlm.gateway.ledger import Ledger
from cloudlm.gateway.meter import NO_MODEL, Meter
from cloudlm.gateway.upstream import ReplicaRefused

_NOTHING: Final = Usage()
_FAILED: Final = Outcome.FAILED
_FINISHED: Final = Outcome.FINISHED
_REPEATED: Final = (Outcome.CACHED, Outcome.SEMANTIC)


def status_of(error: CloudlmError) -> int:
    """The HTTP status that a client sees for ``error``."""
    return error.answered_status if isinstance(error, ReplicaRefused) else error.status


def outcome_of(error: CloudlmError) -> Outcome:
    """How an attempt that ended in ``error`` is called in the ledger."""
    if isinstance(error, RequestCancelled):
        return Outcome.CANCELLED
    status = status_of(error)
    return Outcome.REFUSED if status < 500 or status in (501, 503) else Outcome.FAILED


class Exchange:
    """One request inside the gateway."""

    def __init__(self, request_id: str, clock: Clock, meter: Meter) -> None:
        self.request_id = request_id
        self.clock = clock
        self.meter = meter
        self.interrupt = Interrupt()
        self.key: KeyRecord | None = None
        self.model = NO_MODEL
        self.replica = ""
        self.attempts = 0
        self.declined: tuple[str, ...] = ()  # replicas that would not do it
        self.is_copy = False  # nobody's: all its attempts are number 0
        self.revision = 0  # of the replica that answers
        self.price = FREE
        self.usage = _NOTHING  # of all attempts so far
        self.tokens_aside = 0  # of other models that were asked for it, which limits count too
        self.cost = 0  # the same in billionths of the currency
        self.headers: dict[str, str] = {}  # for the answer, whatever it is
        self.outcome: Outcome | None = None  # once it is over
        self.started_at = clock.now()
        self.started = clock.monotonic()
        self.answered = False
        self.prompt_keys: tuple[bytes, ...] = ()
        self.route = ""
        self.asked = ""  # the route that the client named, if it is not the model
        self.routing = DEFAULT_ROUTING  # the model's
        self.session = b""  # empty: none, or nobody needs to know
        self._on_end: list[Callable[[], None]] = []
        self._on_leave: list[Callable[[], None]] = []

    def at_end(self, action: Callable[[], None]) -> None:
        """Do something once when the exchange ends, last added first done."""
        self._on_end.append(action)

    def at_leave(self, action: Callable[[], None]) -> None:
        """Do something once when the exchange leaves its model: for another one, or at its end."""
        self._on_leave.append(action)

    def leave(self) -> None:
        """The exchange gives back what it holds of its model."""
        while self._on_leave:
            self._on_leave.pop()()

    def finish(self) -> None:
        """The exchange is over: its client has its answer."""
        self.end(_FINISHED, 200)

    def end(self, outcome: Outcome, status: int) -> None:
        """The exchange is over. Only the first call counts."""
        if self.outcome is not None:
            return
        self.outcome = outcome
        self.leave()
        while self._on_end:
            self._on_end.pop()()
        elapsed_s = self.clock.monotonic() - self.started
        self.meter.request_ended(self.model, outcome, status, elapsed_s)

    def fail(self, error: CloudlmError) -> None:
        """The exchange is over because of ``error``."""
        self.end(outcome_of(error), status_of(error))


class Attempt:
    """One request sent to one replica."""

    def __init__(
        self,
        exchange: Exchange,
        ledger: Ledger,
        on_settled: Callable[[], None],
        on_begun: Callable[[], None] = lambda: None,
    ) -> None:
        assert exchange.key is not None
        self.id = unique()
        self._exchange = exchange
        self._ledger = ledger
        self._on_settled = on_settled
        self._on_begun = on_begun
        self._number = 0 if exchange.is_copy else exchange.attempts
        self._replica = exchange.replica
        self._started_at = exchange.clock.now()
        self._started = exchange.clock.monotonic()
        self._first_token_s: float | None = None
        self._usage: Callable[[], Usage] = _nothing
        self._settled = False
        ledger.begin(self)

    def relayed(self, usage: Usage) -> None:
        """So many tokens have been handed to the client so far."""
        self._usage = lambda: usage

    def follow(self, usage: Callable[[], Usage]) -> None:
        """Whoever wants to know asks ``usage`` how many have been handed to the client so far."""
        self._usage = usage

    def first_content(self) -> None:
        """The first content was handed to the client."""
        if self._first_token_s is None:
            exchange = self._exchange
            now = exchange.clock.monotonic()
            self._first_token_s = now - self._started
            self._on_begun()
            if not exchange.answered:  # later ones go on with the same answer
                exchange.meter.first_token(exchange.model, now - exchange.started)
                exchange.answered = True

    def finish(self) -> None:
        """The attempt is over: its replica answered to the end."""
        self.settle(_FINISHED, 200)

    def fail(self, error: CloudlmError) -> None:
        """The attempt is over because of ``error``."""
        self.settle(outcome_of(error), status_of(error))

    def settle(self, outcome: Outcome, status: int) -> None:
        """The attempt is over: write its row. Only the first call counts."""
        if self._settled:
            return
        self._settled = True
        self._on_settled()
        exchange, usage = self._exchange, self._usage()
        exchange.usage = usage if exchange.usage is _NOTHING else exchange.usage + usage
        cost = self._cost(outcome, usage)
        exchange.cost += cost
        self._ledger.add(self._row(outcome, status, usage, cost))
        exchange.meter.attempt_ended(
            exchange.model, outcome, usage.prompt_tokens, usage.completion_tokens
        )

    def _cost(self, outcome: Outcome, usage: Usage) -> int:
        if usage is _NOTHING:
            return 0
        price = self._exchange.price
        return price.again(usage) if outcome in _REPEATED else price.cost(usage)

    def row_so_far(self) -> LedgerRow:
        """The row that this attempt leaves if the gateway dies."""
        usage = self._usage()
        return self._row(_FAILED, InternalError.status, usage, self._cost(_FAILED, usage))

    def _row(self, outcome: Outcome, status: int, usage: Usage, cost: int) -> LedgerRow:
        exchange, key = self._exchange, self._exchange.key
        assert key is not None
        return LedgerRow(
            id=self.id,
            request_id=exchange.request_id,
            attempt=self._number,
            tenant=key.tenant,
            key_id=key.id,
            model=exchange.model,
            replica=self._replica,
            outcome=outcome,
            status=status,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            started_at=self._started_at,
            duration_s=exchange.clock.monotonic() - self._started,
            first_token_s=self._first_token_s,
            project=key.project,
            cost=cost,
        )


def _nothing() -> Usage:
    """What is known to be used before anything is."""
    return _NOTHING
