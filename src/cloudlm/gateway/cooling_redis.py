"""What a replica asks of one gateway, those on other machines do too: to be left alone for a while.

Told through Redis's publish and subscribe, to whoever listens at that moment. What is lost costs
one request to the replica, which then says so itself; so nobody waits, and nothing is told again.
Must not decide how long.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import msgspec

from cloudlm.core.clock import Clock
from cloudlm.gateway.redis_client import connect
from cloudlm.telemetry.damping import Damper
from cloudlm.telemetry.logs import get_logger

TIMEOUT_S = 1.0
RETRY_S = 1.0
QUIET_S = 30.0
"""After so much silence the connection is asked whether it still is one."""
LONGEST_S = 60.0
"""No longer than this is a replica left alone because another gateway said so."""
_MOST_WAITING = 1000

_log = get_logger(__name__)


class _Cool(msgspec.Struct, array_like=True):
    replica: str
    wait_s: float


_decoder = msgspec.json.Decoder(_Cool)


class RedisCooling:
    """See the module. ``heard`` is given the replica and the seconds that some gateway was told,
    this one too; ``channel`` is the installation's own name for this. Raises BadSetting for an
    address that cannot be, MissingExtra without redis-py."""

    def __init__(
        self, url: str, channel: str, heard: Callable[[str, float], None], clock: Clock
    ) -> None:
        self._says, self._hears = (connect(url, "gateway.limits_url", TIMEOUT_S) for _ in range(2))
        self._channel = channel
        self._heard = heard
        self._clock = clock
        self._waiting: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._asked = False  # whether the connection still is one
        self._damper = Damper()
        self.listens = False

    def tell(self, replica: str, wait_s: float) -> None:
        """Have the other gateways leave ``replica`` alone too; never waits."""
        if len(self._waiting) < _MOST_WAITING:
            self._waiting[replica] = max(wait_s, self._waiting.get(replica, 0.0))
            self._wake.set()

    async def run(self) -> None:
        """Tell and listen, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._say())
                tasks.create_task(self._listen())
        finally:
            await self._says.aclose()
            await self._hears.aclose()

    async def _say(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            waiting, self._waiting = self._waiting, {}
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    pipeline = self._says.pipeline(transaction=False)
                    for replica, wait_s in waiting.items():
                        told = msgspec.json.encode(_Cool(replica, wait_s))
                        pipeline.publish(self._channel, told)
                    await pipeline.execute()
            except Exception as error:  # whatever it is, the next may be told again
                self._away(error)
                await self._clock.sleep(RETRY_S)  # what is late would hold too long

    async def _listen(self) -> None:
        while True:
            try:
                async with self._hears.pubsub() as line:
                    await line.subscribe(self._channel)
                    self._asked = False
                    while True:
                        await self._next(line)
            except Exception as error:
                self.listens = False
                self._away(error)
            await self._clock.sleep(RETRY_S)

    async def _next(self, line: Any) -> None:
        message = await line.get_message(timeout=QUIET_S)
        if message is None:
            if self._asked:
                raise ConnectionError("Redis did not answer a ping")
            self._asked = True
            await line.ping()
            return
        self.listens, self._asked = True, False  # the first answer is that to the subscription
        if message["type"] == "message":
            self._take(message["data"])

    def _away(self, error: Exception) -> None:
        count = self._damper.take(type(error).__name__, self._clock.monotonic())
        if count is not None:
            fields = {"reason": repr(error), "count": count}
            _log.warning("cooling_not_shared", extra={"fields": fields})

    def _take(self, data: bytes) -> None:
        """Redis may hold what is not ours: nonsense is nobody's wish."""
        try:
            cool = _decoder.decode(data)
        except msgspec.DecodeError:
            return
        if math.isfinite(cool.wait_s) and cool.wait_s > 0:
            self._heard(cool.replica, min(cool.wait_s, LONGEST_S))
