"""Virtual time: a heap of what is to happen, done in order of time, then of being asked for.

Must not read a real clock: an hour of a fleet takes as long as its events take to compute. Wall
time, which dates reports, is told apart from the time that durations are measured in, so that a
clock may jump as it does on machines.
"""

from __future__ import annotations

import gc
import heapq
import math
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
EPOCH = 1_700_000_000.0
"""The wall time at which every simulation begins, Unix seconds."""
COLLECT_AFTER = 200_000
"""New objects after which the garbage collector looks."""


class Timeline:
    """``now`` is seconds since the simulation began. What is asked for can not be taken back: who
    asks looks at its own state again when it is called."""

    __slots__ = ("_heap", "_order", "events", "now", "stopped")

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self.stopped = False
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0

    def at(self, time: float, action: Callable[..., None], *arguments: Any) -> None:
        """Do ``action`` at ``time``, seconds; what lies behind is done now."""
        self._order += 1
        now = self.now
        heapq.heappush(self._heap, (time if time > now else now, self._order, action, arguments))

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Do ``action`` in ``delay_s`` seconds."""
        self.at(self.now + delay_s, action, *arguments)

    def go(self, task: Coroutine[float, None, None]) -> None:
        """Run a coroutine that waits with a ``WallClock`` alone, in virtual time."""
        try:
            seconds = task.send(None)
        except StopIteration:
            return
        self.after(seconds, self.go, task)

    def run(self, until: float = math.inf) -> None:
        """Do everything up to ``until``, or until somebody sets ``stopped``."""
        heap = self._heap
        while heap and heap[0][0] <= until and not self.stopped:
            self.now, _, action, arguments = heapq.heappop(heap)
            action(*arguments)
            self.events += 1


class WallClock:
    """One process's clock on a timeline (the port ``core.clock.Clock``): who sleeps is run by the
    timeline (``Timeline.go``)."""

    __slots__ = ("_timeline", "ahead_s")

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self.ahead_s = 0.0
        """How far its wall time is wrong, seconds."""

    def now(self) -> float:
        return EPOCH + self._timeline.now + self.ahead_s

    def monotonic(self) -> float:
        return self._timeline.now

    async def sleep(self, seconds: float) -> None:
        await _Sleep(seconds)


class _Sleep:
    """Tells the timeline that runs a coroutine how long to wait."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __await__(self) -> Generator[float, None, None]:
        yield self._seconds


def at_once(task: Coroutine[Any, Any, T]) -> T:
    """What a coroutine gives that waits for nothing."""
    try:
        task.send(None)
    except StopIteration as end:
        found: T = end.value
        return found
    task.close()
    raise AssertionError("it waits: have a timeline run it")


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Events and requests are in no cycles, so that looking for cycles among them is in vain; done
    as often as usual it took 7 % of the time of a large fleet."""
    usual = gc.get_threshold()
    gc.set_threshold(COLLECT_AFTER, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
