"""When a request may be tried again or twice at once, and how long to wait: budgets and jitter.

Pure: ``now`` and the random fraction are arguments. A budget bounds what retries can add to a
failing fleet (Google SRE book, "Handling Overload": a retry budget per client); full jitter
(AWS Architecture Blog, "Exponential Backoff And Jitter") spreads them over time.
"""

from __future__ import annotations

from collections import deque

BUDGET_SHARE = 0.2
BUDGET_FLOOR = 3
WINDOW_S = 60.0
REQUESTS_PER_HEDGE = 20
"""Hedges are at most 5 % of requests."""
MOST_HEDGES_SAVED = 10
_SLICE_S = 5.0
_BASE_WAIT_S = 0.05
_LONGEST_WAIT_S = 1.0


class RetryBudget:
    """Retries of one model: at most 20 % of its requests in the last minute, but 3 always."""

    def __init__(self) -> None:
        self._slices: deque[list[float]] = deque()  # [begin, requests, retries]
        self._requests = 0
        self._retries = 0

    def count_request(self, now: float) -> None:
        """Count a request (not its retries)."""
        self._slice(now)[1] += 1
        self._requests += 1

    def take(self, now: float) -> bool:
        """Count a retry and return True if the budget allows one."""
        current = self._slice(now)
        if self._retries + 1 > max(BUDGET_FLOOR, BUDGET_SHARE * self._requests):
            return False
        current[2] += 1
        self._retries += 1
        return True

    def _slice(self, now: float) -> list[float]:
        while self._slices and self._slices[0][0] <= now - WINDOW_S:
            _, requests, retries = self._slices.popleft()
            self._requests -= int(requests)
            self._retries -= int(retries)
        if not self._slices or self._slices[-1][0] <= now - _SLICE_S:
            self._slices.append([now, 0, 0])
        return self._slices[-1]


class HedgeBudget:
    """Hedges of one model: each request earns a twentieth of one, and at most ten are saved up."""

    def __init__(self) -> None:
        self._twentieths = 0

    def count_request(self) -> None:
        """Count a request (not its hedge)."""
        most = MOST_HEDGES_SAVED * REQUESTS_PER_HEDGE
        self._twentieths = min(self._twentieths + 1, most)

    def take(self) -> bool:
        """Take one hedge and return True if the budget allows one."""
        if self._twentieths < REQUESTS_PER_HEDGE:
            return False
        self._twentieths -= REQUESTS_PER_HEDGE
        return True


def full_jitter(retry: int, fraction: float) -> float:
    """Seconds to wait before the ``retry``-th retry (from 1); ``fraction`` is uniform in [0, 1)."""
    return fraction * min(_LONGEST_WAIT_S, _BASE_WAIT_S * 2.0 ** (retry - 1))
