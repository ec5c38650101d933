"""One policy against one scenario: assembles the world, lets time pass, and tells how it went."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from random import Random

from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.pace import Pace
from cloudlm.core.settings import ControlSettings, GatewaySettings
from cloudlm.core.tenant import LedgerRow, Outcome
from cloudlm.gateway.demand import INTERVAL_S
from cloudlm.sim.control import SimControl, scaled
from cloudlm.sim.faults import Fault, Faults
from cloudlm.sim.figures import Figures
from cloudlm.sim.fleet import Fleet
from cloudlm.sim.gateway import SimGateway
from cloudlm.sim.ground import Zone, Zones
from cloudlm.sim.machines import Machines
from cloudlm.sim.measure import Books, Moment, ServiceLevel, Spread, spread_of
from cloudlm.sim.placing import Placed
from cloudlm.sim.rented import Rent
from cloudlm.sim.replica import Work
from cloudlm.sim.request import Attempt, Switchboard
from cloudlm.sim.revisions import SimRevisions
from cloudlm.sim.rollouts import RolloutResult, Rollouts
from cloudlm.sim.state import SimState
from cloudlm.sim.timeline import Timeline, WallClock, seldom_collected
from cloudlm.sim.traffic import Arrival
from cloudlm.sim.versions import Release, Versions

LONGEST_TAIL_S = 3600.0
"""How long after its last request a simulation may go on until all have ended."""
CHECK_S = 0.1


@dataclass(frozen=True, slots=True)
class Policy:
    """What is compared: a deployment as a user would write it, who scales it (one of
    ``control.AUTOSCALERS``; empty: as the spec says), where production has ``placed`` it (None: in
    the setting's zones), and which versions are deployed meanwhile, by the strategy that the spec
    names."""

    name: str
    spec: DeploymentSpec
    autoscaler: str = ""
    placed: Placed | None = None
    releases: tuple[Release, ...] = ()


@dataclass(frozen=True, slots=True)
class Setting:
    """What is the same for all policies. ``warm``: the least replicas run when time begins, or
    ``begin_with`` if that is more, and how long a start takes was measured with them."""

    figures: Figures
    zones: tuple[Zone, ...] = (Zone("zone"),)
    level: ServiceLevel = field(default_factory=ServiceLevel)
    faults: tuple[Fault, ...] = ()
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    control: ControlSettings = field(default_factory=ControlSettings)
    gateways: int = 1
    warm: bool = True
    begin_with: int = 0
    seed: int = 0
    keep_rows: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """How one policy did. Shares are of all requests; ``late`` waited longer than the service
    level's ``queue_s`` for a replica to begin, or never had one."""

    policy: str
    requests: int
    outcomes: dict[Outcome, int]
    open: int
    attempts: int
    retried: int
    resumed: int
    ttft: Spread
    tpot: Spread
    queue: Spread
    late: float
    violations: float
    cache_hits: float
    replica_hours: float
    cost: float
    output_tokens: int
    most_replicas: int
    faults: int
    ended_at: float
    events: int
    ttft_s: Sequence[float]
    moments: tuple[Moment, ...]
    rows: tuple[LedgerRow, ...] = ()
    rollouts: tuple[RolloutResult, ...] = ()
    placed: Placed | None = None
    rent: Rent | None = None


class World:
    """Everything of one simulation."""

    def __init__(self, policy: Policy, setting: Setting) -> None:
        self.timeline = timeline = Timeline()
        seeds = Random(setting.seed)
        self.books = Books(setting.level, keep_rows=setting.keep_rows)
        self._spec = spec = scaled(policy.spec, policy.autoscaler)
        revisions = SimRevisions(timeline, spec.name)
        revisions.deploy(spec, WallClock(timeline).now())
        self.state = SimState(timeline, Random(seeds.random()), revisions)
        switchboard = Switchboard()
        self.machines = self._machines(policy.placed, setting)
        self.fleet = Fleet(
            timeline,
            Versions(setting.figures, policy.releases),
            self.machines or Zones(setting.zones),
            switchboard,
            switchboard.lost,
        )
        self._setting = setting
        self.control = SimControl(
            setting.control,
            timeline,
            self.state,
            self.fleet,
        )
        self.gateways = [
            SimGateway(
                f"gateway-{number}",
                spec,
                setting.gateway,
                timeline,
                self.state,
                self.books,
                self.fleet,
                Random(seeds.random()),
                Random(f"{setting.seed} choices {number}"),
            )
            for number in range(setting.gateways)
        ]
        for gateway in self.gateways:
            self.state.follow(gateway.follow)
        self.rollouts = Rollouts(
            policy.releases,
            timeline,
            WallClock(timeline),
            self.state,
            self.fleet,
            lambda: self.control.wanted,
            self.unanswered,
        )
        self.faults = Faults(self, Random(seeds.random()))
        self.faults.schedule(setting.faults)
        self._every_s = 1.0

    def _machines(self, placed: Placed | None, setting: Setting) -> Machines | None:
        """The machines that bear the fleet, if production has chosen some."""
        if placed is None:
            return None
        made = Machines(self.timeline, placed, lambda: not (self.control.down or self.state.down))
        made.needed = lambda: len(self.fleet.units)
        made.lose = lambda unit: self.fleet.crash(self.fleet.units[unit])
        made.move = lambda unit: self.fleet.move(unit, made.free, setting.control.drain_timeout_s)
        return made

    def unanswered(self) -> int:
        """Requests that were not answered until now."""
        outcomes = self.books.outcomes
        return outcomes[Outcome.REFUSED] + outcomes[Outcome.FAILED]

    def silent(self, works: Iterable[tuple[Work, int]]) -> None:
        """These attempts hear nothing from now on, after so many tokens."""
        for work, produced in works:
            assert isinstance(work, Attempt)
            work.sender.watch(work, produced)

    def warm_up(self) -> None:
        """Have replicas run when time begins."""
        spec, start_s = self._spec, self._setting.figures.start_s
        if start_s > 0:
            pace = Pace(spec.name, spec.model, start_s=start_s)
            self.state.paces[spec.name, spec.model] = pace
        self.state.wanted = max(self._setting.begin_with, spec.min_replicas)
        self.fleet.at_once = True
        self.control.step()
        self.timeline.run(0.0)
        self.fleet.at_once = False
        self.control.step()
        self.state.tell_again()

    def begin(self, arrivals: Iterable[Arrival], every_s: float) -> None:
        """Have requests come, gateways report, control look, and the books be kept."""
        self._every_s = every_s
        self._arrivals = iter(arrivals)
        self._doors = cycle(self.gateways)
        self._next(0)
        count = len(self.gateways)
        for number, gateway in enumerate(self.gateways, 1):
            # Processes that were not started together do not report at the same moment.
            self.timeline.after(INTERVAL_S * number / count, self._report, gateway)
        self.control.run()
        self._look()

    def _next(self, number: int) -> None:
        arrival = next(self._arrivals, None)
        if arrival is not None:
            self.timeline.at(arrival.at, self._arrive, arrival, number)
        else:
            self.timeline.after(CHECK_S, self._check, self.timeline.now + LONGEST_TAIL_S)

    def _arrive(self, arrival: Arrival, number: int) -> None:
        self._next(number + 1)
        next(self._doors).arrive(arrival, number)

    def _check(self, until: float) -> None:
        """After the last arrival: stop once all have ended."""
        if self.timeline.now >= until or not self.books.open:
            self.timeline.stopped = True
        else:
            self.timeline.after(CHECK_S, self._check, until)

    def _report(self, gateway: SimGateway) -> None:
        gateway.report()
        self.timeline.after(INTERVAL_S, self._report, gateway)

    def _look(self) -> None:
        fleet = self.fleet
        queued = sum(gateway.queued for gateway in self.gateways)
        ready = exist = 0
        for unit in fleet.units.values():
            exist += unit.zone is not None
            if unit.serving is not None:
                ready += 1
                queued += unit.serving.waiting
        self.books.look(self.timeline.now, ready, exist, self.control.wanted, queued)
        self.timeline.after(self._every_s, self._look)


def simulate(
    policy: Policy, setting: Setting, arrivals: Iterable[Arrival], *, every_s: float = 10.0
) -> Result:
    """How a policy does under these arrivals, which are in order of time. ``every_s`` apart the
    fleet is noted."""
    with seldom_collected():
        world = World(policy, setting)
        if setting.warm:
            world.warm_up()
        world.begin(arrivals, every_s)
        world.timeline.run()
        world.fleet.settle()
        if world.machines is not None:
            world.machines.settle()
        return _result(policy, world)


def _result(policy: Policy, world: World) -> Result:
    books, fleet = world.books, world.fleet
    rent = None if world.machines is None else world.machines.rent
    count = max(books.arrivals, 1)
    return Result(
        policy=policy.name,
        requests=books.arrivals,
        outcomes={kind: number for kind, number in books.outcomes.items() if number},
        open=books.open,
        attempts=books.attempts,
        retried=books.retried,
        resumed=books.resumed,
        ttft=spread_of(books.ttft),
        tpot=spread_of(books.tpot),
        queue=spread_of(books.queue),
        late=books.late / count,
        violations=books.violations / count,
        cache_hits=fleet.cached_tokens / max(fleet.prompt_tokens, 1),
        replica_hours=fleet.replica_s / 3600.0,
        cost=fleet.money if rent is None else rent.usd,
        output_tokens=books.output_tokens,
        most_replicas=max((one.exist for one in books.moments), default=0),
        faults=world.faults.done,
        ended_at=world.timeline.now,
        events=world.timeline.events,
        ttft_s=books.ttft,
        moments=tuple(books.moments),
        rows=tuple(books.rows or ()),
        rollouts=world.rollouts.results(),
        placed=policy.placed,
        rent=rent,
    )
