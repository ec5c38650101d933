"""Keeps what happens again and again from flooding the log: one line for each reason now and then,
which says how many there were since the last.

Pure: gets reasons and ``now``, and says whether to write. Must not write.
"""

from __future__ import annotations

from collections.abc import Hashable

INTERVAL_S = 10.0
MOST_REASONS = 1000
"""Reasons that are told apart at once; beyond, the oldest are forgotten."""


class Damper:
    """Lets a line through at most every ``interval_s`` for each reason, the first one at once."""

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._written: dict[Hashable, tuple[float, int]] = {}

    def take(self, reason: Hashable, now: float) -> int | None:
        """None if this one is not to be written; else how many there were of that reason since the
        last that was, this one included. ``now`` is monotonic seconds."""
        known = self._written.get(reason)
        if known is not None and now - known[0] < self._interval_s:
            self._written[reason] = known[0], known[1] + 1
            return None
        self._written.pop(reason, None)  # the order is that of writing
        self._written[reason] = now, 0
        if len(self._written) > MOST_REASONS:
            del self._written[next(iter(self._written))]
        return 1 if known is None else known[1] + 1
