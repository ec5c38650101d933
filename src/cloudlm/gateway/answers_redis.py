"""Answers that several gateways share, in Redis or Valkey, behind those of this process.

Redis learns nothing from them: names are HMACs with a secret of the tenant, values are encrypted
with another one (AES-256-GCM, bound to their name, so that none can stand in another's place).
While Redis is away everything is answered as if it held nothing: who asks as it goes waits a
fraction of a second, those after that not at all. Must not decide what is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloudlm.core.chat import Usage
from cloudlm.core.clock import Clock
from cloudlm.gateway.answers import LocalAnswers
from cloudlm.gateway.cache import Answer
from cloudlm.gateway.holdings import Place
from cloudlm.gateway.redis_client import connect
from cloudlm.telemetry.logs import get_logger

PREFIX = "cloudlm:{answers}:"
ANSWER_TIMEOUT_S = 0.1
RETRY_S = 0.5
MAX_KEEP_S = 1.0
LARGEST_SHARED_BYTES = 1024 * 1024
MAX_WAITING_BYTES = 16 * 1024 * 1024
_ASKED_AT_ONCE = 256
_NONCE_BYTES = 12
_encoder = msgspec.msgpack.Encoder()

_log = get_logger(__name__)


class _Kept(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """An answer as its encrypted value holds it."""

    body: bytes
    content_type: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    tag: str


_decoder = msgspec.msgpack.Decoder(_Kept)


class Seal:
    """What makes answers unreadable for whoever keeps them. ``tenant_key`` is 32 bytes of secret
    for a tenant's name."""

    def __init__(self, tenant_key: Callable[[str], bytes]) -> None:
        self._tenant_key = tenant_key
        self._cipher = lru_cache(4096)(self._make)

    def _make(self, tenant: str) -> AESGCM:
        secret = hmac.new(self._tenant_key(tenant), b"answers kept elsewhere", hashlib.sha256)
        return AESGCM(secret.digest())

    def close(self, place: Place, answer: Answer) -> bytes:
        """The value that is kept for an answer."""
        usage = answer.usage
        tokens = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        plain = _encoder.encode(_Kept(answer.body, answer.content_type, *tokens, answer.tag))
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher(place.tenant).encrypt(nonce, plain, place.key)

    def open(self, place: Place, value: bytes) -> Answer | None:
        """The answer in a value, None if it is not what was kept at this place."""
        nonce, rest = value[:_NONCE_BYTES], value[_NONCE_BYTES:]
        try:
            plain = self._cipher(place.tenant).decrypt(nonce, rest, place.key)
            kept = _decoder.decode(plain)
        except (InvalidTag, ValueError, msgspec.DecodeError):  # too short, another key, changed
            return None
        usage = Usage(kept.prompt_tokens, kept.completion_tokens, kept.cached_tokens)
        return Answer(kept.body, kept.content_type, usage, kept.tag)


class RedisAnswers:
    """See ``answers.Answers``. ``run`` is the one task that talks to Redis. Raises BadSetting for
    an address that cannot be, MissingExtra without redis-py."""

    def __init__(
        self,
        url: str,
        local: LocalAnswers,
        seal: Seal,
        ttl_s: float,
        clock: Clock,
        *,
        prefix: str = PREFIX,
    ) -> None:
        # Two lines, so that no look-up waits behind answers of a megabyte.
        self._asks, self._keeps = (
            connect(url, "gateway.cache_url", ANSWER_TIMEOUT_S) for _ in range(2)
        )
        self._local = local
        self._seal = seal
        self._ttl_ms = max(round(ttl_s * 1000), 1)
        self._clock = clock
        self._prefix = prefix.encode()
        self._asked: deque[tuple[bytes, asyncio.Future[tuple[bytes | None, int]]]] = deque()
        self._fresh: deque[tuple[bytes, bytes]] = deque()
        self._fresh_bytes = 0
        self._asking, self._keeping = asyncio.Event(), asyncio.Event()
        self.away = False
        self.unreadable = 0  # values that were not what this installation kept

    @property
    def largest_bytes(self) -> int:
        return self._local.largest_bytes

    @property
    def size_bytes(self) -> int:
        return self._local.size_bytes

    def near(self, place: Place) -> Answer | None:
        return self._local.near(place)

    async def get(self, place: Place) -> Answer | None:
        answer = self._local.near(place)
        if answer is not None or self.away:
            return answer
        found: asyncio.Future[tuple[bytes | None, int]] = asyncio.get_running_loop().create_future()
        self._asked.append((self._name(place), found))
        self._asking.set()
        try:  # bounded also while another batch is on its way
            value, left_ms = await asyncio.wait_for(found, 2 * ANSWER_TIMEOUT_S)
        except TimeoutError:
            return None
        if value is None or left_ms <= 0:
            return None
        answer = self._seal.open(place, value)
        if answer is None:
            self.unreadable += 1
            return None
        self._local.put(place, answer, left_ms / 1000)
        return answer

    def put(self, place: Place, answer: Answer) -> None:
        self._local.put(place, answer)
        size_bytes = len(answer.body)
        full = self._fresh_bytes + size_bytes > MAX_WAITING_BYTES
        if self.away or full or size_bytes > LARGEST_SHARED_BYTES:
            return
        self._fresh.append((self._name(place), self._seal.close(place, answer)))
        self._fresh_bytes += size_bytes
        self._keeping.set()

    def _name(self, place: Place) -> bytes:
        return self._prefix + place.key.hex().encode()

    # The conversation -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Carry out what is asked, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._look_up())
                tasks.create_task(self._bring())
        finally:
            await self._asks.aclose()
            await self._keeps.aclose()

    async def _look_up(self) -> None:
        while True:
            await self._asking.wait()
            asked = [self._asked.popleft() for _ in range(min(len(self._asked), _ASKED_AT_ONCE))]
            if not self._asked:
                self._asking.clear()
            wanted = [(name, found) for name, found in asked if not found.done()]
            pipeline = self._asks.pipeline(transaction=False)
            for name, _ in wanted:
                pipeline.get(name)
                pipeline.pttl(name)
            said = await self._say(pipeline) if wanted else []
            for number, (_, found) in enumerate(wanted):
                if not found.done():
                    pair = said[2 * number : 2 * number + 2]
                    found.set_result((pair[0], pair[1]) if pair else (None, 0))
            if self.away:
                await self._until_back()

    async def _bring(self) -> None:
        while True:
            await self._keeping.wait()
            self._keeping.clear()
            fresh = list(self._fresh)
            self._forget_fresh()
            for begin in range(0, len(fresh), _ASKED_AT_ONCE):
                if self.away:
                    break  # they are only copies of what this process has
                pipeline = self._keeps.pipeline(transaction=False)
                for name, value in fresh[begin : begin + _ASKED_AT_ONCE]:
                    pipeline.set(name, value, px=self._ttl_ms)
                await self._say(pipeline, MAX_KEEP_S)
            if self.away:
                self._asking.set()  # the other task waits for Redis to come back

    async def _say(self, pipeline: Any, timeout_s: float | None = None) -> list[Any]:
        """Redis's answers; none, and Redis is away, if it has none in time."""
        from redis.exceptions import OutOfMemoryError, RedisError

        try:
            async with asyncio.timeout(timeout_s or ANSWER_TIMEOUT_S):
                said: list[Any] = await pipeline.execute(raise_on_error=False)
            for fault in said:
                if isinstance(fault, RedisError) and not isinstance(fault, OutOfMemoryError):
                    raise fault
            return said
        except (RedisError, OSError) as error:  # OSError holds TimeoutError
            if not self.away:
                _log.warning("shared_answers_away", extra={"fields": {"reason": repr(error)}})
            self.away = True
            return []

    async def _until_back(self) -> None:
        """Wait for Redis, while nobody else does."""
        for _, found in self._asked:
            if not found.done():
                found.set_result((None, 0))
        self._asked.clear()
        self._forget_fresh()
        while True:
            await self._clock.sleep(RETRY_S)
            pipeline = self._asks.pipeline(transaction=False)
            pipeline.ping()
            if await self._say(pipeline):
                break
        self.away = False
        _log.info("shared_answers_back")

    def _forget_fresh(self) -> None:
        self._fresh.clear()
        self._fresh_bytes = 0
