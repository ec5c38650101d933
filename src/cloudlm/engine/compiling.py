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
from typing import Any, TypeVar

from cloudlm.core.errors import InternalError, InvalidRequest, Overloaded

COMPILE_TIMEOUT_S = 5.0
"""Longest that a constraint may be compiled, seconds; longer is too complex."""

TURN_TIMEOUT_S = 5.0
"""Longest wait until it is begun, seconds; what takes longer are others."""

MAX_COMPILING = 64
"""Constraints that may wait for the thread; more are refused with 503."""

T = TypeVar("T")


class Compiling:
    """The thread, started at the first ``run``. Used from event loops.

    It has a line of its own: of whom the executor cancels it would keep the work, and all that
    belongs to it, until the thread comes by.
    """

    def __init__(
        self, timeout_s: float = COMPILE_TIMEOUT_S, turn_timeout_s: float = TURN_TIMEOUT_S
    ) -> None:
        self.timeout_s = timeout_s
        self.turn_timeout_s = turn_timeout_s
        self._line: dict[Future[Any], Callable[[], None]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._asked = False  # the thread works, or is about to
        self._working = False
        self._closed = False
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Those that wait to be begun, and the one whose work has not ended, wanted or not."""
        return len(self._line) + self._working

    async def run(self, make: Callable[[], T], *, limited: bool = True) -> T:
        """What ``make`` returns in the thread, or raises. What is not ``limited`` is waited for as
        long as it takes: work of our own, at which no constraint is looked at.

        Raises Overloaded (too many, or too slow ones, come before it), InvalidRequest (it took too
        long), InternalError (closed, before or meanwhile). What nobody waits for any more is not
        begun.
        """
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def told() -> T:
            _tell(loop, begun.set)
            return make()

        work = self._enter(told)
        work.add_done_callback(lambda _: _tell(loop, begun.set))  # it may end without
        try:
            await self._turn(work, begun, self.turn_timeout_s if limited else None)
            async with asyncio.timeout(self.timeout_s if limited else None):
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
        """Stop the thread after what it is doing. Nothing is begun any more."""
        with self._lock:
            self._closed = True
            given_up = list(self._line)
            if self._pool is not None:
                self._pool.shutdown(wait=False)
        for work in given_up:
            work.cancel()

    async def _turn(self, work: Future[T], begun: asyncio.Event, timeout_s: float | None) -> None:
        """Wait until ``work`` is begun or will never be."""
        try:
            async with asyncio.timeout(timeout_s):
                await begun.wait()
        except TimeoutError:
            if work.cancel():
                raise _crowded() from None
        if work.cancelled():
            raise _closed()

    def _enter(self, make: Callable[[], T]) -> Future[T]:
        """Put it at the line's end. Raises Overloaded, InternalError."""
        work: Future[T] = Future()
        work.add_done_callback(self._forget)
        with self._lock:
            if self._closed:
                raise _closed()
            if self.waiting >= MAX_COMPILING:
                raise _crowded()
            self._line[work] = lambda: _do(work, make)
            if not self._asked:
                self._asked = True
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(1, thread_name_prefix="cloudlm-constraint")
                self._pool.submit(self._work)
        return work

    def _forget(self, work: Future[Any]) -> None:
        with self._lock:
            self._line.pop(work, None)

    def _work(self) -> None:
        """In the thread: one after the other, until nobody waits."""
        while (do := self._next()) is not None:
            do()

    def _next(self) -> Callable[[], None] | None:
        with self._lock:
            self._working = self._asked = bool(self._line)
            return self._line.pop(next(iter(self._line))) if self._line else None


def _do(work: Future[T], make: Callable[[], T]) -> None:
    if not work.set_running_or_notify_cancel():
        return
    try:
        made = make()
    except BaseException as error:  # whoever waits is told
        work.set_exception(error)
    else:
        work.set_result(made)


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)


def _closed() -> InternalError:
    return InternalError("the engine was closed")


def _crowded() -> Overloaded:
    return Overloaded("too many constraints are being compiled", retry_after_s=1.0)
