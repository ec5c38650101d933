"""Virtual time: an event loop that never waits, and the clock that goes by it.

When nothing is ready, time jumps to the next timer; when there is no timer either, nothing can ever
happen again, and that is a deadlock. What the production code gives to threads runs at once, so
that the order of everything depends on nothing but the program. Must not open a socket.

Timers lie in a heap of numbers, not of handles that Python compares by a method, and a turn asks no
selector: a turn costs a third of what asyncio's own does, and a run is little else than turns.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
from collections.abc import Callable
from typing import Any

EPOCH_S = 1_700_000_000.0
MOST_TURNS = 200_000
"""Turns of the loop without a step of time: more are no work but a circle."""


class Stuck(BaseException):
    """Nothing can happen any more, or the same happens for ever. No handler may swallow it."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose ``time`` begins at 0 and is moved by nothing but its timers."""

    def __init__(self) -> None:
        super().__init__(selectors.SelectSelector())
        self._now = 0.0
        self._turns = 0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timed = 0

    def time(self) -> float:
        return self._now

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._timed += 1  # of two timers for one moment the older one is first
        heapq.heappush(self._timers, (when, self._timed, timer))
        return timer

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It stays in the heap until its moment."""

    def _run_once(self) -> None:
        """One turn: what is ready now, or the timers of the next moment for which there are any."""
        ready = self._ready  # type: ignore[attr-defined]
        if ready:
            self._turns += 1
            if self._turns > MOST_TURNS:
                raise Stuck(f"livelock: {MOST_TURNS} turns at {self._now:.3f} s")
        else:
            self._jump()
        timers, now = self._timers, self._now
        while timers and timers[0][0] <= now:
            timer = heapq.heappop(timers)[2]
            if not timer._cancelled:  # type: ignore[attr-defined]
                ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def _jump(self) -> None:
        """To the next timer that still counts, unless the loop is to stop."""
        if self._stopping:  # type: ignore[attr-defined]
            return
        timers = self._timers
        while timers and timers[0][2]._cancelled:  # type: ignore[attr-defined]
            heapq.heappop(timers)
        if not timers:
            raise Stuck("deadlock: nothing is ready and no timer is set")
        self._turns = 0
        self._now = max(self._now, timers[0][0])

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
