"""Limits in the path of a request: reserve before it is sent, settle when it has ended.

Knows whose limits a key stands under, what a request may use at most and what it cost; ``counters``
keep the counts, ``limits`` decides. Also tells clients what they have left, in OpenAI's headers.
Must not send or choose.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Final, NamedTuple

from cloudlm.core.access import Limits, scope_of
from cloudlm.core.clock import Clock
from cloudlm.core.errors import BudgetExceeded, CloudlmError, LimitExceeded
from cloudlm.core.price import Price, price_of
from cloudlm.core.tenant import KeyRecord, Outcome
from cloudlm.core.usage import DAY_S, UsageQuery, UsageRow, day_start, month_of
from cloudlm.gateway.account import Exchange
from cloudlm.gateway.counters import Counters
from cloudlm.gateway.dialects.openai import Call
from cloudlm.gateway.exchange import unique
from cloudlm.gateway.limits import LEASE_S
from cloudlm.gateway.verdicts import Bound, Kind, Lease, Refusal, Verdict
from cloudlm.gateway.view import Snapshot
from cloudlm.security.access import Directory
from cloudlm.state.base import State
from cloudlm.telemetry.logs import get_logger

BYTES_PER_TOKEN: Final = 4
TEMPLATE_TOKENS: Final = 256
"""What a chat template may add to a prompt beyond the bytes of the request."""
_TEND_EVERY_S = LEASE_S / 3
_LEDGER_EVERY_S = 60.0
_LEDGER_TIMEOUT_S = 10.0
_NO_LIMITS = Limits()
_DAY_MARK = "|day "  # in no name and no id
_THOUSANDTHS: Final = ["", *(f".{n:03d}".rstrip("0") for n in range(1, 1000))]
_WORDS = {
    Kind.REQUESTS: "requests per minute",
    Kind.TOKENS: "tokens per minute",
    Kind.CONCURRENT: "requests at once",
}

_log = get_logger(__name__)


class Estimate(NamedTuple):
    """The tokens that a request is expected to use, and the most that it can cost (billionths)."""

    tokens: int
    spend: int


class Limiter:
    """Asked once per request. ``answer_tokens`` are reserved for an answer whose length the
    request does not bound."""

    def __init__(
        self,
        counters: Counters,
        prices: Mapping[str, Price],
        state: State,
        clock: Clock,
        answer_tokens: int,
    ) -> None:
        self._state = state
        self._asks_ledger_at = clock.monotonic()
        self._counters = counters
        self._prices = prices
        self._own_prices: dict[str, Price] = {}
        self._clock = clock
        self._answer_tokens = answer_tokens
        self._view: Snapshot | None = None
        self._bounds: dict[str, tuple[Bound, ...]] = {}
        self._running: set[str] = set()
        self._month = (0.0, 0)  # until when, Unix seconds, and which
        self._day = (0.0, 0.0)  # when the present one began and will end, Unix seconds

    async def reserve(
        self, exchange: Exchange, call: Call, view: Snapshot, others: Iterable[str] = ()
    ) -> int:
        """Take what the request may use, until the exchange ends; returns the tokens of it.
        ``others`` are models that may answer in place of the call's: the dearest counts. Raises
        LimitExceeded and BudgetExceeded, and Unavailable if the counts cannot be reached."""
        assert exchange.key is not None
        self.price(exchange, call.model)
        bounds = self.bounds(exchange.key, view)
        wanted = estimate(call, exchange.price, self._answer_tokens)
        for other in others:
            price = self._price(other, exchange.key.tenant)
            wanted = max(wanted, estimate(call, price, self._answer_tokens))
        if not bounds:
            return wanted.tokens
        month = self.month()
        lease_id = unique()
        verdict = await self._counters.reserve(
            lease_id, bounds, tokens=wanted.tokens, spend=wanted.spend, month=month
        )
        exchange.headers.update(headers_of(verdict))
        if verdict.refusal is not None:
            raise refused(verdict.refusal, wanted)
        lease = verdict.lease
        assert lease is not None
        self._running.add(lease.id)
        exchange.at_end(partial(self._settle, exchange, lease))
        return wanted.tokens

    def price(self, exchange: Exchange, model: str) -> None:
        """From now on the exchange's attempts cost what ``model`` costs."""
        tenant = exchange.key.tenant if exchange.key is not None else ""
        exchange.price = self._price(model, tenant)

    def _price(self, model: str, tenant: str) -> Price:
        return price_of(self._prices, model, tenant, self._own_prices.get(model))

    def _settle(self, exchange: Exchange, lease: Lease) -> None:
        self._running.discard(lease.id)
        used = exchange.usage
        self._counters.settle(
            lease,
            tokens=used.prompt_tokens + used.completion_tokens + exchange.tokens_aside,
            spend=exchange.cost,
            counts=exchange.attempts > 0 or exchange.outcome is Outcome.FINISHED,
            month=self.month(),
        )

    def bounds(self, key: KeyRecord, view: Snapshot) -> tuple[Bound, ...]:
        """The limits that a key stands under, widest last; holders without any are left out."""
        began, ends = self._day
        now = self._clock.now()
        if view is not self._view or not began <= now < ends:
            began = day_start(now)
            self._view, self._day = view, (began, began + DAY_S)
            self._bounds.clear()
        found = self._bounds.get(key.id)
        if found is None:
            found = self._bounds[key.id] = bounds_of(key, view.directory, began)
        return found

    def month(self) -> int:
        """The calendar month (UTC) as a whole number."""
        now = self._clock.now()
        until, month = self._month
        if now >= until:
            date = time.gmtime(now)
            month = date.tm_year * 12 + date.tm_mon - 1
            self._month = now - now % 3600 + 3600, month  # months end with an hour
        return month

    def follow(self, view: Snapshot) -> None:
        """Called when the state changed: forget holders that are no more, learn prices."""
        self._own_prices = {
            name: model.prices for name, model in view.models.items() if model.prices is not None
        }
        limits = self._counters.keep_only
        limits({bound.scope for key in view.holders() for bound in self.bounds(key, view)})

    async def tend(self, view: Snapshot) -> None:
        """Keep the leases of what runs, and learn from the ledger what was spent elsewhere and
        before: budgets outlive gateways."""
        spent: dict[str, int] = {}
        now = self._clock.now()
        if self._clock.monotonic() >= self._asks_ledger_at and _any_budget(view):
            self._asks_ledger_at = self._clock.monotonic() + _LEDGER_EVERY_S
            try:
                async with asyncio.timeout(_LEDGER_TIMEOUT_S):
                    for since, day in ((month_of(now), None), (day_start(now), day_start(now))):
                        query = UsageQuery(since, now + DAY_S, ("tenant", "project", "key"))
                        spent |= spent_by_scope(await self._state.usage(query), view, day)
            except (CloudlmError, OSError) as error:  # OSError holds TimeoutError
                _log.warning("spending_unknown", extra={"fields": {"reason": repr(error)}})
        await self._counters.tend(tuple(self._running), spent, self.month())

    async def run(self, view: Callable[[], Snapshot]) -> None:
        """Tend until cancelled."""
        while True:
            await self._clock.sleep(_TEND_EVERY_S)
            try:
                await self.tend(view())
            except CloudlmError as error:
                _log.warning("limits_not_tended", extra={"fields": {"reason": error.message}})
            except Exception:
                _log.exception("limits_not_tended")


def _any_budget(view: Snapshot) -> bool:
    known = view.directory.identities
    limits = [one.limits for one in view.keys.values()]
    limits += [one.limits for one in known.tenants]
    limits += [one.limits for one in known.projects]
    limits += [one.limits for one in known.principals]
    return any(one.spend_per_month is not None or one.spend_per_day is not None for one in limits)


def spent_by_scope(
    rows: Iterable[UsageRow], view: Snapshot, day: float | None = None
) -> dict[str, int]:
    """What every holder spent, out of sums by tenant, project and key: of the month, or of the day
    that began at ``day``."""
    spent: Counter[str] = Counter()
    for row in rows:
        key = view.holder(row.key)
        spent[f"key:{row.key}"] += row.cost
        spent[f"project:{scope_of(row.tenant, row.project)}"] += row.cost
        spent[f"tenant:{row.tenant}"] += row.cost
        if key is not None:
            spent[f"principal:{key.principal}"] += row.cost
    return spent if day is None else {_of_day(scope, day): n for scope, n in spent.items()}


def _of_day(scope: str, day: float) -> str:
    """The scope in which a holder's money of one day is counted, beside that of the month."""
    return f"{scope}{_DAY_MARK}{round(day / DAY_S)}"


def bounds_of(key: KeyRecord, directory: Directory, day: float) -> tuple[Bound, ...]:
    """The limits of a key, its principal, its project and its tenant, where they have any. A budget
    of the day that began at ``day`` is a scope of its own, for each day anew."""
    principal = directory.principal(key.principal)
    project = directory.project(key.tenant, key.project)
    tenant = directory.tenant(key.tenant)
    holders = (
        (f"key:{key.id}", key.limits),
        (f"principal:{key.principal}", principal.limits if principal else _NO_LIMITS),
        (f"project:{scope_of(key.tenant, key.project)}", project.limits if project else _NO_LIMITS),
        (f"tenant:{key.tenant}", tenant.limits if tenant else _NO_LIMITS),
    )
    return tuple(bound for scope, limits in holders for bound in _parts(scope, limits, day))


def _parts(scope: str, limits: Limits, day: float) -> Iterator[Bound]:
    lasting = replace(limits, spend_per_day=None)
    if lasting != _NO_LIMITS:
        yield Bound(scope, lasting)
    if limits.spend_per_day is not None:
        yield Bound(_of_day(scope, day), Limits(spend_per_month=limits.spend_per_day))


def estimate(call: Call, price: Price, answer_tokens: int) -> Estimate:
    """What a request may use. Tokens are guessed at a fourth of its bytes and settled later; for
    money a prompt counts as its bytes, for no token is shorter than one."""
    if call.generates:
        answer = (call.max_tokens or answer_tokens) * call.choices
    elif call.result_field is None:
        return Estimate(0, 0)
    else:
        answer = 0
    size_bytes = len(call.body)
    most = price.most(size_bytes + TEMPLATE_TOKENS, answer)
    return Estimate(size_bytes // BYTES_PER_TOKEN + answer, most)


def refused(refusal: Refusal, wanted: Estimate) -> CloudlmError:
    """The refusal as an error that says whose limit it is, and when to come back."""
    whose = refusal.scope.partition(":")[0]
    if refusal.kind is Kind.SPEND:
        when = "day" if _DAY_MARK in refusal.scope else "month"
        return BudgetExceeded(
            f"the budget of this {whose} is used up: {refusal.used:.4f} of {refusal.limit:g} this "
            f"{when} (UTC), and what this request may cost does not fit; ask your administrator to "
            f"raise spend_per_{when}"
        )
    message = (
        f"limit reached for this {whose}: {refusal.limit:g} {_WORDS[refusal.kind]}, "
        f"{refusal.used:g} in use"
    )
    if refusal.kind is Kind.TOKENS:
        message += f", and this request may use {wanted.tokens}"
    if refusal.retry_after_s is None:
        return LimitExceeded(
            f"{message}; it can never pass: make it smaller (max_tokens) or ask for a higher limit"
        )
    return LimitExceeded(
        f"{message}; try again in {span(refusal.retry_after_s)}",
        retry_after_s=max(refusal.retry_after_s, 0.001),
    )


def headers_of(verdict: Verdict) -> dict[str, str]:
    """What is left of the tightest limits, as OpenAI says it; nothing of limits not set."""
    headers: dict[str, str] = {}
    requests, tokens = verdict.requests, verdict.tokens
    if requests is not None:
        headers["x-ratelimit-limit-requests"] = str(requests.limit)
        headers["x-ratelimit-remaining-requests"] = str(requests.remaining)
        headers["x-ratelimit-reset-requests"] = span(requests.reset_s)
    if tokens is not None:
        headers["x-ratelimit-limit-tokens"] = str(tokens.limit)
        headers["x-ratelimit-remaining-tokens"] = str(tokens.remaining)
        same = requests is not None and requests.reset_s == tokens.reset_s
        reset = headers["x-ratelimit-reset-requests"] if same else span(tokens.reset_s)
        headers["x-ratelimit-reset-tokens"] = reset
    return headers


def span(seconds: float) -> str:
    """A duration as OpenAI's headers write it: ``17ms``, ``1.25s``, ``6m0s``."""
    milliseconds = max(round(seconds * 1000), 0)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    rest = milliseconds % 60_000
    seconds_text = str(rest // 1000) + _THOUSANDTHS[rest % 1000] + "s"
    return seconds_text if rest == milliseconds else f"{milliseconds // 60_000}m{seconds_text}"
