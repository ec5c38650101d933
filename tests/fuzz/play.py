"""Carries out one schedule on a loop of its own, and clears up behind it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.fuzz.loop import Stuck, VirtualLoop
from tests.fuzz.schedule import Schedule
from tests.fuzz.story import Story
from tests.fuzz.world import World

from cloudlm.gateway import exchange


@contextmanager
def _loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        yield loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def play(schedule: Schedule, home: Path) -> Story:
    """Carry out a schedule; ``home`` is an empty folder for the gateway's files."""
    random.seed(schedule.seed)
    exchange._ids.clear()  # drawn in the run before
    with _loop() as loop:
        world = None

        async def whole() -> None:
            nonlocal world
            world = World(schedule, loop, home)
            await world.run()

        task = loop.create_task(whole())
        try:
            loop.run_until_complete(task)
        except Stuck as stuck:
            assert world is not None
            world.story.note("deadlock", str(stuck))
        finally:
            _sweep(loop, task)
        assert world is not None
        return world.story


def _sweep(loop: VirtualLoop, task: asyncio.Task[None]) -> None:
    """End what a broken run left, so that nothing complains of it later."""
    left = [one for one in asyncio.all_tasks(loop) if not one.done()]
    for one in left:
        one.cancel()
    if left:
        with suppress(Stuck, RuntimeError):
            loop.run_until_complete(asyncio.wait(left, timeout=60.0))
    if task.done() and not task.cancelled():
        task.exception()
