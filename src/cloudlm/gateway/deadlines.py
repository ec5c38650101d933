"""Time limits for many connections at the price of one timer.

A timer of its own for each wait costs more than the wait's work. So every connection keeps the
moment it is *due*, and one sweep, some twenty times a second while there is any connection, asks
each whether its moment has passed. A limit may thus strike up to a sweep late. Must not know HTTP.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

SWEEP_INTERVAL_S = 0.05
NEVER = float("inf")


class Watched(Protocol):
    """What a sweep looks at."""

    def look(self, now: float) -> None:
        """Act on every limit that lies before ``now``, in the event loop's seconds."""
        ...


class Sweep:
    """Looks at everything that was added, again and again, until it is removed."""

    def __init__(self, interval_s: float = SWEEP_INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._watched: set[Watched] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._watched)

    def add(self, one: Watched) -> None:
        """Watch ``one`` from now on; call it inside the event loop."""
        self._watched.add(one)
        if self._timer is None:
            self._arm()

    def remove(self, one: Watched) -> None:
        """Watch it no more."""
        self._watched.discard(one)
        if not self._watched and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._look)

    def _look(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for one in list(self._watched):
            one.look(now)
        if self._watched and self._timer is None:
            self._arm()
