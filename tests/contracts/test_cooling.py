"""What a replica asks of one gateway, on a real Redis: the others hear it, and no nonsense."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from redis_server import RedisServer

from cloudlm.core.clock import SystemClock
from cloudlm.core.errors import BadSetting
from cloudlm.gateway import cooling_redis
from cloudlm.gateway.cooling_redis import LONGEST_S, RedisCooling

Heard = list[tuple[str, float]]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis on a machine that stands still for a moment must not seem away."""
    monkeypatch.setattr(cooling_redis, "TIMEOUT_S", 30.0)
    monkeypatch.setattr(cooling_redis, "RETRY_S", 0.01)


@contextlib.asynccontextmanager
async def gateway(url: str, channel: str) -> AsyncIterator[tuple[RedisCooling, Heard]]:
    heard: Heard = []
    cooling = RedisCooling(url, channel, lambda *told: heard.append(told), SystemClock())
    running = asyncio.create_task(cooling.run())
    try:
        await until(lambda: cooling.listens)
        yield cooling, heard
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.redis
@pytest.mark.promise(28)
@pytest.mark.known_failure("experientiallabs#946")
async def test_what_a_replica_asks_of_one_gateway_all_do(redis_server: RedisServer) -> None:
    url = redis_server.url
    async with (
        gateway(url, "one") as (first, own),
        gateway(url, "one") as (_, other),
        gateway(url, "two") as (stranger, strangers),
    ):
        first.tell("chat-r1-0", 17.5)
        await until(lambda: own and other)
        stranger.tell("chat-r1-0", 3.0)
        await until(lambda: strangers)
        assert own == other == [("chat-r1-0", 17.5)]
        assert strangers == [("chat-r1-0", 3.0)]


@pytest.mark.redis
async def test_nonsense_is_nobodys_wish(redis_server: RedisServer) -> None:
    async with gateway(redis_server.url, "one") as (cooling, heard):
        for data in (b"", b"[", b"7", b'["r"]', b'["r","x"]', b'["r",-1]', b'["r",0]', b"\xff"):
            await cooling._says.publish("one", data)
        await cooling._says.publish("one", msgspec.json.encode(("long", 1e300)))
        await until(lambda: heard)
        assert heard == [("long", LONGEST_S)]


@pytest.mark.redis
async def test_redis_goes_and_comes_back(redis_server: RedisServer) -> None:
    async with gateway(redis_server.url, "one") as (cooling, heard):
        redis_server.stop()
        try:
            await until(lambda: not cooling.listens)
            cooling.tell("lost", 1.0)
            await until(lambda: not cooling._waiting)
        finally:
            redis_server.start()
        await until(lambda: cooling.listens)
        cooling.tell("told", 2.0)
        await until(lambda: ("told", 2.0) in heard)


async def test_an_address_that_is_none_is_named() -> None:
    with pytest.raises(BadSetting, match=r"gateway\.limits_url"):
        RedisCooling("nowhere", "one", lambda *_: None, SystemClock())


class _Deaf:
    """A connection over which nothing comes any more, though nobody closed it."""

    pings = 0

    async def get_message(self, timeout: float) -> None:
        return None

    async def ping(self) -> None:
        self.pings += 1


async def test_a_ping_that_nobody_answers_ends_the_connection() -> None:
    cooling = RedisCooling("redis://localhost:1", "one", lambda *_: None, SystemClock())
    line = _Deaf()
    await cooling._next(line)
    with pytest.raises(ConnectionError):
        await cooling._next(line)
    assert line.pings == 1
