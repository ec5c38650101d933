"""Virtual time: an event loop that never waits, and the clock that goes by it.

When nothing is ready, time jumps to the next timer; when there is no timer either, nothing can ever
happen again, and that is a deadlock. What the production code gives to threads runs at once, so
that the order of everything depends on nothing but the program. Must not open a socket.

Timers lie in a heap of numbers, not of handles that Python compares by a method; a handle is as
little as can be run and cancelled, no selector is asked, and many turns are one call: a turn costs
a fraction of what asyncio's own does, and a run is little else than turns.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from heapq import heappop, heappush
from typing import Any

EPOCH_S = 1_700_000_000.0
MOST_TURNS = 200_000
"""Turns of the loop without a step of time: more are no work but a circle."""


class Stuck(BaseException):
    """Nothing can happen any more, or the same happens for ever. No handler may swallow it."""


class Due(asyncio.TimerHandle):
    """A callback and when it is due; as asyncio's own, without what only its debug mode needs."""

    __slots__ = ()

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: VirtualLoop,
        context: Context | None,
    ) -> None:
        self._when = when
        self._callback = callback
        self._args = args
        self._loop = loop
        self._context = copy_context() if context is None else context
        self._cancelled = False
        self._repr = self._source_traceback = None

    def cancel(self) -> None:
        """It stays in the heap until its moment."""
        self._cancelled = True
        self._callback = self._args = None


class VirtualLoop(asyncio.BaseEventLoop):
    """A loop whose ``time`` begins at 0 and is moved by nothing but its timers."""

    _ready: deque[Any]
    _stopping: bool

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._turns = 0
        self._timers: list[tuple[float, int, Due | asyncio.Future[None]]] = []
        self._timed = 0

    def time(self) -> float:
        return self._now

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        timer = Due(when, callback, args, self, context)
        self._timed += 1  # of two timers for one moment the older one is first
        heappush(self._timers, (when, self._timed, timer))
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        handle = Due(self._now, callback, args, self, context)
        self._ready.append(handle)
        return handle

    def alarm(self, when: float) -> asyncio.Future[None]:
        """A future that is done then, unless it is before: for whoever waits, most of all timers,
        half the work of a callback that would set it."""
        future: asyncio.Future[None] = asyncio.Future(loop=self)
        self._timed += 1
        heappush(self._timers, (when, self._timed, future))
        return future

    async def pause(self, seconds: float) -> None:
        """As ``asyncio.sleep``."""
        await (self.alarm(self._now + seconds) if seconds > 0 else asyncio.sleep(0))

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def _run_once(self) -> None:
        """Turn after turn until the loop is to stop; asyncio asks for one, but any number will do.
        A turn is what is ready now, or the timers of the next moment for which there are any."""
        ready, timers = self._ready, self._timers
        while True:
            if ready:
                self._turns += 1
                if self._turns > MOST_TURNS:
                    raise Stuck(f"livelock: {MOST_TURNS} turns at {self._now:.3f} s")
            elif not self._stopping:
                self._jump()
            now = self._now
            while timers and timers[0][0] <= now:
                timer = heappop(timers)[2]
                if type(timer) is Due:
                    if not timer._cancelled:
                        ready.append(timer)
                elif not timer.done():
                    timer.set_result(None)
            for _ in range(len(ready)):
                handle = ready.popleft()
                if not handle._cancelled:
                    try:
                        handle._context.run(handle._callback, *handle._args)
                    except (SystemExit, KeyboardInterrupt):
                        raise
                    except BaseException as error:
                        self._failed(handle, error)
            if self._stopping:
                return

    def _failed(self, handle: asyncio.Handle, error: BaseException) -> None:
        what = f"a callback raised {error!r}"
        self.call_exception_handler({"message": what, "exception": error, "handle": handle})

    def _jump(self) -> None:
        """To the next timer that still counts."""
        timers = self._timers
        while timers and _is_over(timers[0][2]):
            heappop(timers)
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


def _is_over(timer: Due | asyncio.Future[None]) -> bool:
    return timer._cancelled if type(timer) is Due else timer.done()


class VirtualClock:
    """``core.clock.Clock`` on a virtual loop; the wall clock may be set wrong by ``jump_s``."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.jump_s = 0.0

    def now(self) -> float:
        return EPOCH_S + self._loop.time() + self.jump_s

    def monotonic(self) -> float:
        return self._loop.time()

    def sleep(self, seconds: float) -> Coroutine[Any, Any, None]:
        return self._loop.pause(seconds)
