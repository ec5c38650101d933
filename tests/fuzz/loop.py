"""Virtual time: an event loop that never waits, and the clock that goes by it.

When nothing is ready, time jumps to the next timer; when there is no timer either, nothing can ever
happen again, and that is a deadlock. What the production code gives to threads runs at once, so
that the order of everything depends on nothing but the program. Must not open a socket.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any

EPOCH_S = 1_700_000_000.0
MOST_TURNS = 200_000
"""Turns of the loop without a step of time: more are no work but a circle."""


class Stuck(BaseException):
    """Nothing can happen any more, or the same happens for ever. No handler may swallow it."""


class _Jump(selectors.SelectSelector):
    """Where a loop would wait for the network, time passes instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Stuck("deadlock: nothing is ready and no timer is set")
        if timeout > 0:
            self.now += timeout
            self._turns = 0
            return []
        self._turns += 1
        if self._turns > MOST_TURNS:
            raise Stuck(f"livelock: {MOST_TURNS} turns at {self.now:.3f} s")
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose ``time`` begins at 0 and is moved by nothing but its timers."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Run ``func`` at once."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class VirtualClock:
    """``core.clock.Clock`` on a virtual loop; the wall clock may be set wrong by ``jump_s``."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.jump_s = 0.0

    def now(self) -> float:
        return EPOCH_S + self._loop.time() + self.jump_s

    def monotonic(self) -> float:
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
