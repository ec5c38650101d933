"""Looks out for replicas that requests wait for: the moment that one is ready begins a pass.

Each is asked once, and answers when it is ready; before its port is open it is asked again and
again, which costs less than whole passes of the loop. Must not judge a replica or write anything:
the pass that begins does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Protocol

from cloudlm.core.clock import Clock

ANSWER_WITHIN_S = 30.0
"""How long a replica that starts may keep its answer to itself."""
AGAIN_S = 0.05
"""How soon to ask again who does not answer or cannot wait."""


class Asker(Protocol):
    """Asks one replica."""

    async def ready(self, url: str, within_s: float) -> bool:
        """Whether it is ready, as soon as it is and after so many seconds at most. Never raises; a
        replica that does not answer is not ready."""
        ...


class Lookout:
    """``call`` is called whenever a replica has become ready."""

    def __init__(self, asker: Asker, clock: Clock, call: Callable[[], None]) -> None:
        self._asker = asker
        self._clock = clock
        self._call = call
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def mind(self, urls: Collection[str]) -> None:
        """Look out for the replicas at these addresses, and for no others. One that was seen to be
        ready is not looked out for again as long as it is among them."""
        for url in [one for one in self._tasks if one not in urls]:
            self._tasks.pop(url).cancel()
        for url in urls:
            if url not in self._tasks:
                self._tasks[url] = asyncio.create_task(self._look_out(url))

    def minds(self, url: str) -> bool:
        """Whether ``call`` will tell of this one."""
        task = self._tasks.get(url)
        return task is not None and not task.done()

    async def close(self) -> None:
        """Look out for nobody any more."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look_out(self, url: str) -> None:
        while not await self._asker.ready(url, ANSWER_WITHIN_S):
            await self._clock.sleep(AGAIN_S)
        self._call()
