"""Requests held for a first replica, in virtual time: when ``gateway.waiting`` looks, and at what.

The first report of a herd waits a moment for the rest of it; then the gateway looks for replicas
more often than usual until the herd is served. Must not decide when that is: its gateway asks
``gateway.capacity``.
"""

from __future__ import annotations

from collections.abc import Callable

from cloudlm.gateway.waiting import GATHER_S
from cloudlm.sim.timeline import Timeline
from cloudlm.state.news import LOOK_S


class Holding:
    """``look`` is called again and again while requests are held, told whether control knows of
    them, and says whether it does now; ``is_over`` whether that is enough."""

    def __init__(
        self, timeline: Timeline, look: Callable[[bool], bool], is_over: Callable[[], bool]
    ) -> None:
        self._timeline = timeline
        self._look = look
        self._is_over = is_over
        self._holds = False

    def begin(self) -> bool:
        """A request is held; whether it is the first."""
        if self._holds:
            return False
        self._holds = True
        self._timeline.after(GATHER_S, self._again, False)
        return True

    def _again(self, told: bool) -> None:
        told = self._look(told)
        if self._is_over():
            self._holds = False
        else:
            self._timeline.after(LOOK_S, self._again, told)
