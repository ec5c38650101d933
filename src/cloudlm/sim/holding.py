"""Requests held for a first replica, in virtual time: when ``gateway.waiting`` looks, and at what.

The first report of a herd waits a moment for the rest of it; then the gateway is told of each write
of endpoints, as by ``state.news``, and looks often only where no write tells: while control could
not be told, and while requests wait at replicas that are there. Must not decide when that is over:
its gateway asks ``gateway.capacity``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from cloudlm.gateway.waiting import GATHER_S
from cloudlm.sim.timeline import Timeline
from cloudlm.state.news import LOOK_S, SELDOM_S, SETTLE_S


class Holding:
    """``look`` is called while requests are held, told whether control knows of them, and says
    whether it does now; ``is_over`` whether that is enough, ``answers`` whether a replica is there.
    """

    def __init__(
        self,
        timeline: Timeline,
        look: Callable[[bool], bool],
        is_over: Callable[[], bool],
        answers: Callable[[], bool],
    ) -> None:
        self._timeline = timeline
        self._look = look
        self._is_over = is_over
        self._answers = answers
        self._holds = False
        self._told = False
        self._due = math.inf

    def begin(self) -> bool:
        """A request is held; whether it is the first."""
        if self._holds:
            return False
        self._holds, self._told = True, False
        self._within(GATHER_S)
        return True

    def news(self) -> None:
        """Endpoints were written."""
        if self._holds:
            self._within(SETTLE_S)

    def _within(self, delay_s: float) -> None:
        """Look so soon, if no earlier look is due."""
        due = self._timeline.now + delay_s
        if due < self._due:
            self._due = due
            self._timeline.at(due, self._again, due)

    def _again(self, due: float) -> None:
        if due != self._due:
            return  # an earlier one was asked for meanwhile
        self._due = math.inf
        self._told = self._look(self._told)
        if self._is_over():
            self._holds = False
        else:
            often = not self._told or self._answers()
            self._within(LOOK_S if often else SELDOM_S)
