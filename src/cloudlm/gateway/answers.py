"""The port behind which answers are kept, and the answers of one process.

Several gateways that shall know each other's answers keep them in one place too
(``answers_redis``). Must not decide what may be kept or for whom; ``cache`` and ``recall`` do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

from cloudlm.core.clock import Clock
from cloudlm.gateway.cache import Answer, AnswerStore
from cloudlm.gateway.holdings import Place


class Answers(Protocol):
    """Answers by place. Nothing here raises or waits for longer than a fraction of a second: what
    cannot be reached is not there."""

    @property
    def largest_bytes(self) -> int:
        """The largest body that is kept."""
        ...

    @property
    def size_bytes(self) -> int:
        """Memory held in this process."""
        ...

    @property
    def away(self) -> bool:
        """Whether the place that is shared cannot be reached."""
        ...

    def near(self, place: Place) -> Answer | None:
        """The answer, if this process has it."""
        ...

    async def get(self, place: Place) -> Answer | None:
        """The answer, wherever it is."""
        ...

    def put(self, place: Place, answer: Answer) -> None:
        """Keep an answer; never waits."""
        ...

    async def run(self) -> None:
        """What is to be done in the background, until cancelled."""
        ...


class LocalAnswers:
    """The answers of this process alone; see ``AnswerStore``."""

    away = False

    def __init__(
        self, max_bytes: int, ttl_s: float, weights: Mapping[str, float], clock: Clock
    ) -> None:
        self._store = AnswerStore(max_bytes, ttl_s, weights)
        self._clock = clock

    @property
    def largest_bytes(self) -> int:
        return self._store.largest_bytes

    @property
    def size_bytes(self) -> int:
        return self._store.size_bytes

    def near(self, place: Place) -> Answer | None:
        return self._store.get(place, self._clock.monotonic())

    async def get(self, place: Place) -> Answer | None:
        return self.near(place)

    def put(self, place: Place, answer: Answer, ttl_s: float | None = None) -> None:
        """As the port says; ``ttl_s`` is what is left of the answer's time, if that is less."""
        self._store.put(place, answer, self._clock.monotonic(), ttl_s)

    async def run(self) -> None:
        """Nothing is."""
        await asyncio.Event().wait()
