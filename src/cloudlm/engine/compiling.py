"""One thread that compiles constraints one after the other, and how long anybody waits for it.

What is compiled may be somebody's attempt to hold up others. So a caller waits a limited time for
its turn and a limited time for the work itself, and the two ends differ: the first may be asked
again, the second is too complex. Must not know constraints or torch.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from cloudlm.core.errors import InternalError, InvalidRequest, Overloaded

COMPILE_TIMEOUT_S = 5.0
"""Longest that a constraint may be compiled, seconds; longer is too complex."""

TURN_TIMEOUT_S = 5.0
"""Longest wait until it is begun, seconds; what takes longer are others."""

MAX_COMPILING = 64
"""Constraints that may wait for the thread; more are refused with 503."""

T = TypeVar("T")


class Compiling:
    """The thread, started at the first ``run``. Used from event loops."""

    def __init__(
        self, timeout_s: float = COMPILE_TIMEOUT_S, turn_timeout_s: float = TURN_TIMEOUT_S
    ) -> None:
        self.timeout_s = timeout_s
        self.turn_timeout_s = turn_timeout_s
        self.waiting = 0
        """Those whose work has not ended, wanted or not."""
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    async def run(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the thread, or raises.

        Raises Overloaded (too many, or too slow ones, come before it), InvalidRequest (it took too
        long), InternalError (closed meanwhile). What nobody waits for any more is not begun.
        """
        if self.waiting >= MAX_COMPILING:
            raise _crowded()
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def told() -> T:
            _tell(loop, begun.set)
            return make()

        work = self._threads().submit(told)
        self.waiting += 1
        work.add_done_callback(lambda _: _tell(loop, lambda: self._settled(begun)))
        try:
            await self._turn(work, begun)
            async with asyncio.timeout(self.timeout_s):
                return await asyncio.wrap_future(work)
        except asyncio.CancelledError:
            work.cancel()
            raise
        except TimeoutError:
            raise InvalidRequest(
                f"the constraint is too complex: it was not compiled within {self.timeout_s:g} s; "
                "make the schema, expression or grammar simpler"
            ) from None

    def close(self) -> None:
        """Stop the thread after what it is doing."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)

    async def _turn(self, work: Future[T], begun: asyncio.Event) -> None:
        """Wait until ``work`` is begun or will never be."""
        try:
            async with asyncio.timeout(self.turn_timeout_s):
                await begun.wait()
        except TimeoutError:
            if work.cancel():
                raise _crowded() from None
        if work.cancelled():
            raise InternalError("the engine was closed")

    def _settled(self, begun: asyncio.Event) -> None:
        self.waiting -= 1
        begun.set()  # it may have ended without

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="cloudlm-constraint")
            return self._pool


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)


def _crowded() -> Overloaded:
    return Overloaded("too many constraints are being compiled", retry_after_s=1.0)
