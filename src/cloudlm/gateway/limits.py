"""What a key, its principal, project and tenant may still use: requests and tokens of the last
minute, requests in flight, money of the month. All bounds hold at once, and a request takes from
all of them or from none.

What a request will use is *reserved* before it is sent, for the most it can be, and *settled* with
the truth when it has ended. A reservation is a lease: it expires unless it is renewed, so that
nothing stays taken when its holder dies. Pure: ``now`` (monotonic seconds) and the month are
arguments. Must not know requests, prices or HTTP.

Requests and tokens are counted in slices of five seconds over the last thirteen of them, so that no
sixty seconds ever hold more than the limit (a bucket that refills lets twice as much through).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Final

from cloudlm.gateway.verdicts import Bound, Kind, Lease, Quota, Refusal, Verdict

WINDOW_S: Final = 60.0
SLICE_S: Final = 5.0
SLICES: Final[int] = int(WINDOW_S / SLICE_S) + 1
LEASE_S = 30.0
NANO: Final = 1_000_000_000


class Window:
    """Amounts by slice of time; those older than the window fall out."""

    __slots__ = ("_slices", "total")

    def __init__(self) -> None:
        self._slices: deque[list[int]] = deque()  # [index, amount]
        self.total = 0

    def expire(self, index: int) -> None:
        """Let fall out what no longer counts in the slice ``index``."""
        slices = self._slices
        while slices and slices[0][0] <= index - SLICES:
            self.total -= slices.popleft()[1]

    def add(self, index: int, amount: int) -> None:
        """Count ``amount`` in the newest slice, or in an older one that still counts; what is
        given back to a slice that has fallen out is gone with it."""
        self.total += amount
        slices = self._slices
        if slices and slices[-1][0] == index:
            slices[-1][1] += amount
            return
        for one in reversed(slices):
            if one[0] == index:
                one[1] += amount
                return
        if amount > 0:
            self._slices.append([index, amount])
        else:
            self.total -= amount

    def free_in(self, amount: int, now: float) -> float:
        """Seconds until ``amount`` has fallen out."""
        for index, held in self._slices:
            amount -= held
            if amount <= 0:
                return max((index + SLICES) * SLICE_S - now, 0.0)
        return 0.0

    def reset_in(self, now: float) -> float:
        """Seconds until all has fallen out."""
        return (self._slices[-1][0] + SLICES) * SLICE_S - now if self._slices else 0.0


@dataclass(slots=True)
class Facts:
    """What one scope has used and holds; money in billionths."""

    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    ongoing: int = 0
    month: int = 0
    spent: int = 0
    reserved: int = 0
    index: int = -1  # of the slice in which it was looked at last

    @classmethod
    def read(
        cls, ongoing: int, spent: int, reserved: int, slices: Iterable[tuple[bytes, int, int]]
    ) -> Facts:
        """Facts kept elsewhere; slices are (``r`` or ``t``, index, amount) in any order."""
        facts = cls(ongoing=ongoing, spent=spent, reserved=reserved)
        for kind, index, amount in sorted(slices, key=lambda one: one[1]):
            (facts.requests if kind == b"r" else facts.tokens).add(index, amount)
        return facts


class Tally:
    """The counts of all scopes, in this process."""

    def __init__(self, lease_s: float = LEASE_S) -> None:
        self._lease_s = lease_s
        self._used: dict[str, Facts] = {}
        self._leases: dict[str, tuple[Lease, float]] = {}  # the first to expire first
        self._none_expires_before = float("-inf")

    def reserve(
        self,
        lease_id: str,
        bounds: Iterable[Bound],
        *,
        tokens: int,
        spend: int,
        now: float,
        month: int,
    ) -> Verdict:
        """Take one request, ``tokens`` and ``spend`` from every bound, or nothing from any."""
        index = int(now // SLICE_S)
        if now >= self._none_expires_before:
            self._expire(now)
        asked = [(bound, self._at(bound.scope, index, month)) for bound in bounds]
        for bound, used in asked:
            if _refusal(bound, used, tokens, spend, now) is not None:
                return explain(None, asked, tokens, spend, now)
        scopes = tuple([bound.scope for bound, _ in asked])
        lease = Lease(lease_id, scopes, tokens, spend, index, month)
        for _, used in asked:
            used.requests.add(index, 1)
            used.tokens.add(index, tokens)
            used.ongoing += 1
            used.reserved += spend
        self._leases[lease_id] = lease, now + self._lease_s
        return explain(lease, asked, tokens, spend, now)

    def settle(
        self, lease: Lease, *, tokens: int, spend: int, counts: bool, now: float, month: int
    ) -> None:
        """The request has ended and used this; unless it ``counts``, it was never sent. What was
        reserved beyond is there again at once. Also true for a lease that has expired."""
        self._release(lease.id)
        index = int(now // SLICE_S)
        more = tokens - lease.tokens
        counted_in = lease.slice if more < 0 else index
        for scope in lease.scopes:
            used = self._at(scope, index, month)
            if not counts:
                used.requests.add(lease.slice, -1)
            used.tokens.add(counted_in, more)
            used.spent += spend

    def renew(self, lease_ids: Iterable[str], now: float) -> None:
        """These requests still run."""
        for lease_id in lease_ids:
            held = self._leases.pop(lease_id, None)
            if held is not None:
                self._leases[lease_id] = held[0], now + self._lease_s

    def raise_spent(self, scope: str, spent: int, month: int) -> None:
        """The ledger knows of this much; other gateways, or this one before it was started anew,
        may have spent what was not counted here."""
        used = self._at(scope, 0, month)
        used.spent = max(used.spent, spent)

    def keep_only(self, scopes: Container[str]) -> None:
        """Forget holders that are no more."""
        for scope in [scope for scope in self._used if scope not in scopes]:
            del self._used[scope]

    def spent(self, scope: str, month: int) -> int:
        """Money of the month, billionths."""
        used = self._used.get(scope)
        return used.spent if used is not None and used.month == month else 0

    def ongoing(self, scope: str) -> int:
        """Requests in flight."""
        used = self._used.get(scope)
        return used.ongoing if used is not None else 0

    def _at(self, scope: str, index: int, month: int) -> Facts:
        used = self._used.get(scope)
        if used is None:
            used = self._used[scope] = Facts(month=month)
        if used.month < month:
            used.month, used.spent = month, 0
        if used.index != index:
            used.index = index
            used.requests.expire(index)
            used.tokens.expire(index)
        return used

    def _expire(self, now: float) -> None:
        while self._leases:
            lease_id, (_, expires) = next(iter(self._leases.items()))
            if expires > now:
                self._none_expires_before = expires
                return
            self._release(lease_id)
        self._none_expires_before = now + self._lease_s

    def _release(self, lease_id: str) -> None:
        """Give back what is held while a request runs; once."""
        held = self._leases.pop(lease_id, None)
        if held is None:
            return
        spend = held[0].spend
        for scope in held[0].scopes:
            used = self._used.get(scope)
            if used is not None:
                if used.ongoing > 0:
                    used.ongoing -= 1
                used.reserved = used.reserved - spend if used.reserved > spend else 0


def explain(
    lease: Lease | None,
    asked: list[tuple[Bound, Facts]],
    tokens: int,
    spend: int,
    now: float,
) -> Verdict:
    """What a request is told: what is left of its limits, and without a lease, why."""
    requests, tokens_left = _quotas(asked, now)
    if lease is not None:
        return Verdict(lease, None, requests, tokens_left)
    found = (_refusal(bound, used, tokens, spend, now) for bound, used in asked)
    refusal = next(one for one in found if one is not None)
    return Verdict(None, refusal, requests, tokens_left)


def _refusal(bound: Bound, used: Facts, tokens: int, spend: int, now: float) -> Refusal | None:
    limits, scope = bound.limits, bound.scope
    if limits.spend_per_month is not None:
        budget, taken = round(limits.spend_per_month * NANO), used.spent + used.reserved
        if taken + spend > budget or taken >= budget:
            return Refusal(scope, Kind.SPEND, limits.spend_per_month, taken / NANO, None)
    at_once = limits.concurrent_streams
    if at_once is not None and used.ongoing >= at_once:
        retry_after_s = 1.0 if at_once else None
        return Refusal(scope, Kind.CONCURRENT, at_once, used.ongoing, retry_after_s)
    per_minute = limits.requests_per_minute
    if per_minute is not None and used.requests.total >= per_minute:
        return _full(scope, Kind.REQUESTS, per_minute, used.requests, 1, now)
    per_minute = limits.tokens_per_minute
    if per_minute is not None and used.tokens.total + tokens > per_minute:
        return _full(scope, Kind.TOKENS, per_minute, used.tokens, tokens, now)
    return None


def _full(scope: str, kind: Kind, limit: int, window: Window, amount: int, now: float) -> Refusal:
    never = amount > limit
    wait_s = None if never else window.free_in(window.total + amount - limit, now)
    return Refusal(scope, kind, limit, window.total, wait_s)


def _quotas(asked: list[tuple[Bound, Facts]], now: float) -> tuple[Quota | None, Quota | None]:
    """The tightest limit of requests and of tokens."""
    requests = tokens = None
    for bound, used in asked:
        limits = bound.limits
        per_minute = limits.requests_per_minute
        if per_minute is not None:
            left = max(per_minute - used.requests.total, 0)
            if requests is None or left < requests.remaining:
                requests = Quota(per_minute, left, used.requests.reset_in(now))
        per_minute = limits.tokens_per_minute
        if per_minute is not None:
            left = max(per_minute - used.tokens.total, 0)
            if tokens is None or left < tokens.remaining:
                tokens = Quota(per_minute, left, used.tokens.reset_in(now))
    return requests, tokens
