"""What machines that may be taken back cost at nearly full capacity: part of ``make bench-fleet``.

``control.spot.decide`` over nine zones and 45 days. The availability is **generated**, no
provider's record: each zone is full and has room again for exponential times, and losing its room
takes all machines there. Prices are the shipped catalogue's: what spot costs against on demand at
every tenth of its offers. Every minute counts, machines that start are paid for.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from cloudlm.control.catalogue.files import load_catalogue
from cloudlm.control.spot import SpotFacts, SpotRules, SpotTarget, ZoneRecord, decide

DAYS, STEP_S = 45, 60.0
STEPS = int(DAYS * 86_400 / STEP_S)
ZONES = 9
NEEDED, ROOM = 8, 6
ON_DEMAND_USD = 4.0
START_STEPS = 5
OPEN_H, FULL_H = 20.0, 4.0
"""Mean hours for which a zone has room, and has none."""
REMEMBERED_S = 20_000.0
WHOLE, GOAL = 0.995, 0.42

Rule = Callable[[SpotFacts, float], SpotTarget]


@dataclass(slots=True)
class Zone:
    """A zone of the generated market."""

    name: str
    price: float
    room: int = ROOM
    ready: int = 0
    starting: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)

    @property
    def running(self) -> int:
        return self.ready + len(self.starting)

    def record(self, now: float) -> ZoneRecord:
        self.losses = [at for at in self.losses if now - at < REMEMBERED_S]
        self.refusals = [at for at in self.refusals if now - at < REMEMBERED_S]
        failed = tuple(self.losses), tuple(self.refusals)
        return ZoneRecord(self.name, self.price, self.ready, len(self.starting), 0, *failed)

    def step(self, target: int, now: float, chance: Random) -> None:
        """One minute: room comes or goes, machines become ready, start and stop."""
        mean_h = OPEN_H if self.room else FULL_H
        if chance.random() < STEP_S / 3600.0 / mean_h:
            self.room = 0 if self.room else ROOM
        if self.running > self.room:
            self.losses.append(now)
            self.ready, self.starting = 0, []
        self.starting = [left - 1 for left in self.starting]
        self.ready += self.starting.count(0)
        self.starting = [left for left in self.starting if left > 0]
        while self.running < min(target, self.room):
            self.starting.append(START_STEPS)
        if self.running < target:
            self.refusals.append(now)
        while self.running > target:
            if self.starting:
                self.starting.pop()
            else:
                self.ready -= 1


@dataclass(frozen=True, slots=True)
class Account:
    """Cost as a share of always on demand, and the share of minutes with all that is needed."""

    cost: float
    whole: float


def prices() -> list[float]:
    """Nine zones as dear, against on demand, as the shipped offers at every tenth of them."""
    offers = [offer for offer in load_catalogue().offers if offer.on_demand]
    shares = [usd / (offer.on_demand or 1) for offer in offers for usd in offer.spot.values()]
    return [ON_DEMAND_USD * share for share in statistics.quantiles(shares, n=ZONES + 1)]


def run(rule: Rule, seed: int, steps: int = STEPS) -> Account:
    """A rule against one generated market."""
    market = [Zone(f"zone-{number}", price) for number, price in enumerate(prices())]
    chances = [Random(f"{seed} {zone.name}") for zone in market]  # alike for every rule
    held: list[int] = []
    whole = 0
    usd = 0.0
    for step in range(steps):
        now = step * STEP_S
        facts = SpotFacts(NEEDED, tuple(zone.record(now) for zone in market), ON_DEMAND_USD)
        target = rule(facts, now)
        held = sorted(max(0, left - 1) for left in held)[: target.on_demand]
        held += [START_STEPS] * (target.on_demand - len(held))
        for zone, chance in zip(market, chances, strict=True):
            zone.step(target.spot.get(zone.name, 0), now, chance)
        whole += sum(zone.ready for zone in market) + held.count(0) >= NEEDED
        usd += sum(zone.running * zone.price for zone in market) + len(held) * ON_DEMAND_USD
    return Account(usd / (NEEDED * ON_DEMAND_USD * steps), whole / steps)


def ours(spare: int) -> Rule:
    """Production's rule with so many machines to spare."""
    rules = SpotRules(share=1.0, spare=spare, min_zones=3)
    return lambda facts, now: decide(facts, now, rules)


def plain_spread(facts: SpotFacts, spare: int, *, backed: bool) -> SpotTarget:
    """An even spread over all zones, whatever they cost and did; ``backed``: machines on demand
    stand in for those that are missing."""
    total = facts.needed + spare
    names = [zone.name for zone in facts.zones]
    spot = {name: len(range(place, total, len(names))) for place, name in enumerate(names)}
    stays = sum(min(zone.staying, spot[zone.name]) for zone in facts.zones)
    return SpotTarget(spot, min(facts.needed, max(0, total - stays)) if backed else 0)


def rules() -> Iterator[tuple[str, Rule]]:
    """What is compared."""
    yield "always on demand", lambda facts, now: SpotTarget({}, facts.needed)
    for spare in (2, 4):
        yield (
            f"even spread, {spare} spare",
            lambda facts, now, s=spare: plain_spread(facts, s, backed=False),  # type: ignore[misc]
        )
    yield (
        "even spread, 2 spare, on demand behind",
        lambda facts, now: plain_spread(facts, 2, backed=True),
    )
    for spare in (1, 2, 3):
        yield f"`control/spot.py`, {spare} spare", ours(spare)


def section(asked: Namespace) -> str:
    """The text for RESULTS.md."""
    seeds = range(1, 1 + max(asked.seeds, 1))
    found = {name: [run(rule, seed) for seed in seeds] for name, rule in rules()}
    cheapest = min(prices()) / ON_DEMAND_USD
    parts = [
        "## Spot: `make bench-fleet` (simulated, availability generated)\n",
        f"{NEEDED} machines needed, {ZONES} zones, {DAYS} days in steps of a minute, "
        f"{len(seeds)} seeds. **Generated** availability, no provider's record: a zone has room "
        f"for {OPEN_H:g} h in the mean, then none for {FULL_H:g} h, independently, without notice; "
        f"a start takes {START_STEPS} min and is paid for. Spot costs from {cheapest:.2f} of "
        "on demand upwards: the shipped catalogue's prices at every tenth.\n",
        "| rule | cost, share of on demand | whole, share of time (worst seed) |",
        "|---|--:|--:|",
    ]
    for name, accounts in found.items():
        parts.append(f"| {name} | {_cost(accounts):.3f} | {100 * _whole(accounts):.2f} % |")
    parts.append(_verdict({n: a for n, a in found.items() if n.startswith("`")}))
    return "\n".join(parts)


def _verdict(found: dict[str, list[Account]]) -> str:
    kept = [name for name, accounts in found.items() if _whole(accounts) >= WHOLE]
    goal = f"goal: at most {GOAL:g} of on demand while whole for {100 * WHOLE:g} % of the time"
    if not kept:
        return f"\nNone of ours is whole that often: not met ({goal})."
    best = min(kept, key=lambda name: _cost(found[name]))
    verdict = "met" if _cost(found[best]) <= GOAL else "not met"
    return (
        f"\nThe cheapest of ours that keeps it: {_cost(found[best]):.3f} ({best}): {verdict} "
        f"({goal}). On other availability and prices it will differ."
    )


def _cost(accounts: Sequence[Account]) -> float:
    return statistics.fmean(one.cost for one in accounts)


def _whole(accounts: Sequence[Account]) -> float:
    return min(one.whole for one in accounts)
