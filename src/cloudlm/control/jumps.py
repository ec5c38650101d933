"""The wall clock's steps, told apart from time that passes: dates of roll-outs move with them.

Where a roll-out stands is kept with dates, which outlive control and select rows of the ledger; its
time limits are differences between them. So a step of the clock would be taken for time. Who lives
while it happens sees it, for the monotonic clock takes no part in it (nor, on Linux, in a machine's
sleep), and moves the dates along. Must not decide on roll-outs, nor write them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from cloudlm.core.clock import Clock
from cloudlm.core.rollout import Rollout

STEP_S = 5.0
"""What differs by less is drift, or a clock that is adjusted slowly."""


class Jumps:
    """What the dates of roll-outs have to be moved by, until somebody did."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._before: float | None = None
        self._owed: dict[str, float] = {}

    def look(self, names: Iterable[str]) -> None:
        """Note a step since the last look for the roll-outs of that time; call it once a pass."""
        offset_s = self._clock.now() - self._clock.monotonic()
        before, self._before = self._before, offset_s
        step_s = 0.0 if before is None else offset_s - before
        if abs(step_s) < STEP_S:
            step_s = 0.0
        self._owed = {name: self._owed.get(name, 0.0) + step_s for name in names}

    def moved(self, rollout: Rollout | None) -> Rollout | None:
        """A roll-out as it is kept, with its dates as they would be by the clock of now."""
        owed_s = 0.0 if rollout is None else self._owed.get(rollout.name, 0.0)
        return shifted(rollout, owed_s) if rollout is not None and owed_s else rollout

    def settle(self, name: str) -> None:
        """A roll-out was kept as ``moved`` gave it."""
        self._owed.pop(name, None)


def shifted(rollout: Rollout, by_s: float) -> Rollout:
    """All its dates so much later. What has no date yet gets none, and none gets to be no date."""
    began_at, since, paused_at = (
        max(date + by_s, 1.0) if date else 0.0
        for date in (rollout.began_at, rollout.since, rollout.paused_at)
    )
    return replace(rollout, began_at=began_at, since=since, paused_at=paused_at)
