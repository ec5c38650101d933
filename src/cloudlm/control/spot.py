"""Where machines stand that the provider may take back, and what backs them. Pure.

``decide`` is asked again and again: facts and ``now`` in, a target per zone and a number on demand
out. The idea is SkyServe's SpotHedge (Mao et al., "SkyServe: Serving AI Models across Regions and
Clouds with Spot Instances", arXiv 2411.01438): spread over zones that fail apart from each other,
keep some to spare, fall back to machines on demand while spot is missing. Ours besides:

- a zone's record counts less as it ages (half after ``half_life_s``), and adds to the price that
  it is compared by what its losses cost: their rate times ``lost_s`` of a machine; after a loss or
  a refused launch it is left alone for a while, twice as long each time, unless too few other
  zones are open;
- no zone gets more than its share of an even spread, nor more than stand by to spare: losing any
  one zone then costs no capacity where there are enough zones;
- what runs stays where it is, and moves only to a zone that costs a twentieth less than what may go
  then, one machine at a time: the new one is ready before the old one goes. Two machines for one
  start are paid back within twenty;
- on demand stands in at once for what is missing of those needed; for a spare one only while no
  zone is open that may be expected to take it, for both would be ready at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

WORTH_MOVING = 0.95
_MOST_DOUBLINGS = 4


@dataclass(frozen=True, slots=True)
class ZoneRecord:
    """A zone as it is: dollars per machine and hour, machines ready and starting, those of the
    ready ones that were given notice, and the moments (seconds, any clock) of ``losses`` by
    preemption and of ``refusals`` to launch."""

    name: str
    price: float
    ready: int = 0
    pending: int = 0
    warned: int = 0
    losses: tuple[float, ...] = ()
    refusals: tuple[float, ...] = ()

    @property
    def staying(self) -> int:
        return max(0, self.ready - self.warned)


@dataclass(frozen=True, slots=True)
class SpotFacts:
    """``needed`` machines bear the load; ``on_demand_price`` is what one costs that stays."""

    needed: int
    zones: tuple[ZoneRecord, ...]
    on_demand_price: float


@dataclass(frozen=True, slots=True)
class SpotRules:
    """``share`` of what is needed may be on spot, with ``spare`` machines more; spread over
    ``min_zones`` at least where there are as many. A zone rests ``rest_s`` after it failed; a
    machine lost costs the price of ``lost_s``: the start of another, and moves there and back."""

    share: float = 1.0
    spare: int = 1
    min_zones: int = 1
    half_life_s: float = 7200.0
    rest_s: float = 600.0
    lost_s: float = 900.0


@dataclass(frozen=True, slots=True)
class SpotTarget:
    """Machines wanted: by zone on spot (zones that are not named: none), and on demand."""

    spot: Mapping[str, int] = field(default_factory=dict)
    on_demand: int = 0


def decide(facts: SpotFacts, now: float, rules: SpotRules = SpotRules()) -> SpotTarget:
    """What should stand where, from ``now`` until asked again.

    What stays on spot and what is on demand together are never below ``needed``: a machine that is
    starting, was given notice, or will be stopped by this very target is not counted. The spare
    ones are replaced on demand only where no open zone takes them.
    """
    on_spot = math.floor(rules.share * facts.needed + 1e-9)
    worth = [zone for zone in facts.zones if zone.price < facts.on_demand_price]
    if not on_spot or not worth:
        return SpotTarget({}, facts.needed)
    cost = {zone.name: zone.price * (1 + _risk(zone, now, rules)) for zone in worth}
    least = max(2, rules.min_zones)
    opened = _open(worth, now, rules, least)
    running = {zone.name: zone.staying for zone in worth if zone.staying}
    names = sorted(
        {zone.name for zone in opened} | set(running), key=lambda name: (cost[name], name)
    )
    launches = {zone.name for zone in opened}
    total = on_spot + rules.spare
    target = spread(total, names, rules, running=running, launches=launches)
    if sum(running.values()) == total and target == running:
        moved = _moved(running, names, launches, cost, rules)
        target = target if moved is None else running | {moved: running.get(moved, 0) + 1}
    stays = sum(min(zone.staying, target.get(zone.name, 0)) for zone in worth)
    coming = _coming(worth, target, now, rules)
    missing = max(on_spot - stays, total - stays - coming, 0)
    return SpotTarget(target, facts.needed - on_spot + min(on_spot, missing))


def _coming(
    zones: Sequence[ZoneRecord], target: Mapping[str, int], now: float, rules: SpotRules
) -> int:
    """Machines that start or are launched by this target where launches may be expected to work."""
    return sum(
        max(0, target.get(zone.name, 0) - zone.staying)
        for zone in zones
        if _rests_until(zone, now, rules) <= now
    )


def _moved(
    running: Mapping[str, int],
    names: Sequence[str],
    launches: set[str],
    cost: Mapping[str, float],
    rules: SpotRules,
) -> str | None:
    """The cheapest zone for one machine more that takes the place of one that costs enough more.
    As soon as it is ready there is one too many: only if ``spread`` then stops the dearer one is
    anything won, and is there an end to it."""
    total = sum(running.values())
    cap = _cap(total, len(launches), rules)
    for name in names:
        if name not in launches or running.get(name, 0) >= cap:
            continue
        more = {**running, name: running.get(name, 0) + 1}
        left = spread(total, names, rules, running=more, launches=launches)
        gone = [one for one in more if left.get(one, 0) < more[one]]
        dearer = all(cost[name] < WORTH_MOVING * cost[one] for one in gone)
        if dearer and all(count <= more.get(one, 0) for one, count in left.items()):
            return name
    return None


def spread(
    total: int,
    names: Sequence[str],
    rules: SpotRules,
    *,
    running: Mapping[str, int] | None = None,
    launches: set[str] | None = None,
) -> dict[str, int]:
    """``total`` machines over zones, the first named first: one in each of as many zones as must
    differ, then what runs already, then the others, none beyond the cap. Zones that are not in
    ``launches`` get none but what runs there."""
    running = running or {}
    launches = set(names) if launches is None else launches
    if not names or total <= 0:
        return {}
    cap = _cap(total, len(launches) or len(names), rules)
    room = {name: cap if name in launches else min(cap, running.get(name, 0)) for name in names}
    target = dict.fromkeys(names, 0)
    left = total
    differ = min(max(rules.min_zones, min(2, total)), len(names), total)
    first = sorted(names, key=lambda name: name not in running)
    for wanted in (
        dict.fromkeys(first[:differ], 1),
        {name: min(cap, running.get(name, 0)) for name in names},
        room,
    ):
        for name in wanted:
            more = min(left, min(wanted[name], room[name]) - target[name])
            if more > 0:
                target[name] += more
                left -= more
    return {name: count for name, count in target.items() if count}


def _cap(total: int, zones: int, rules: SpotRules) -> int:
    """Most machines in one zone: an even share, or as many as there are to spare; never all."""
    even = math.ceil(total / zones)
    cap = max(even, rules.spare, 1)
    return max(even, min(cap, total - 1)) if zones > 1 and total > 1 else cap


def _open(
    zones: Sequence[ZoneRecord], now: float, rules: SpotRules, least: int
) -> list[ZoneRecord]:
    """Zones that may be launched in: those that do not rest, and if these are fewer than
    ``least``, those besides whose rest ends soonest."""
    by_rest = sorted(zones, key=lambda zone: max(now, _rests_until(zone, now, rules)))
    rested = [zone for zone in by_rest if _rests_until(zone, now, rules) <= now]
    return rested if len(rested) >= least else by_rest[:least]


def _rests_until(zone: ZoneRecord, now: float, rules: SpotRules) -> float:
    failures = [at for at in (*zone.losses, *zone.refusals) if now - at <= rules.half_life_s]
    if not failures:
        return now
    doublings = min(len(failures) - 1, _MOST_DOUBLINGS)
    return max(failures) + rules.rest_s * (1 << doublings)


def _risk(zone: ZoneRecord, now: float, rules: SpotRules) -> float:
    """What losses add to the price, as a share of it: losses a second, each half as heavy after
    every half-life, times ``lost_s``. A refusal costs a wait and no machine."""
    ages = (max(0.0, now - at) for at in zone.losses)
    heavy = sum(math.pow(0.5, age / rules.half_life_s) for age in ages)
    return heavy * math.log(2.0) / rules.half_life_s * rules.lost_s
