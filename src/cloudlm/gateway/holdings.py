"""A bounded store that tenants share: none can push another one's below its share.

Pure: gets facts and ``now``. Must not know what is held.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

V = TypeVar("V")


class Place(NamedTuple):
    """Where something is kept: whose it is, and its key."""

    tenant: str
    key: bytes


@dataclass(frozen=True, slots=True)
class _Held(Generic[V]):
    value: V
    until: float
    size_bytes: int


@dataclass(slots=True)
class _Holding(Generic[V]):
    """What one tenant has; what was not asked for the longest comes first."""

    held: OrderedDict[bytes, _Held[V]] = field(default_factory=OrderedDict)
    size_bytes: int = 0


class Holdings(Generic[V]):
    """Values by place, at most ``max_bytes`` together.

    While there is room, a tenant may have all of it. When there is none, each tenant that holds
    something has a share, ``max_bytes`` by weight (1 unless ``weights``, which may change, names
    the tenant). Who is over its share makes room out of its own; else the one does that is over by
    the most. So who is not over its share loses nothing. ``on_drop`` is told what goes, for
    whatever reason.
    """

    def __init__(
        self,
        max_bytes: int,
        weights: Mapping[str, float],
        on_drop: Callable[[Place, V], None] = lambda _place, _value: None,
    ) -> None:
        self._max_bytes = max_bytes
        self._weights = weights
        self._on_drop = on_drop
        self._holdings: dict[str, _Holding[V]] = {}
        self._by_age: OrderedDict[Place, None] = OrderedDict()
        self._all_weights = 0.0
        self.size_bytes = 0

    def get(self, place: Place, now: float) -> V | None:
        """The value at ``place`` that is still good at ``now``."""
        holding = self._holdings.get(place.tenant)
        held = holding.held.get(place.key) if holding is not None else None
        if holding is None or held is None:
            return None
        if now >= held.until:
            self.drop(place)
            return None
        holding.held.move_to_end(place.key)
        return held.value

    def put(self, place: Place, value: V, size_bytes: int, until: float, now: float) -> None:
        """Hold a value until ``until``, in the place of what was there."""
        self._drop_old(now)
        self.drop(place)
        holding = self._holdings.get(place.tenant)
        if holding is None:
            holding = self._holdings[place.tenant] = _Holding()
        holding.held[place.key] = _Held(value, until, size_bytes)
        holding.size_bytes += size_bytes
        self.size_bytes += size_bytes
        self._by_age[place] = None
        if self.size_bytes > self._max_bytes:
            self._weigh()
        while self.size_bytes > self._max_bytes:
            tenant = self._must_yield(place.tenant)
            self.drop(Place(tenant, next(iter(self._holdings[tenant].held))))

    def drop(self, place: Place) -> None:
        """Forget what is at ``place``, if anything is."""
        holding = self._holdings.get(place.tenant)
        held = holding.held.pop(place.key, None) if holding is not None else None
        if holding is None or held is None:
            return
        del self._by_age[place]
        holding.size_bytes -= held.size_bytes
        self.size_bytes -= held.size_bytes
        if not holding.held:
            del self._holdings[place.tenant]
            self._weigh()
        self._on_drop(place, held.value)

    def _must_yield(self, asking: str) -> str:
        """Who makes room for something of ``asking``."""
        if self._load(asking) > self._max_bytes / self._all_weights:
            return asking
        return max(self._holdings, key=self._load)

    def _weigh(self) -> None:
        """What ``_must_yield`` goes by: weights may have changed."""
        self._all_weights = sum(map(self._weight, self._holdings))

    def _load(self, tenant: str) -> float:
        return self._holdings[tenant].size_bytes / self._weight(tenant)

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def _drop_old(self, now: float) -> None:
        """What is past its time must not count for anybody's share."""
        while self._by_age:
            place = next(iter(self._by_age))
            if now < self._holdings[place.tenant].held[place.key].until:
                return
            self.drop(place)
