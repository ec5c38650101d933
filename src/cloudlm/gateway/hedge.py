"""A second attempt beside a first that is slow to speak; the first that speaks is the answer.

What it adds is bounded by a budget (``retry.HedgeBudget``), because when everything is slow, asking
twice makes it slower (Dean and Barroso, "The Tail at Scale", 2013). The attempt that loses is
cancelled at its replica and leaves a ledger row as such. Must not choose or send.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from cloudlm.core.errors import RequestCancelled
from cloudlm.gateway.interrupt import Interrupt

T = TypeVar("T")


class Race:
    """Attempts at one request beside each other. The exchange's own interrupt waits for them all,
    so each of them has one of its own, which nobody cuts: the race cancels them."""

    def __init__(self) -> None:
        self._decided = False

    def claim(self) -> None:
        """The caller has an answer and wins, if nobody did before. Raises RequestCancelled."""
        if self._decided:
            raise RequestCancelled("another replica was quicker")
        self._decided = True


async def quickest(
    first: Coroutine[Any, Any, T],
    second: Callable[[], Coroutine[Any, Any, T] | None],
    after_s: float,
    interrupt: Interrupt,
    discard: Callable[[T], Awaitable[None]],
) -> T:
    """The result of ``first``; if it has none ``after_s`` later, that of it and ``second`` which
    comes first. ``second`` is None if there shall be none.

    Raises the last one's error if all fail, and what cuts ``interrupt``; ``discard`` is then given
    a result that nobody takes.
    """
    tasks = [asyncio.create_task(first)]
    try:
        with interrupt:
            done, _ = await asyncio.wait(tasks, timeout=after_s)
            if not done and (other := second()) is not None:
                tasks.append(asyncio.create_task(other))
            result = await _first_result(tasks)
        await _end(tasks)
        return result
    except BaseException:
        await _end(tasks)
        for task in tasks:
            if not task.cancelled() and task.exception() is None:
                await discard(task.result())
        raise


async def _first_result(tasks: list[asyncio.Task[T]]) -> T:
    """Of those that end in the same turn the one that began first, for a set has no order."""
    running = set(tasks)
    while True:
        ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        done = [task for task in tasks if task in ended]
        good = [task for task in done if task.exception() is None]
        if good:
            return good[0].result()
        if not running:
            return done[-1].result()


async def _end(tasks: list[asyncio.Task[T]]) -> None:
    """Cancel what still runs and see it end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
