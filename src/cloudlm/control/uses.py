"""Since when a deployment is used, waits, is in memory and starts: what ``residents`` remembers of
each. Must not decide anything by it.
"""

from __future__ import annotations

from dataclasses import dataclass

NEVER = float("-inf")


@dataclass(slots=True)
class Uses:
    """Monotonic seconds; None: it is not so now."""

    used_at: float = NEVER
    asked_at: float | None = None
    loaded_at: float | None = None
    began_at: float | None = None

    def note(self, now: float, *, asked: bool, answers: bool, present: bool) -> None:
        """What is seen of it now."""
        if asked:
            self.used_at = now
        self.loaded_at = _since(self.loaded_at, now) if answers else None
        self.asked_at = _since(self.asked_at, now) if asked and not present else None
        self.began_at = _since(self.began_at, now) if present and not answers else None


def _since(before: float | None, now: float) -> float:
    return now if before is None else before
