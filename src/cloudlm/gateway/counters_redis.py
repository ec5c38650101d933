"""Counts that several gateways share, in Redis or Valkey: exact, for each step is one script there.

All that this gateway asks goes over one connection in the order in which it was asked, many at a
time. What Redis says is also kept in counts of this process: when Redis is away, they decide for a
stated time, within this gateway's share of the limits; after that everything limited is refused, or
let through, as configured. Must not decide by other rules than ``limits``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from cloudlm.core.access import Limits
from cloudlm.core.clock import Clock
from cloudlm.core.errors import Unavailable
from cloudlm.gateway.limits import LEASE_S, NANO, SLICE_S, SLICES, Facts, Tally, explain
from cloudlm.gateway.redis_client import connect
from cloudlm.gateway.redis_scripts import RENEW, RESERVE, SETTLE, SPENT
from cloudlm.gateway.verdicts import Bound, Lease, Verdict
from cloudlm.telemetry.logs import get_logger

PREFIX = "cloudlm:{limits}:"
ANSWER_TIMEOUT_S = 0.25
RETRY_S = 0.5
MAX_KEPT = 10_000

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Outage:
    """What holds while Redis is away: ``share`` of each limit, for ``longest_s`` seconds, and then
    nothing (``refuse``) or everything."""

    share: float = 1.0
    longest_s: float = 300.0
    refuse: bool = True


@dataclass(slots=True)
class _Step:
    """One script to run. ``answer`` is None for what nobody waits for; that is kept and tried again
    until Redis has it."""

    script: str
    keys: list[str]
    arguments: list[Any]
    answer: asyncio.Future[Any] | None = None


class RedisCounters:
    """See ``counters.Counters``. ``run`` is the one task that talks to Redis. Raises BadSetting for
    an address that cannot be, MissingExtra without redis-py."""

    def __init__(
        self,
        url: str,
        clock: Clock,
        outage: Outage,
        *,
        lease_s: float = LEASE_S,
        prefix: str = PREFIX,
    ) -> None:
        self._redis = connect(url, "gateway.limits_url", ANSWER_TIMEOUT_S)
        self._clock = clock
        self._outage = outage
        self._lease_s = lease_s
        self._prefix = prefix
        self._own = Tally(lease_s)
        self._leases: dict[str, tuple[Lease | None, Lease]] = {}  # in Redis, and here
        self._steps: list[_Step] = []
        self._wake = asyncio.Event()
        self._away_since: float | None = None

    @property
    def away(self) -> bool:
        """Whether Redis did not answer of late."""
        return self._away_since is not None

    async def reserve(
        self, lease_id: str, bounds: Sequence[Bound], *, tokens: int, spend: int, month: int
    ) -> Verdict:
        if self._away_since is None:
            limits = [_four(bound.limits) for bound in bounds]
            arguments = [lease_id, tokens, spend, month, *self._times(), *chain(*limits)]
            keys = [key for bound in bounds for key in self._keys(bound.scope)]
            step = _Step(RESERVE, keys, arguments, asyncio.get_running_loop().create_future())
            self._add(step)
            assert step.answer is not None
            found = await step.answer
            if found is not None:
                return self._taken(lease_id, bounds, tokens, spend, month, found)
        return self._without(lease_id, bounds, tokens, spend, month)

    def settle(self, lease: Lease, *, tokens: int, spend: int, counts: bool, month: int) -> None:
        shared, own = self._leases.pop(lease.id, (lease, None))
        if own is not None:
            now = self._clock.monotonic()
            self._own.settle(own, tokens=tokens, spend=spend, counts=counts, now=now, month=month)
        requests, counted, slice_ = int(counts), 0, -1
        if shared is not None:  # Redis has counted the request and its estimate already
            requests, counted, slice_ = requests - 1, shared.tokens, shared.slice
        keys = [self._prefix + "settled:" + lease.id]
        keys += [key for scope in lease.scopes for key in self._keys(scope)]
        member = f"{lease.id}:{lease.spend}"
        more = [member, lease.spend, requests, tokens - counted, slice_, spend, month]
        self._add(_Step(SETTLE, keys, [*more, *self._times()]))

    async def tend(self, leases: Collection[str], spent: Mapping[str, int], month: int) -> None:
        self._own.renew(leases, self._clock.monotonic())
        for lease_id in leases:
            shared, _ = self._leases.get(lease_id, (None, None))
            if shared is not None:
                keys = [self._keys(scope)[1] for scope in shared.scopes]
                member = f"{lease_id}:{shared.spend}"
                self._add(_Step(RENEW, keys, [member, round(self._lease_s * 1000)]))
        for scope, amount in spent.items():
            self._own.raise_spent(scope, amount, month)
            self._add(_Step(SPENT, [self._keys(scope)[0]], [month, amount]))

    def keep_only(self, scopes: Collection[str]) -> None:
        self._own.keep_only(scopes)

    # Redis's answers, and its absence -------------------------------------------------------------

    def _taken(
        self,
        lease_id: str,
        bounds: Sequence[Bound],
        tokens: int,
        spend: int,
        month: int,
        found: list[Any],
    ) -> Verdict:
        taken, index, now_ms, scopes = found
        facts = [
            (bound, Facts.read(ongoing, int(spent), int(reserved), slices))
            for bound, (ongoing, spent, reserved, slices) in zip(bounds, scopes, strict=True)
        ]
        for bound, one in facts:
            self._own.raise_spent(bound.scope, one.spent, month)
        lease = None
        if taken:
            lease = Lease(lease_id, tuple(b.scope for b in bounds), tokens, spend, index, month)
            free = [Bound(bound.scope, Limits()) for bound in bounds]
            own = self._here(lease_id, free, tokens, spend, month).lease
            assert own is not None
            self._leases[lease_id] = lease, own
        return explain(lease, facts, tokens, spend, now_ms / 1000)

    def _without(
        self, lease_id: str, bounds: Sequence[Bound], tokens: int, spend: int, month: int
    ) -> Verdict:
        away_s = self._clock.monotonic() - (self._away_since or 0.0)
        if away_s > self._outage.longest_s:
            if self._outage.refuse:
                raise Unavailable(
                    f"the shared counters of limits have been away for {away_s:.0f} s, longer than "
                    f"the {self._outage.longest_s:.0f} s that this gateway may serve limited keys "
                    "without them (gateway.limits_outage_s)",
                    retry_after_s=5.0,
                )
            wanted = [Bound(bound.scope, Limits()) for bound in bounds]
        else:
            wanted = [self._share(bound, month) for bound in bounds]
        verdict = self._here(lease_id, wanted, tokens, spend, month)
        if verdict.lease is not None:
            self._leases[lease_id] = None, verdict.lease
        return verdict

    def _here(
        self, lease_id: str, bounds: Sequence[Bound], tokens: int, spend: int, month: int
    ) -> Verdict:
        now = self._clock.monotonic()
        return self._own.reserve(lease_id, bounds, tokens=tokens, spend=spend, now=now, month=month)

    def _share(self, bound: Bound, month: int) -> Bound:
        """This gateway's part of a limit; of money, of what was left when Redis went."""
        share, limits = self._outage.share, bound.limits
        spend = limits.spend_per_month
        if spend is not None:
            spent = self._own.spent(bound.scope, month) / NANO
            spend = spent + max(spend - spent, 0.0) * share
        return Bound(
            bound.scope,
            replace(
                limits,
                requests_per_minute=_part(limits.requests_per_minute, share),
                tokens_per_minute=_part(limits.tokens_per_minute, share),
                concurrent_streams=_part(limits.concurrent_streams, share),
                spend_per_month=spend,
            ),
        )

    # The one conversation -------------------------------------------------------------------------

    def _add(self, step: _Step) -> None:
        if len(self._steps) < MAX_KEPT:
            self._steps.append(step)
        elif step.answer is not None:
            step.answer.set_result(None)
        self._wake.set()

    async def run(self) -> None:
        """Carry out what is asked, until cancelled."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                steps, self._steps = self._steps, []
                if steps and not await self._carry_out(steps):
                    await self._clock.sleep(RETRY_S)
                    self._wake.set()
        finally:
            if self._steps:  # what ended last
                await self._carry_out(self._steps)
            await self._redis.aclose()

    async def _carry_out(self, steps: list[_Step]) -> bool:
        """False if Redis is away: then nobody waits any longer, and the rest is kept."""
        from redis.exceptions import RedisError

        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                pipeline = self._redis.pipeline(transaction=False)
                for step in steps:
                    pipeline.eval(step.script, len(step.keys), *step.keys, *step.arguments)
                answers = await pipeline.execute()
        except (RedisError, OSError) as error:  # OSError holds TimeoutError
            if self._away_since is None:
                self._away_since = self._clock.monotonic()
                _log.warning("limits_counters_away", extra={"fields": {"reason": repr(error)}})
            self._steps[:0] = [step for step in steps if step.answer is None]
            for step in (*steps, *self._steps):
                if step.answer is not None and not step.answer.done():
                    step.answer.set_result(None)
            self._steps = [step for step in self._steps if step.answer is None]
            if not self._steps:  # have something to ask, to see when Redis is back
                self._steps.append(_Step("return 1", [], []))
            return False
        if self._away_since is not None:
            self._away_since = None
            _log.info("limits_counters_back")
        for step, answer in zip(steps, answers, strict=True):
            if step.answer is not None and not step.answer.done():
                step.answer.set_result(answer)
        return True

    def _keys(self, scope: str) -> list[str]:
        return [f"{self._prefix}{scope}", f"{self._prefix}{scope}:leases"]

    def _times(self) -> list[int]:
        return [round(SLICE_S * 1000), SLICES, round(self._lease_s * 1000)]


def _four(limits: Limits) -> list[int]:
    """Limits as a script takes them; -1 is none."""
    spend = limits.spend_per_month
    whole = (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent_streams)
    return [-1 if one is None else one for one in whole] + [
        -1 if spend is None else round(spend * NANO)
    ]


def _part(limit: int | None, share: float) -> int | None:
    return None if limit is None else max(int(limit * share), min(limit, 1))
