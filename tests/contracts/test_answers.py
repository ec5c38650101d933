"""The contract of ``gateway.answers``, on the answers of a process and on those in Redis."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from redis_server import RedisServer

from cloudlm.core.chat import Usage
from cloudlm.core.clock import SystemClock
from cloudlm.core.errors import BadSetting
from cloudlm.gateway import answers_redis
from cloudlm.gateway.answers import Answers, LocalAnswers
from cloudlm.gateway.answers_redis import RedisAnswers, Seal
from cloudlm.gateway.cache import Answer
from cloudlm.gateway.holdings import Place
from cloudlm.security.keys import answer_key

_numbers = itertools.count()
ANSWER = Answer(b"the secret answer", "application/json", Usage(7, 5, 2), '"tag"')
PLACE = Place("acme", bytes(range(32)))


def _seal(pepper: bytes = b"p" * 32) -> Seal:
    return Seal(lambda tenant: answer_key(tenant, pepper))


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis on a machine that stands still for a moment must not seem away."""
    monkeypatch.setattr(answers_redis, "ANSWER_TIMEOUT_S", 5.0)
    monkeypatch.setattr(answers_redis, "MAX_KEEP_S", 30.0)


@pytest.fixture
def shared(redis_server: RedisServer) -> Callable[..., Any]:
    """Make the answers of one more gateway over the same Redis, running."""
    prefix = f"test{next(_numbers)}:"

    @contextlib.asynccontextmanager
    async def make(ttl_s: float = 30.0, pepper: bytes = b"p" * 32) -> AsyncIterator[RedisAnswers]:
        clock = SystemClock()
        local = LocalAnswers(1024 * 1024, ttl_s, {}, clock)
        answers = RedisAnswers(redis_server.url, local, _seal(pepper), ttl_s, clock, prefix=prefix)
        running = asyncio.create_task(answers.run())
        try:
            yield answers
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    return make


@pytest.fixture(params=["local", pytest.param("redis", marks=pytest.mark.redis)])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., Any]]:
    """Make the answers under test."""
    async with contextlib.AsyncExitStack() as stack:
        shared = request.getfixturevalue("shared") if request.param == "redis" else None

        async def build(ttl_s: float = 30.0) -> Answers:
            if shared is None:
                return LocalAnswers(1024 * 1024, ttl_s, {}, SystemClock())
            made: Answers = await stack.enter_async_context(shared(ttl_s))
            return made

        yield build


async def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not (said := condition()) or (asyncio.iscoroutine(said) and not await said):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


async def test_what_was_kept_is_found(make: Any) -> None:
    answers = await make()
    assert await answers.get(PLACE) is None
    assert answers.near(PLACE) is None
    answers.put(PLACE, ANSWER)
    assert await answers.get(PLACE) == ANSWER
    assert answers.near(PLACE) == ANSWER
    assert answers.size_bytes > len(ANSWER.body)


@pytest.mark.promise(7)
async def test_never_at_another_place_or_tenant(make: Any) -> None:
    answers = await make()
    answers.put(PLACE, ANSWER)
    assert await answers.get(Place("other", PLACE.key)) is None
    assert await answers.get(Place("acme", b"k" * 32)) is None


async def test_an_answer_ages(make: Any) -> None:
    answers = await make(ttl_s=1.5)
    answers.put(PLACE, ANSWER)
    assert await answers.get(PLACE) == ANSWER
    await asyncio.sleep(1.6)
    assert await answers.get(PLACE) is None


async def test_a_large_answer_is_kept_to_its_bound(make: Any) -> None:
    answers = await make()
    fits = Answer(b"x" * answers.largest_bytes, "application/json", Usage(1, 1, 0), '"t"')
    answers.put(PLACE, fits)
    assert await answers.get(PLACE) == fits
    larger = Answer(fits.body + b"x", "application/json", Usage(1, 1, 0), '"t"')
    answers.put(Place("acme", b"l" * 32), larger)
    assert answers.near(Place("acme", b"l" * 32)) is None


# Redis alone -------------------------------------------------------------------------------------


async def _raw(server: RedisServer) -> dict[bytes, bytes]:
    from redis.asyncio import Redis

    async with Redis.from_url(server.url) as redis:
        return {name: await redis.get(name) async for name in redis.scan_iter("*")}


@pytest.mark.redis
async def test_gateways_know_each_others_answers(shared: Any) -> None:
    async with shared(ttl_s=2.0) as one, shared(ttl_s=2.0) as two:
        one.put(PLACE, ANSWER)
        await until(lambda: two.get(PLACE))
        assert await two.get(PLACE) == ANSWER
        assert two.near(PLACE) == ANSWER  # from now on without Redis
        await asyncio.sleep(2.1)
        assert two.near(PLACE) is None  # not longer than its time in all


@pytest.mark.promise(32)
@pytest.mark.redis
async def test_redis_learns_neither_answers_nor_tenants(
    shared: Any, redis_server: RedisServer
) -> None:
    async with shared() as answers:
        answers.put(PLACE, ANSWER)
        await until(lambda: _raw(redis_server))
    for name, value in (await _raw(redis_server)).items():
        assert b"secret" not in value and b"application" not in value
        assert b"acme" not in name + value


@pytest.mark.redis
async def test_what_redis_changed_is_no_answer(shared: Any, redis_server: RedisServer) -> None:
    from redis.asyncio import Redis

    elsewhere = Place("acme", b"e" * 32)
    async with shared() as one, shared() as two, Redis.from_url(redis_server.url) as redis:
        one.put(PLACE, ANSWER)
        await until(lambda: redis.exists(one._name(PLACE)))
        value = await redis.get(one._name(PLACE))
        for changed in (value[:-1] + bytes([value[-1] ^ 1]), value[:5], b"", b"x" * 64):
            await redis.set(one._name(PLACE), changed, px=10_000)
            assert await two.get(PLACE) is None
        await redis.set(one._name(elsewhere), value, px=10_000)  # a good one in another's place
        assert await two.get(elsewhere) is None
        assert two.unreadable == 5
        await redis.delete(one._name(PLACE))
        await redis.lpush(one._name(PLACE), "not a text")
        assert await two.get(PLACE) is None


@pytest.mark.redis
async def test_another_installations_answers_are_none(shared: Any) -> None:
    async with shared() as one, shared(pepper=b"q" * 32) as two:
        one.put(PLACE, ANSWER)
        await asyncio.sleep(0.1)
        assert await two.get(PLACE) is None


@pytest.mark.promise(26)
@pytest.mark.redis
async def test_redis_goes_and_comes_back(shared: Any, redis_server: RedisServer) -> None:
    async with shared() as answers:
        answers.put(PLACE, ANSWER)
        redis_server.stop()
        try:
            places = [Place("acme", bytes([n]) * 32) for n in range(50)]
            began = time.monotonic()
            found = await asyncio.gather(*(answers.get(place) for place in places))
            assert found == [None] * 50
            assert time.monotonic() - began < 4.5  # one after another it would be five
            began = time.monotonic()
            assert [await answers.get(place) for place in places] == [None] * 50
            assert time.monotonic() - began < 4.5  # nobody waits any more
            assert await answers.get(PLACE) == ANSWER  # what this process has
            answers.put(places[0], ANSWER)
            assert await answers.get(places[0]) == ANSWER
        finally:
            redis_server.start()
        await until(lambda: not answers.away)
        answers.put(places[1], ANSWER)
        async with shared() as other:
            await until(lambda: other.get(places[1]))


@pytest.mark.promise(26)
@pytest.mark.redis
async def test_a_silent_redis_is_away_as_well(redis_server: RedisServer) -> None:
    """It takes connections and never answers."""
    over = asyncio.Event()

    async def say_nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    local = LocalAnswers(1024 * 1024, 30.0, {}, SystemClock())
    url = f"redis://127.0.0.1:{port}"
    answers = RedisAnswers(url, local, _seal(), 30.0, SystemClock())
    running = asyncio.create_task(answers.run())
    began = time.monotonic()
    assert await answers.get(PLACE) is None
    assert time.monotonic() - began < 20.0
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    over.set()
    silent.close()
    await silent.wait_closed()


def test_an_address_that_cannot_be() -> None:
    local = LocalAnswers(1024, 1.0, {}, SystemClock())
    with pytest.raises(BadSetting, match="cache_url"):
        RedisAnswers("http://nowhere", local, _seal(), 1.0, SystemClock())
