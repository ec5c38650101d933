"""The contract of ``gateway.counters``, on the counts of a process and on those in Redis."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from redis_server import RedisServer

from cloudlm.core.access import Limits
from cloudlm.core.clock import SystemClock
from cloudlm.core.errors import BadSetting, Unavailable
from cloudlm.gateway import counters_redis
from cloudlm.gateway.channel import Channel, attend
from cloudlm.gateway.counters import Counters, LocalCounters
from cloudlm.gateway.counters_redis import Outage, RedisCounters
from cloudlm.gateway.desk import Desk, SharedCounters
from cloudlm.gateway.limits import NANO
from cloudlm.gateway.verdicts import Bound, Kind, Verdict

MONTH = 24_000
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis on a machine that stands still for a moment must not seem away."""
    monkeypatch.setattr(counters_redis, "ANSWER_TIMEOUT_S", 5.0)


@pytest.fixture
def shared(redis_server: RedisServer) -> Callable[..., Any]:
    """Make counters of one more gateway over the same Redis, running."""
    prefix = f"test{next(_numbers)}:"

    @contextlib.asynccontextmanager
    async def make(**options: Any) -> AsyncIterator[RedisCounters]:
        outage = options.pop("outage", Outage())
        counters = RedisCounters(redis_server.url, SystemClock(), outage, prefix=prefix, **options)
        running = asyncio.create_task(counters.run())
        try:
            yield counters
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    return make


@contextlib.asynccontextmanager
async def at_desk(desk: Desk, number: int = 0) -> AsyncIterator[SharedCounters]:
    """The counters of one of several processes on a port."""
    ours, theirs = socket.socketpair()
    attending = asyncio.create_task(attend(ours, lambda what, data: desk.hear(number, what, data)))
    channel = await Channel.open(theirs)
    try:
        yield SharedCounters(channel)
    finally:
        await channel.close()
        await attending


@pytest.fixture(params=["local", "desk", pytest.param("redis", marks=pytest.mark.redis)])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., Any]]:
    """Make the counters under test; ``lease_s`` is how long leases last."""
    async with contextlib.AsyncExitStack() as stack:
        shared = request.getfixturevalue("shared") if request.param == "redis" else None

        async def build(lease_s: float = 30.0) -> Counters:
            if request.param == "desk":
                return await stack.enter_async_context(at_desk(Desk(SystemClock(), lease_s)))
            if shared is None:
                return LocalCounters(SystemClock(), lease_s)
            made: Counters = await stack.enter_async_context(shared(lease_s=lease_s))
            return made

        yield build


async def take(
    counters: Counters, *limits: Limits, tokens: int = 0, spend: int = 0, name: str = ""
) -> Verdict:
    bounds = [Bound(f"scope:{number}", one) for number, one in enumerate(limits)]
    name = name or f"lease-{next(_numbers)}"
    return await counters.reserve(name, bounds, tokens=tokens, spend=spend, month=MONTH)


def give(
    counters: Counters, verdict: Verdict, tokens: int = 0, spend: int = 0, counts: bool = True
) -> None:
    assert verdict.lease is not None
    counters.settle(verdict.lease, tokens=tokens, spend=spend, counts=counts, month=MONTH)


@pytest.mark.promise(22)
async def test_sixty_four_for_the_last_unit(make: Any) -> None:
    for limits, how in (
        (Limits(requests_per_minute=1), {}),
        (Limits(tokens_per_minute=100), {"tokens": 60}),
        (Limits(concurrent_streams=1), {}),
        (Limits(spend_per_month=1.0), {"spend": NANO - NANO // 4}),
    ):
        counters = await make()
        scope = Bound(f"one:{next(_numbers)}", limits)
        asked = [
            counters.reserve(f"l{n}", [scope], **{"tokens": 0, "spend": 0, "month": MONTH, **how})
            for n in range(64)
        ]
        taken = [verdict for verdict in await asyncio.gather(*asked) if verdict.lease is not None]
        assert len(taken) == 1


async def test_settle_returns_the_difference(make: Any) -> None:
    counters = await make()
    limits = Limits(
        requests_per_minute=5, tokens_per_minute=100, concurrent_streams=1, spend_per_month=1.0
    )
    first = await take(counters, limits, tokens=90, spend=NANO)
    assert first.tokens is not None
    assert (first.tokens.remaining, first.requests.remaining) == (10, 4)  # type: ignore[union-attr]
    assert 59 <= first.tokens.reset_s <= 65
    refused = await take(counters, limits, tokens=1)
    assert refused.refusal is not None
    assert (refused.refusal.kind, refused.refusal.used) == (Kind.SPEND, 1.0)
    give(counters, first, tokens=30, spend=NANO // 10)
    second = await take(counters, limits, tokens=70, spend=NANO // 2)
    assert second.tokens is not None
    assert (second.tokens.remaining, second.requests.remaining) == (0, 3)  # type: ignore[union-attr]
    give(counters, second, tokens=170, spend=NANO // 2, counts=False)  # more than was thought
    third = await take(counters, limits, tokens=1)
    assert third.refusal is not None
    assert (third.refusal.kind, third.refusal.used) == (Kind.TOKENS, 200)
    assert 54 <= third.refusal.retry_after_s <= 65  # type: ignore[operator]
    assert third.requests.remaining == 4  # type: ignore[union-attr]


@pytest.mark.promise(22)
async def test_all_bounds_or_none(make: Any) -> None:
    counters = await make()
    wide, narrow = Limits(requests_per_minute=10), Limits(requests_per_minute=1)
    assert (await take(counters, wide, narrow)).lease is not None
    refusal = (await take(counters, wide, narrow)).refusal
    assert refusal is not None
    assert (refusal.scope, refusal.limit) == ("scope:1", 1)
    assert (await take(counters, wide)).requests.remaining == 8  # type: ignore[union-attr]


@pytest.mark.promise(22)
async def test_leases_expire_unless_renewed(make: Any) -> None:
    counters = await make(lease_s=2.0)
    limits = Limits(concurrent_streams=2, spend_per_month=1.0)
    kept = await take(counters, limits, spend=NANO // 2, name="kept")
    assert (await take(counters, limits, spend=NANO // 2, name="lost")).lease is not None
    for _ in range(4):
        await asyncio.sleep(0.75)
        await counters.tend(["kept"], {}, MONTH)
    assert (await take(counters, limits, spend=NANO // 2)).lease is not None
    assert (await take(counters, limits)).lease is None
    give(counters, kept, spend=NANO // 2)
    assert (await take(counters, limits)).refusal.kind is Kind.SPEND  # type: ignore[union-attr]


async def test_what_the_ledger_knows_was_spent(make: Any) -> None:
    counters = await make()
    limits = Limits(spend_per_month=1.0)
    await counters.tend([], {"scope:0": NANO}, MONTH)
    await counters.tend([], {"scope:0": 1}, MONTH)  # never less
    refusal = (await take(counters, limits, spend=1)).refusal
    assert refusal is not None
    assert (refusal.kind, refusal.used, refusal.retry_after_s) == (Kind.SPEND, 1.0, None)
    next_month = await counters.reserve(
        "next", [Bound("scope:0", limits)], tokens=0, spend=1, month=MONTH + 1
    )
    assert next_month.lease is not None


# Redis alone -------------------------------------------------------------------------------------


@pytest.mark.promise(22)
@pytest.mark.redis
async def test_gateways_together_keep_to_the_limit(shared: Any) -> None:
    limits = Limits(requests_per_minute=50, tokens_per_minute=1000)
    async with shared() as one, shared() as two, shared() as three:
        asked = [take(each, limits, tokens=10) for each in (one, two, three) for _ in range(40)]
        taken = [verdict for verdict in await asyncio.gather(*asked) if verdict.lease is not None]
        assert len(taken) == 50


@pytest.mark.promise(26)
@pytest.mark.redis
async def test_redis_goes_and_comes_back(shared: Any, redis_server: Any) -> None:
    limits = Limits(requests_per_minute=10, spend_per_month=1.0)
    outage = Outage(share=0.5, longest_s=4.0)
    async with shared(outage=outage) as counters:
        held = await take(counters, limits, spend=NANO // 4)
        redis_server.stop()
        try:
            began = time.monotonic()
            verdicts = [await take(counters, limits) for _ in range(8)]
            assert time.monotonic() - began < 3.9
            # half of ten, and the one from before counts
            assert sum(verdict.lease is not None for verdict in verdicts) == 4
            give(counters, held, spend=NANO // 4)
            give(counters, verdicts[0], spend=NANO // 4)
            await asyncio.sleep(4.2)
            with pytest.raises(Unavailable, match="limits_outage_s"):
                await take(counters, limits)
        finally:
            redis_server.start()
        deadline = time.monotonic() + 60
        while counters.away:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        # Redis forgot what was; what was spent meanwhile is brought to it.
        refusal = (await take(counters, limits, spend=NANO * 3 // 4)).refusal
        assert refusal is not None
        assert (refusal.kind, refusal.used) == (Kind.SPEND, 0.5)


@pytest.mark.promise(22)
@pytest.mark.redis
async def test_an_answer_that_was_lost_settles_nothing_twice(shared: Any) -> None:
    async with shared() as counters:
        verdict = await take(counters, Limits(spend_per_month=1.0), spend=NANO // 2)
        for _ in range(3):
            counters._leases[verdict.lease.id] = (verdict.lease, None)
            give(counters, verdict, spend=NANO // 2)
        again = await take(counters, Limits(spend_per_month=1.0), spend=NANO // 2)
        assert again.lease is not None


def test_an_address_that_cannot_be() -> None:
    with pytest.raises(BadSetting, match="limits_url"):
        RedisCounters("http://nowhere", SystemClock(), Outage())


@pytest.mark.promise(22)
async def test_processes_on_one_port_count_together() -> None:
    desk = Desk(SystemClock())
    async with at_desk(desk, 0) as one, at_desk(desk, 1) as other:
        limits = Limits(requests_per_minute=3)
        taken = [await take(counters, limits) for counters in (one, other, one, other)]
        assert [verdict.lease is not None for verdict in taken] == [True, True, True, False]
        assert taken[3].refusal is not None
        assert taken[3].refusal.kind is Kind.REQUESTS
        # One has not read of the holder yet, the other has: it stays known.
        other.keep_only({"scope:0"})
        one.keep_only(set())
        assert (await take(other, limits)).lease is None


async def test_without_its_parent_a_process_refuses() -> None:
    async with at_desk(Desk(SystemClock())) as counters:
        await counters._channel.close()
        with pytest.raises(Unavailable, match="parent"):
            await take(counters, Limits(requests_per_minute=3))
