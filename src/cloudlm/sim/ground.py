"""Where replicas can stand: zones with a price that a scenario names. Machines of the catalogue are
another ground (``machines``).

Must not decide how many replicas there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cloudlm.sim.figures import Figures

if TYPE_CHECKING:
    from cloudlm.sim.fleet import Unit


@dataclass(frozen=True, slots=True)
class Zone:
    """A place for replicas. ``price_per_hour`` of one, in any currency; ``most`` it has room for
    (0: no bound)."""

    name: str
    price_per_hour: float = 0.0
    most: int = 0


@dataclass(frozen=True, slots=True)
class Berth:
    """A replica's place: it serves there after ``start_s``, as quick as ``figures`` say."""

    zone: Zone
    figures: Figures
    start_s: float


class Ground(Protocol):
    """What a fleet stands on. ``bills_replicas``: each costs the price of its zone while it is
    there; else the ground has an account of its own. ``retry_s``: when to ask again without room.
    """

    bills_replicas: bool
    retry_s: float

    def take(self, unit: Unit, slower: float) -> Berth | None:
        """A berth for a replica; None: there is none now. Starts take ``slower`` times as long."""
        ...

    def leave(self, unit: Unit) -> None:
        """A replica's process has ended."""
        ...

    def look(self, slower: float) -> None:
        """A pass of control has asked for what it wants."""
        ...

    def close(self, zone: str) -> None:
        """A zone is lost with all that is there."""
        ...

    def open(self, zone: str) -> None:
        """A zone is back."""
        ...


class Zones:
    """A scenario's own zones: each replica goes where fewest are, the first of equals."""

    bills_replicas = True
    retry_s = 5.0

    def __init__(self, zones: Sequence[Zone]) -> None:
        self._zones = tuple(zones)
        self._closed: Counter[str] = Counter()  # how many losses of each last
        self._counts: Counter[str] = Counter()

    def take(self, unit: Unit, slower: float) -> Berth | None:
        free = [one for one in self._zones if self._has_room(one)]
        if not free:
            return None
        zone = min(free, key=lambda one: self._counts[one.name])
        self._counts[zone.name] += 1
        figures = unit.version.figures
        return Berth(zone, figures, figures.start_s * slower)

    def leave(self, unit: Unit) -> None:
        if unit.zone is not None:
            self._counts[unit.zone.name] -= 1

    def look(self, slower: float) -> None:
        """Nothing is decided here."""

    def close(self, zone: str) -> None:
        self._closed[zone] += 1

    def open(self, zone: str) -> None:
        self._closed[zone] -= 1

    def _has_room(self, zone: Zone) -> bool:
        full = zone.most and self._counts[zone.name] >= zone.most
        return not full and self._closed[zone.name] == 0
