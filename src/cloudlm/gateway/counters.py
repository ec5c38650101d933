"""The port behind which limits are counted, and the counts of one process.

Several gateways that must not together let through more than the limit count in one place
(``counters_redis``). Must not decide what a request may use; ``limits`` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from cloudlm.core.clock import Clock
from cloudlm.gateway.limits import LEASE_S, Tally
from cloudlm.gateway.verdicts import Bound, Lease, Verdict


class Counters(Protocol):
    """Who has used what. ``month`` is a whole number that grows from month to month."""

    async def reserve(
        self, lease_id: str, bounds: Sequence[Bound], *, tokens: int, spend: int, month: int
    ) -> Verdict:
        """Take one request, ``tokens`` and ``spend`` (billionths) from every bound, or nothing.
        Raises Unavailable if nobody can say what was used."""
        ...

    def settle(self, lease: Lease, *, tokens: int, spend: int, counts: bool, month: int) -> None:
        """The request used this; never waits. Unless it ``counts``, it was never sent."""
        ...

    async def tend(self, leases: Collection[str], spent: Mapping[str, int], month: int) -> None:
        """Renew the leases of what still runs, and learn what the ledger knows was spent."""
        ...

    def keep_only(self, scopes: Collection[str]) -> None:
        """Forget holders that are no more."""
        ...

    async def run(self) -> None:
        """What is to be done in the background, until cancelled."""
        ...


class LocalCounters:
    """The counts of this process alone."""

    def __init__(self, clock: Clock, lease_s: float = LEASE_S) -> None:
        self._clock = clock
        self._tally = Tally(lease_s)

    async def reserve(
        self, lease_id: str, bounds: Sequence[Bound], *, tokens: int, spend: int, month: int
    ) -> Verdict:
        now = self._clock.monotonic()
        return self._tally.reserve(
            lease_id, bounds, tokens=tokens, spend=spend, now=now, month=month
        )

    def settle(self, lease: Lease, *, tokens: int, spend: int, counts: bool, month: int) -> None:
        now = self._clock.monotonic()
        self._tally.settle(lease, tokens=tokens, spend=spend, counts=counts, now=now, month=month)

    async def tend(self, leases: Collection[str], spent: Mapping[str, int], month: int) -> None:
        self._tally.renew(leases, self._clock.monotonic())
        for scope, amount in spent.items():
            self._tally.raise_spent(scope, amount, month)

    def keep_only(self, scopes: Collection[str]) -> None:
        self._tally.keep_only(scopes)

    async def run(self) -> None:
        """Nothing is."""
        await asyncio.Event().wait()
