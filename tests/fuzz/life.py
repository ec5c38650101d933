"""The life of a control process, as the outside sees it: every call that leaves it comes by here.

So it can be killed at any call, before or after that had its effect, or be paused before one while
time goes on for everybody else. Must not know what is called.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.fuzz.loop import VirtualLoop

from cloudlm.core.errors import Unavailable


class Life:
    """From the start of a process to its death. ``latency_s`` is the longest that a call takes to
    get there; ``died`` is called once, when a planned death comes."""

    def __init__(
        self, loop: VirtualLoop, chance: random.Random, latency_s: float, died: Callable[[], None]
    ) -> None:
        self._loop, self._chance = loop, chance
        self._latency_s, self._died = latency_s, died
        self._calls = 0
        self._dies_at: tuple[int, bool] | None = None
        self.began_at = loop.time()
        self.paused_until = 0.0
        self.dead = False
        self._pause_at: tuple[str, float] | None = None

    def pauses_at(self, moment: str, for_s: float) -> None:
        """Have it pause so long ``on the way`` of its next order, or ``after a write``."""
        self._pause_at = moment, for_s

    def comes(self, moment: str) -> None:
        """Such a moment is there: a planned pause begins."""
        if self._pause_at is not None and self._pause_at[0] == moment:
            self.paused_until = max(self.paused_until, self._loop.time() + self._pause_at[1])
            self._pause_at = None

    def dies_in(self, calls: int, *, after: bool) -> None:
        """Have it die at the call that is so many away, before or after its effect."""
        self._dies_at = self._calls + calls + 1, after

    def heals(self) -> None:
        """Nothing befalls it from now on. A pause that has begun lasts as long as was planned: what
        sleeps is woken by nobody, and who may take its lease depends on it."""
        self._dies_at = self._pause_at = None

    async def leaves(self) -> None:
        """A call goes out; returns when it is there. Raises Unavailable for a dead process."""
        self._calls += 1
        if self.dead:
            raise Unavailable("this process is dead")
        if self._dies_at == (self._calls, False):
            await self._end()
        if self._latency_s:
            await self._loop.pause(self._chance.random() * self._latency_s)
        await self._paused()
        if self.dead:
            raise Unavailable("this process is dead")

    async def returns(self, *, wrote: bool = True) -> None:
        """The call had its effect. What was only read is known without a pause."""
        if self.dead:
            raise Unavailable("this process is dead")
        if self._dies_at is not None and self._dies_at[1] and self._calls >= self._dies_at[0]:
            await self._end()
        if wrote:
            await self._paused()

    async def _paused(self) -> None:
        while (pause_s := self.paused_until - self._loop.time()) > 0:
            await self._loop.pause(pause_s)

    async def _end(self) -> None:
        self.dead = True
        self._died()
        await self._loop.create_future()  # until its task is cancelled
