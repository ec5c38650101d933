"""Machines rented as production decides: ``control.place`` has chosen their kinds, and
``control.spot.decide`` is asked at every pass of control how many stand in which zone, on spot and
on demand. They start, are paid for from the order on, and are taken away.

Plays the part of the providers and of a driver that rents from them. A machine loads the version
that is asked for as soon as it is there, so that one to spare takes over a replica whose machine is
lost at once. Must not decide where machines stand or how many.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from cloudlm.control.place import least_taken
from cloudlm.control.spot import SpotFacts, SpotTarget, ZoneRecord, decide
from cloudlm.sim.figures import Figures
from cloudlm.sim.ground import Berth, Zone
from cloudlm.sim.placing import Kind, Placed, zone_name
from cloudlm.sim.rented import Rent, Rented, Slot
from cloudlm.sim.timeline import Timeline

if TYPE_CHECKING:
    from cloudlm.sim.fleet import Unit

RETRY_S = 0.5
REFUSED_S = 60.0
"""A zone that refused an order is not asked again before."""


class Machines:
    """All machines of one simulation, a ground for its fleet. ``decides``: whether there is a
    control that would."""

    bills_replicas = False
    retry_s = RETRY_S

    def __init__(self, timeline: Timeline, placed: Placed, decides: Callable[[], bool]) -> None:
        self._timeline = timeline
        self._placed = placed
        self._decides = decides
        self.rented: list[Rented] = []
        self._berths: dict[str, tuple[Rented, Slot]] = {}
        self._losses: defaultdict[str, list[float]] = defaultdict(list)
        self._refusals: defaultdict[str, list[float]] = defaultdict(list)
        self._closed: Counter[str] = Counter()
        self._dry: Counter[str] = Counter()
        self._model = ""
        self._slower = 1.0
        self.rent = Rent()
        self.needed: Callable[[], int] = lambda: 0
        """How many replicas there are to be; the fleet says so."""
        self.lose: Callable[[str], None] = lambda unit: None
        """Has the process of a replica end with its machine."""
        self.move: Callable[[str], None] = lambda unit: None
        """Has a replica end its requests and go to another machine."""

    # As a ground ---------------------------------------------------------------------------------

    def take(self, unit: Unit, slower: float) -> Berth | None:
        """The slot that serves soonest; of equals one on spot, for those cost less."""
        self._model, self._slower = unit.version.model, slower
        found = self._soonest()
        if found is None:
            self.decide()
            found = self._soonest()
        if found is None:
            return None
        rented, slot = found
        figures = self._figures(rented.kind, unit)
        wait_s = max(0.0, slot.loaded_at - self._timeline.now)
        if slot.model != unit.version.model:
            wait_s, slot.model = figures.start_s * slower, unit.version.model
        slot.unit = unit.id
        self._berths[unit.id] = found
        price = rented.price / len(rented.slots)
        return Berth(Zone(rented.place, price), figures, wait_s)

    def leave(self, unit: Unit) -> None:
        """Its process has ended; on a machine that stays the next one loads."""
        rented, slot = self._berths.pop(unit.id)
        slot.unit = ""
        slot.loaded_at = self._timeline.now + self._placed.usual.start_s * self._slower
        if rented.leaving and not rented.units and not rented.gone:
            self._end(rented)

    def look(self, slower: float) -> None:
        """Ask production's rule anew."""
        self._slower = slower
        self.decide()

    def close(self, zone: str) -> None:
        """A zone is lost with all that is there."""
        self._closed[zone] += 1
        for rented in [one for one in self.rented if one.place == zone]:
            self._lost(rented)

    def open(self, zone: str) -> None:
        self._closed[zone] -= 1

    def free(self) -> int:
        """How many replicas more would serve at once."""
        now = self._timeline.now
        return sum(slot.loaded_at <= now for _, slot in self._free())

    # What providers do ---------------------------------------------------------------------------

    def on_spot(self, zone: str = "") -> list[Rented]:
        """Machines that may be taken away, in a zone if one is named."""
        return [
            one for one in self.rented if one.on_spot and not one.warned and zone in ("", one.place)
        ]

    def preempt(self, rented: Rented, notice_s: float) -> None:
        """A provider takes a machine back, ``notice_s`` after it says so."""
        if notice_s <= 0:
            self._lost(rented)
            return
        rented.warned = True
        self._timeline.after(notice_s, self._lost, rented)
        self.decide()
        for unit in rented.units:
            self.move(unit)

    def dry_up(self, zone: str, notice_s: float) -> None:
        """No machine on spot is to be had in a zone, and those there are taken away."""
        self._dry[zone] += 1
        for rented in self.on_spot(zone):
            self.preempt(rented, notice_s)

    def fill_up(self, zone: str) -> None:
        """There are machines on spot again."""
        self._dry[zone] -= 1

    def _lost(self, rented: Rented) -> None:
        if rented.gone:
            return
        if rented.on_spot:
            self._losses[_record(rented.kind, rented.zone)].append(self._timeline.now)
            self.rent.lost += 1
        units = rented.units
        self._end(rented)
        for unit in units:
            self.lose(unit)

    # What production decides ---------------------------------------------------------------------

    def decide(self) -> None:
        """Ask production's rule and do as it says."""
        if not self._decides():
            return
        counts = self._placed.machines_for(self.needed())
        for kind, needed in zip(self._placed.kinds, counts, strict=True):
            facts = SpotFacts(needed, tuple(self._records(kind)), kind.on_demand)
            target = decide(facts, self._timeline.now, self._placed.rules)
            self._order(kind, target)
            self._give_back(kind, target)

    def _records(self, kind: Kind) -> Iterator[ZoneRecord]:
        for zone, price in sorted(kind.offer.spot.items()):
            ours = [one for one in self._standing(kind) if one.on_spot and one.zone == zone]
            yield ZoneRecord(
                zone,
                price,
                ready=sum(one.ready for one in ours),
                pending=sum(not one.ready and not one.warned for one in ours),
                warned=sum(one.ready and one.warned for one in ours),
                losses=tuple(self._losses[_record(kind, zone)]),
                refusals=tuple(self._refusals[_record(kind, zone)]),
            )

    def _order(self, kind: Kind, target: SpotTarget) -> None:
        """Rent what is missing."""
        now = self._timeline.now
        for zone, count in target.spot.items():
            there = [o for o in self._staying(kind) if o.on_spot and o.zone == zone]
            for _ in range(count - len(there)):
                refusals = self._refusals[_record(kind, zone)]
                if refusals and now < refusals[-1] + REFUSED_S:
                    break
                if self._refuses(zone_name(kind.offer, zone)):
                    refusals.append(now)
                    self.rent.refused += 1
                    break
                self._launch(kind, zone, on_spot=True)
        staying = [one for one in self._staying(kind) if not one.on_spot]
        taken = Counter((one.kind.offer.place, one.zone) for one in self.rented)
        closed = [z for z in kind.offer.zones if self._closed[zone_name(kind.offer, z)] > 0]
        more = least_taken(kind.offer, target.on_demand - len(staying), taken, closed)
        for zone, count in more.items():
            for _ in range(count):
                self._launch(kind, zone, on_spot=False)

    def _give_back(self, kind: Kind, target: SpotTarget) -> None:
        """End what is too much: what bears no replica at once, the others once theirs have gone to
        machines that stand ready."""
        wanted = {zone: target.spot.get(zone, 0) for zone in kind.offer.spot}
        for zone, count in wanted.items():
            ours = [o for o in self._staying(kind) if o.on_spot and o.zone == zone]
            self._end_beyond(ours, count)
        self._end_beyond([o for o in self._staying(kind) if not o.on_spot], target.on_demand)

    def _end_beyond(self, ours: list[Rented], count: int) -> None:
        ours.sort(key=lambda one: (bool(one.units), one.ready, -one.began_at))
        for rented in ours[: max(0, len(ours) - count)]:
            if rented.units and not self._can_move(rented):
                return  # the others bear as many
            rented.leaving = True
            if not rented.units:
                self._end(rented)
            for unit in rented.units:
                self.move(unit)

    def _can_move(self, rented: Rented) -> bool:
        """Whether a machine's replicas would serve elsewhere at once, beside all that are to move
        already."""
        moving = sum(len(one.units) for one in self.rented if one.leaving or one.warned)
        return self.free() - sum(not o.unit for o in rented.slots) >= moving + len(rented.units)

    def _standing(self, kind: Kind) -> list[Rented]:
        """Machines of a kind that are not to be given back."""
        return [one for one in self.rented if one.kind is kind and not one.leaving]

    def _staying(self, kind: Kind) -> list[Rented]:
        """Those of them that are not taken away soon."""
        return [one for one in self._standing(kind) if not one.warned]

    def _refuses(self, zone: str) -> bool:
        return self._dry[zone] > 0 or self._closed[zone] > 0

    # Machines ------------------------------------------------------------------------------------

    def _launch(self, kind: Kind, zone: str, *, on_spot: bool) -> None:
        now = self._timeline.now
        loaded_at = now + self._placed.usual.start_s * self._slower
        slots = [Slot(loaded_at, self._model) for _ in range(kind.machine.replicas)]
        rented = Rented(kind, zone, slots, now, on_spot=on_spot)
        self.rented.append(rented)
        self.rent.ordered += 1
        if loaded_at <= now:
            rented.ready = True
        else:
            self._timeline.at(loaded_at, self._loaded, rented)

    def _loaded(self, rented: Rented) -> None:
        if not rented.gone:
            rented.ready = True

    def _end(self, rented: Rented) -> None:
        rented.gone = True
        self._bill(rented)
        self.rented.remove(rented)

    def _soonest(self) -> tuple[Rented, Slot] | None:
        """The free slot that is loaded first."""
        now = self._timeline.now
        return min(
            self._free(),
            key=lambda found: (max(found[1].loaded_at, now), not found[0].on_spot),
            default=None,
        )

    def _free(self) -> Iterator[tuple[Rented, Slot]]:
        for rented in self.rented:
            if not (rented.leaving or rented.warned):
                yield from ((rented, slot) for slot in rented.slots if not slot.unit)

    def _figures(self, kind: Kind, unit: Unit) -> Figures:
        """Those of the unit's version on a machine: so many times as quick as the usual one."""
        usual, own = self._placed.usual, unit.version.figures
        if own == usual:
            return kind.figures
        quicker = kind.figures.faster(usual.step.base_s / own.step.base_s)
        return replace(quicker, start_s=own.start_s)

    # Accounts ------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Count what is rented until now."""
        for rented in self.rented:
            self._bill(rented)

    def _bill(self, rented: Rented) -> None:
        now = self._timeline.now
        hours = (now - rented.billed_from) / 3600.0
        rented.billed_from = now
        if rented.on_spot:
            self.rent.spot_h += hours
            self.rent.spot_usd += hours * rented.price
        else:
            self.rent.on_demand_h += hours
            self.rent.on_demand_usd += hours * rented.price


def _record(kind: Kind, zone: str) -> str:
    """Under what a zone's record is kept: machines of one kind run short apart from others."""
    return f"{kind.offer.key}/{zone}"
