"""Who may come in: requests in flight are counted and bounded; more are refused at once.

Pure: no I/O, no clock, no waiting. Refusing early keeps the answers of those inside quick; a
client that is told when to come back does better than one that waits in a hidden queue.
"""

from __future__ import annotations

from cloudlm.core.errors import Overloaded

RETRY_AFTER_S = 1.0


class Admission:
    """Counts requests in flight, per model and in all."""

    def __init__(self, max_ongoing: int) -> None:
        self._max_ongoing = max_ongoing
        self._by_model: dict[str, int] = {}
        self._total = 0

    @property
    def total(self) -> int:
        """Requests in flight."""
        return self._total

    def ongoing(self, model: str) -> int:
        """Requests in flight for one model."""
        return self._by_model.get(model, 0)

    def enter(self, model: str) -> None:
        """Take one place. Raises Overloaded when all are taken."""
        if self._total >= self._max_ongoing:
            raise Overloaded(
                f"the gateway has {self._total} requests in flight, its limit "
                "(gateway.max_ongoing_requests); try again shortly",
                retry_after_s=RETRY_AFTER_S,
            )
        self._total += 1
        self._by_model[model] = self._by_model.get(model, 0) + 1

    def leave(self, model: str) -> None:
        """Give the place back; exactly once per ``enter``."""
        left = self._by_model[model] - 1
        assert left >= 0
        self._total -= 1
        if left:
            self._by_model[model] = left
        else:
            del self._by_model[model]
