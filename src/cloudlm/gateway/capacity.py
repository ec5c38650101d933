"""How many requests each model takes at once: so many for each of its replicas. Pure.

``gate`` lets requests in by it, and the simulator's gateway does. A replica that was just started
for requests that were held must not get the whole herd: until nobody waits, its model is narrow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping


class Capacities:
    """``replica_capacity`` is what any replica takes at once."""

    def __init__(self, replica_capacity: int) -> None:
        self._replica_capacity = replica_capacity
        self._replicas: dict[str, int] = {}
        self._narrow: dict[str, int] = {}

    def follow(self, replicas: Mapping[str, int]) -> None:
        """So many replicas serve each model from now on."""
        self._replicas = dict(replicas)

    def narrow(self, model: str, at_once: int) -> None:
        """From now on each replica of ``model`` takes only so many."""
        self._narrow[model] = min(max(at_once, 1), self._replica_capacity)

    def widen(self, model: str) -> bool:
        """Each replica of ``model`` takes as many as any other's again; whether that changes it."""
        return self._narrow.pop(model, None) is not None

    def of(self, model: str) -> int:
        """Requests that all replicas of ``model`` take together; none for one that is unknown."""
        return self._narrow.get(model, self._replica_capacity) * self._replicas.get(model, 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._replicas)


def herd_is_over(queued: int, ongoing: int, *, answers: bool) -> bool:
    """Whether a model for which requests were held is as all others again: it ``answers`` (or is
    gone) and nobody waits, or nobody asks any more."""
    return not queued and (answers or not ongoing)
