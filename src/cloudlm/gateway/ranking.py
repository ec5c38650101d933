"""Large fleets: who is least loaded, kept in order, so that a choice does not look at everybody.

``router`` asks here when a deployment has many replicas. Nothing is decided otherwise than
``policies`` would: a property test compares. Heaps are put in order again only where something
changed; an entry that is no longer true is passed over. Pure.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container, Mapping
from typing import TYPE_CHECKING

from cloudlm.core.deployment import Endpoint
from cloudlm.core.routing import Policy
from cloudlm.gateway.policies import Facts, load_cost

if TYPE_CHECKING:
    from cloudlm.gateway.loads import Loads, ReplicaLoad

RANKED_FROM = 32
"""Replicas from which on this is quicker than looking at all."""

_Key = tuple[float, int, int]
_Order = Callable[["ReplicaLoad", int], _Key]


def _cold(load: ReplicaLoad, place: int) -> _Key:
    """Least cost, for a long prompt that the replica does not know."""
    return load_cost(load), load.cold_at, place


def _short(load: ReplicaLoad, place: int) -> _Key:
    """Least cost, for a short prompt."""
    return load_cost(load), load.chosen_at, place


def _fewest(load: ReplicaLoad, place: int) -> _Key:
    return float(load.ongoing), load.chosen_at, place


def _longest_ago(load: ReplicaLoad, place: int) -> _Key:
    return 0.0, load.chosen_at, place


class Ranking:
    """The replicas of one deployment, all of the same weight. ``touched`` are those of which
    something changed since the last question."""

    def __init__(self, endpoints: tuple[Endpoint, ...]) -> None:
        self.endpoints = endpoints
        first = endpoints[0]
        self.even = first.weight > 0 and all(
            (one.weight, one.priority) == (first.weight, first.priority) for one in endpoints
        )
        self.places = {one.replica: place for place, one in enumerate(endpoints)}
        self.touched: dict[str, None] = {}
        self._heaps: dict[_Order, tuple[list[_Key], list[_Key]]] = {}

    def first(self, order: _Order, loads: Loads, but: Container[str]) -> int:
        """The place of the first in ``order`` who is not in ``but``; somebody must be left."""
        self._follow(loads)
        heap, true = self._heaps.get(order) or self._sorted(order, loads)
        passed: list[_Key] = []
        while True:
            key = heap[0]
            place = key[2]
            if true[place] != key:
                heapq.heappop(heap)
            elif self.endpoints[place].replica in but:
                passed.append(heapq.heappop(heap))
            else:
                break
        for one in passed:
            heapq.heappush(heap, one)
        return place

    def _sorted(self, order: _Order, loads: Loads) -> tuple[list[_Key], list[_Key]]:
        true = [order(loads.of(one.replica), n) for n, one in enumerate(self.endpoints)]
        found = self._heaps[order] = (sorted(true), true)
        return found

    def _follow(self, loads: Loads) -> None:
        for replica in self.touched:
            place = self.places.get(replica)
            if place is None:
                continue
            load = loads.of(replica)
            for order, (heap, true) in self._heaps.items():
                key = order(load, place)
                if key != true[place]:
                    true[place] = key
                    heapq.heappush(heap, key)
        self.touched.clear()
        for order, (heap, _) in list(self._heaps.items()):
            if len(heap) > 8 * len(self.endpoints):
                self._sorted(order, loads)


def least_cost(ranking: Ranking, loads: Loads, facts: Facts, but: Container[str]) -> Endpoint:
    """As ``policies.least_cost``: of those who know the beginning each is looked at, of the others
    the first."""
    keys, endpoints = facts.keys, ranking.endpoints
    if not keys:
        return endpoints[ranking.first(_short, loads, but)]
    place = ranking.first(_cold, loads, but)
    load = loads.of(endpoints[place].replica)
    best = (len(keys) + load_cost(load), load.cold_at, place)
    for replica in loads.prefixes.holders(keys[0]):
        at = ranking.places.get(replica)
        if at is None or replica in but:
            continue
        known = loads.prefixes.known(replica, keys, facts.now)
        load = loads.of(replica)
        last = load.chosen_at if known else load.cold_at
        best = min(best, (len(keys) - known + load_cost(load), last, at))
    return endpoints[best[2]]


def least_load(ranking: Ranking, loads: Loads, _: Facts, but: Container[str]) -> Endpoint:
    """As ``policies.least_load``."""
    return ranking.endpoints[ranking.first(_fewest, loads, but)]


def round_robin(ranking: Ranking, loads: Loads, _: Facts, but: Container[str]) -> Endpoint:
    """As ``policies.round_robin``."""
    return ranking.endpoints[ranking.first(_longest_ago, loads, but)]


RANKED: Mapping[Policy, Callable[[Ranking, Loads, Facts, Container[str]], Endpoint]] = {
    Policy.LEAST_COST: least_cost,
    Policy.LEAST_LOAD: least_load,
    Policy.ROUND_ROBIN: round_robin,
}
