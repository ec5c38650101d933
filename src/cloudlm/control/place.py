"""Which machines a deployment should run on: the cheapest that bear its traffic at its service
level within its bounds, with what else there was and why it lost. Pure; spends nothing.

How many of each machine is a covering problem in whole numbers: least cost per hour, so that the
machines together bear the requests. It is searched in full over every machine alone and every pair
of machines, with at most ``PAIR_MOST`` of the dearer one of a pair; beforehand a machine goes that
another one beats in everything that counts (``_beaten``). On demand this is exact for two kinds;
on spot nearly, as zones are filled evenly and not by price alone. Three or more kinds are not
tried: ``usd_per_h_at_least`` bounds what they could save, since no mix of whatever kinds costs less
per request than the machine that is cheapest per request.

Machines on spot follow ``spot.spread``: what is planned here is where they stand when all goes
well, ``spot.decide`` is asked while they run. Speed and memory: ``offers``.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from cloudlm.control.catalogue.words import Catalogue, Offer
from cloudlm.control.offers import Asked, Lost, Machine, Reason, judge
from cloudlm.control.spot import SpotRules, spread
from cloudlm.core.placement import Placement

PAIR_MOST = 64


@dataclass(frozen=True, slots=True)
class Part:
    """``count`` machines of one offer that bear the load, as they stand by zone; those on spot
    are more by what stands by to spare."""

    machine: Machine
    count: int
    usd_per_h: float
    spot: Mapping[str, int]
    on_demand: Mapping[str, int]

    @property
    def rented(self) -> int:
        return sum(self.spot.values()) + sum(self.on_demand.values())


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to place a deployment. ``usd_per_h_at_most`` is what it costs while every machine
    on spot is replaced by one on demand."""

    parts: tuple[Part, ...]
    usd_per_h: float
    usd_per_h_at_most: float
    requests_per_s: float
    zones: int

    @property
    def name(self) -> str:
        return " + ".join(f"{part.count} x {part.machine.offer.key}" for part in self.parts)

    @property
    def replicas(self) -> int:
        return sum(part.count * part.machine.replicas for part in self.parts)

    @property
    def estimated(self) -> bool:
        return any(part.machine.estimated for part in self.parts)


@dataclass(frozen=True, slots=True)
class Decision:
    """Every choice within the bounds, the cheapest first; what was lost and why; and what no mix
    of any kinds can cost less than."""

    choices: tuple[Choice, ...]
    lost: tuple[Lost, ...]
    usd_per_h_at_least: float

    @property
    def best(self) -> Choice | None:
        return self.choices[0] if self.choices else None


def place(asked: Asked, catalogue: Catalogue) -> Decision:
    """Judge every offer and search the cheapest choice."""
    judged = [judge(offer, catalogue, asked) for offer in catalogue.offers]
    machines = [found for found in judged if isinstance(found, Machine)]
    lost = [found for found in judged if isinstance(found, Lost)]
    search = _Search(asked)
    choices: list[Choice] = []
    for found in search.choices(machines):
        over = _over_budget(found, asked.placement.budget_usd_per_h)
        if over is not None:
            lost.append(over)
        else:
            choices.append(found)
    lost.extend(search.short_of_zones)
    choices.sort(key=lambda one: (round(one.usd_per_h, 9), len(one.parts), one.replicas, one.name))
    return Decision(tuple(choices), tuple(lost), _at_least(machines, asked))


def rules_of(wishes: Placement) -> SpotRules:
    """The rules by which machines on spot stand and move as a placement wishes."""
    return SpotRules(wishes.spot.share, wishes.spot.spare, wishes.min_zones)


def usd_per_million_tokens(usd_per_h: float, asked: Asked) -> float:
    """Dollars per million tokens, those of prompts and answers counted alike, at this traffic."""
    traffic = asked.traffic
    tokens = traffic.requests_per_s * 3600 * (traffic.prompt_tokens + traffic.output_tokens)
    return usd_per_h / tokens * 1e6


class _Search:
    """Counts of machines for one deployment; remembers what a count of one machine costs."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._wishes = asked.placement
        self._rules = rules_of(self._wishes)
        self._costs: dict[tuple[str, int], tuple[float, dict[str, int]]] = {}
        self.short_of_zones: list[Lost] = []

    def choices(self, machines: list[Machine]) -> Iterator[Choice]:
        """Each machine alone, and the pairs that cost less than either of them alone, or than the
        cheapest machine alone where neither of them can stand alone."""
        alone: dict[str, float] = {}
        for machine in machines:
            count = self._count(machine, self._asked.traffic.requests_per_s)
            choice = self._settled([(machine, count)])
            if choice.zones >= self._wishes.min_zones:
                alone[machine.offer.key] = choice.usd_per_h
                yield choice
                continue
            detail = f"{choice.zones} known; {self._wishes.min_zones} asked"
            self.short_of_zones.append(Lost(machine.offer.key, Reason.ZONES, detail))
        if self._wishes.max_kinds < 2:
            return
        cheapest = min(alone.values(), default=math.inf)
        for one, other in combinations(list(_unbeaten(machines, self._wishes.min_zones)), 2):
            both = [alone[key] for key in (one.offer.key, other.offer.key) if key in alone]
            limit = min(both, default=cheapest)
            found = self._pair(one, other, limit)
            if found is not None:
                yield found

    def _pair(self, one: Machine, other: Machine, limit: float) -> Choice | None:
        """The cheapest mix of both that costs less than ``limit``."""
        many, few = sorted((one, other), key=_usd_per_request)
        needed = self._asked.traffic.requests_per_s
        best = None
        for count in range(1, min(PAIR_MOST, self._count(few, needed)) + 1):
            few_usd = self._cost(few, count)[0]
            if few_usd >= limit:
                break
            rest = needed - count * few.requests_per_s
            more = self._count(many, rest, others=count, replicas=count * few.replicas)
            if few_usd + self._cost(many, more)[0] >= limit:
                continue
            found = self._settled([(many, more), (few, count)])
            if found.zones >= self._wishes.min_zones:
                best, limit = found, found.usd_per_h
        return best

    def _count(self, machine: Machine, rate: float, others: int = 0, replicas: int = 0) -> int:
        """How many bear ``rate``, beside ``others`` that hold so many ``replicas``."""
        return max(
            1,
            math.ceil(rate / machine.requests_per_s - 1e-9),
            min(self._wishes.min_zones - others, len(machine.offer.zones)),
            math.ceil((self._asked.min_replicas - replicas) / machine.replicas),
        )

    def _cost(self, machine: Machine, count: int) -> tuple[float, dict[str, int]]:
        """Dollars per hour, and machines on spot by zone: none if on demand costs no more."""
        key = (machine.offer.key, count)
        if key not in self._costs:
            self._costs[key] = self._reckon(machine, count)
        return self._costs[key]

    def _reckon(self, machine: Machine, count: int) -> tuple[float, dict[str, int]]:
        offer, price = machine.offer, _on_demand(machine)
        dear = count * price
        on_spot = math.floor(self._rules.share * count + 1e-9)
        worth = sorted((usd, zone) for zone, usd in offer.spot.items() if usd < price)
        if not on_spot or not worth:
            return dear, {}
        spot = spread(on_spot + self._rules.spare, [zone for _, zone in worth], self._rules)
        usd = sum(offer.spot[zone] * number for zone, number in spot.items())
        usd += (count - on_spot) * price
        reached = min(len(offer.zones), len(spot) + count - on_spot)
        if usd >= dear or reached < min(self._wishes.min_zones, len(offer.zones)):
            return dear, {}
        return usd, spot

    def _settled(self, counts: list[tuple[Machine, int]]) -> Choice:
        """The machines in their zones: spot as it was spread, the others where fewest are."""
        taken: Counter[tuple[str, str]] = Counter()
        for machine, count in counts:
            for zone, number in self._cost(machine, count)[1].items():
                taken[machine.offer.place, zone] += number
        parts = []
        for machine, count in counts:
            usd, spot = self._cost(machine, count)
            on_spot = math.floor(self._rules.share * count + 1e-9) if spot else 0
            held = least_taken(machine.offer, count - on_spot, taken)
            parts.append(Part(machine, count, usd, spot, held))
        return Choice(
            parts=tuple(parts),
            usd_per_h=sum(part.usd_per_h for part in parts),
            usd_per_h_at_most=sum(part.count * _on_demand(part.machine) for part in parts),
            requests_per_s=sum(part.count * part.machine.requests_per_s for part in parts),
            zones=_distinct(taken),
        )


def least_taken(
    offer: Offer, count: int, taken: Counter[tuple[str, str]], closed: Collection[str] = ()
) -> dict[str, int]:
    """So many machines over the zones of an offer, where fewest are ``taken`` (by place and zone),
    which grows by them. Zones that are ``closed`` get none."""
    held: Counter[str] = Counter()
    zones = [one for one in offer.zones if one not in closed]
    for _ in range(count if zones else 0):
        zone = min(zones, key=lambda name: (taken[offer.place, name], name))
        taken[offer.place, zone] += 1
        held[zone] += 1
    return dict(held)


def _distinct(taken: Counter[tuple[str, str]]) -> int:
    """Zones with machines. A region whose zones are not known counts as one, and as none beside
    a known zone of its own."""
    used = {key for key, number in taken.items() if number}
    named = {place for place, zone in used if not place.endswith(f"/{zone}")}
    return sum(1 for place, zone in used if not place.endswith(f"/{zone}") or place not in named)


def _on_demand(machine: Machine) -> float:
    assert machine.offer.on_demand is not None  # judge lets no others pass
    return machine.offer.on_demand


def _worth(machine: Machine) -> list[float]:
    """Prices of the zones where spot costs less than on demand, the cheapest first."""
    return sorted(usd for usd in machine.offer.spot.values() if usd < _on_demand(machine))


def _usd_per_request(machine: Machine) -> float:
    return _on_demand(machine) / machine.requests_per_s


def _unbeaten(machines: Iterable[Machine], min_zones: int) -> Iterator[Machine]:
    """Machines that no other one beats; of equals the first."""
    kept: list[Machine] = []
    for machine in sorted(machines, key=lambda one: (_on_demand(one), -one.requests_per_s)):
        if not any(_beaten(machine, other, min_zones) for other in kept):
            kept.append(machine)
            yield machine


def _beaten(machine: Machine, other: Machine, min_zones: int) -> bool:
    """Whether ``other`` could take the place of ``machine`` in any choice, at no more cost: in
    its region where zones matter, with as many zones on spot and none of them dearer."""
    if (
        other.requests_per_s < machine.requests_per_s
        or _on_demand(other) > _on_demand(machine)
        or other.replicas < machine.replicas
    ):
        return False
    if min_zones > 1 and other.offer.place != machine.offer.place:
        return False
    if min_zones > 1 and not set(other.offer.zones) >= set(machine.offer.zones):
        return False
    ours, theirs = _worth(machine), _worth(other)
    if not ours:
        return True
    return len(ours) == len(theirs) and all(map(operator.le, theirs, ours))


def _at_least(machines: Iterable[Machine], asked: Asked) -> float:
    """The requests times the least that any machine costs per request; 0 if there is none."""
    share = asked.placement.spot.share
    rates = []
    for machine in machines:
        price = _on_demand(machine)
        cheapest = min((price, *machine.offer.spot.values()))
        rates.append((price + share * (cheapest - price)) / machine.requests_per_s)
    return asked.traffic.requests_per_s * min(rates, default=0.0)


def _over_budget(choice: Choice, budget: float) -> Lost | None:
    if not budget or choice.usd_per_h <= budget:
        return None
    detail = f"${choice.usd_per_h:.2f} per hour; ${budget:.2f} allowed"
    return Lost(choice.name, Reason.BUDGET, detail)
