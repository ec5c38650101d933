"""Health judged by progress: an open port proves nothing, a moving step counter does.

Pure: gets the engine's counters and the time, and says whether steps stand still. Must not read a
clock or ask the engine itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloudlm.engine.api import EngineStats

OBSERVE_INTERVAL_S = 0.5
_LONGEST_BLINK_S = 2.0


@dataclass(frozen=True, slots=True)
class Health:
    """The verdict on an engine; ``fault`` says what is wrong, None if nothing is."""

    fault: str | None

    @property
    def good(self) -> bool:
        return self.fault is None


class Progress:
    """Watches the step counter; a standstill of ``limit_s`` seconds with work at hand is a stall.

    Observations should come every OBSERVE_INTERVAL_S. Time in which nobody observed (the whole
    process was stopped) is not held against the engine.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._steps = -1
        self._still_s = 0.0
        self._seen_at: float | None = None

    def observe(self, stats: EngineStats, now: float) -> Health:
        """``now`` is monotonic seconds."""
        elapsed_s = 0.0 if self._seen_at is None else now - self._seen_at
        self._seen_at = now
        if stats.steps != self._steps or not (stats.running or stats.waiting):
            self._steps = stats.steps
            self._still_s = 0.0
        else:
            self._still_s += min(elapsed_s, _LONGEST_BLINK_S)
        if not stats.alive:
            return Health("the engine has stopped")
        if self._still_s > self._limit_s:
            return Health(
                f"no step for {self._still_s:.1f} s with {stats.running} sequences running"
            )
        return Health(None)
