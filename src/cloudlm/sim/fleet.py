"""What runs out there: the replicas of groups, on ground that costs money and can be lost.

Plays the part of a driver and of the machines behind it: it starts what is applied, restarts what
dies with the back-off of our guards, and tells the observations that control reads. Must not decide
how many there are: control does, by the production code.
"""

from __future__ import annotations

from collections.abc import Callable

from cloudlm.core.deployment import GroupObservation, GroupSpec, Replica, ReplicaState
from cloudlm.sim.figures import Figures
from cloudlm.sim.ground import Ground, Zone
from cloudlm.sim.replica import Listener, SimReplica, Work
from cloudlm.sim.timeline import EPOCH, Timeline
from cloudlm.sim.versions import Version, Versions

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
STABLE_S = 60.0
MOVE_LOOK_S = 0.5


class Unit:
    """One replica of a group over all its lives. ``serving`` is the process of this life once it
    answers; ``open`` is what gateways have in flight there."""

    __slots__ = (
        "began_at",
        "billed_from",
        "cut_until",
        "draining",
        "failures",
        "figures",
        "id",
        "life",
        "open",
        "serving",
        "state",
        "version",
        "zone",
    )

    def __init__(self, unit_id: str, version: Version, now: float) -> None:
        self.id = unit_id
        self.version = version
        self.zone: Zone | None = None
        self.figures: Figures = version.figures
        self.serving: SimReplica | None = None
        self.state = ReplicaState.STARTING
        self.life = 0
        self.failures = 0
        self.began_at = now
        self.billed_from = -1.0
        self.cut_until = -1.0  # no gateway reaches it before
        self.draining = False  # its machine is about to be taken away
        self.open: dict[Work, None] = {}


class Fleet:
    """All groups. ``on_lost`` is told of every attempt whose process died, and how many tokens it
    had by then."""

    def __init__(
        self,
        timeline: Timeline,
        versions: Versions,
        ground: Ground,
        listener: Listener,
        on_lost: Callable[[Work, int], None],
    ) -> None:
        self._timeline = timeline
        self._versions = versions
        self._ground = ground
        self._listener = listener
        self._on_lost = on_lost
        self._groups: dict[str, tuple[GroupSpec, dict[str, Unit]]] = {}
        self._seen: list[GroupObservation] | None = None
        self.units: dict[str, Unit] = {}
        self.slower_starts: list[float] = []
        """How many times as long starts take now; of several the slowest counts."""
        self.at_once = False
        """Whether replicas start in no time: what runs already when a simulation begins."""
        self.replica_s = 0.0
        self.money = 0.0
        self.cached_tokens = 0
        self.prompt_tokens = 0

    # As a driver ---------------------------------------------------------------------------------

    def observe(self) -> list[GroupObservation]:
        """Every group as a driver would tell it."""
        if self._seen is None:
            self._seen = [
                GroupObservation(name, spec, tuple(_observed(unit) for unit in units.values()))
                for name, (spec, units) in self._groups.items()
            ]
        return self._seen

    def apply(self, spec: GroupSpec) -> None:
        """Start and stop replicas until the group has those that ``spec`` asks for."""
        self._seen = None
        _, units = self._groups.get(spec.name, (spec, {}))
        self._groups[spec.name] = spec, units
        for number in range(len(units), spec.replicas):
            version = self._versions.of(spec.model)
            unit = Unit(f"{spec.name}-{number}", version, self._timeline.now)
            units[unit.id] = self.units[unit.id] = unit
            self._place(unit, unit.life)
        while len(units) > spec.replicas:
            self._stop(units.popitem()[1])

    def delete(self, name: str) -> None:
        """Stop a group."""
        self._seen = None
        _, units = self._groups.pop(name)
        for unit in units.values():
            self._stop(unit)

    # Lives ---------------------------------------------------------------------------------------

    def _place(self, unit: Unit, life: int) -> None:
        """Find a machine and start there; without one, ask again later."""
        if unit.id not in self.units or unit.life != life or unit.billed_from >= 0:
            return
        berth = self._ground.take(unit, self._slower())
        if berth is None:
            self._set(unit, ReplicaState.BACKOFF)
            self._timeline.after(self._ground.retry_s, self._place, unit, life)
            return
        unit.zone, unit.figures = berth.zone, berth.figures
        unit.began_at = unit.billed_from = self._timeline.now
        self._set(unit, ReplicaState.STARTING)
        self._timeline.after(berth.start_s, self._started, unit, life)

    def _slower(self) -> float:
        """How many times as long starts take now."""
        return 0.0 if self.at_once else max(self.slower_starts, default=1.0)

    def look(self) -> None:
        """A pass of control is over, and all that it asked for was applied."""
        self._ground.look(self._slower())

    def _started(self, unit: Unit, life: int) -> None:
        if unit.life != life or unit.id not in self.units:
            return
        if not unit.version.starts:
            self.crash(unit)
            return
        unit.serving = SimReplica(self._timeline, unit.figures, self._listener)
        self._set(unit, ReplicaState.READY)

    def _stop(self, unit: Unit) -> None:
        del self.units[unit.id]
        unit.state = ReplicaState.STOPPED
        self._end(unit)

    def _end(self, unit: Unit) -> None:
        """Its process ends: what was in flight there is lost."""
        unit.life += 1
        self._bill(unit)
        unit.billed_from = -1.0
        if unit.zone is not None:
            self._ground.leave(unit)
        unit.zone = None
        unit.draining = False
        serving, unit.serving = unit.serving, None
        if serving is None:
            return
        lost = [(work, serving.produced(work)) for work in unit.open]
        unit.open = {}
        serving.pause()
        self._count(serving)
        for work, produced in lost:
            self._on_lost(work, produced)

    def _set(self, unit: Unit, state: ReplicaState) -> None:
        unit.state = state
        self._seen = None

    # Faults --------------------------------------------------------------------------------------

    def crash(self, unit: Unit) -> None:
        """Its process or machine dies; it starts again after its back-off, wherever there is
        room."""
        if unit.billed_from < 0:
            return  # nothing runs
        if self._timeline.now - unit.began_at >= STABLE_S:
            unit.failures = 0
        unit.failures += 1
        pause_s = min(FIRST_BACKOFF_S * 2.0 ** (unit.failures - 1), LONGEST_BACKOFF_S)
        self._end(unit)
        self._set(unit, ReplicaState.BACKOFF)
        self._timeline.after(pause_s, self._place, unit, unit.life)

    def warn(self, unit: Unit, notice_s: float) -> None:
        """Its machine will be taken away: it drains, and dies then."""
        unit.draining = True
        self._set(unit, ReplicaState.DRAINING)
        self._timeline.after(notice_s, self._take_away, unit, unit.life)

    def _take_away(self, unit: Unit, life: int) -> None:
        if unit.life == life and unit.id in self.units:
            self.crash(unit)

    def close(self, zone: str) -> None:
        """A zone is lost with all that runs there."""
        self._ground.close(zone)
        for unit in [u for u in self.units.values() if u.zone is not None and u.zone.name == zone]:
            self.crash(unit)

    def open(self, zone: str) -> None:
        self._ground.open(zone)

    # Moves ---------------------------------------------------------------------------------------

    def move(self, unit_id: str, free: Callable[[], int], drain_s: float) -> None:
        """Have a replica go to another machine: as soon as one stands ready (``free`` counts those)
        it drains, ``drain_s`` at most, and serves there at once."""
        unit = self.units[unit_id]
        self._move(unit, unit.life, free, drain_s, 0.0)

    def _move(
        self, unit: Unit, life: int, free: Callable[[], int], drain_s: float, waited_s: float
    ) -> None:
        if unit.life != life or unit.id not in self.units:
            return
        if unit.draining and (not unit.open or waited_s >= drain_s):
            self._end(unit)
            self._place(unit, unit.life)
            return
        if unit.draining:
            waited_s += MOVE_LOOK_S
        elif free() > sum(one.draining for one in self.units.values()):
            unit.draining = True
            self._set(unit, ReplicaState.DRAINING)
        self._timeline.after(MOVE_LOOK_S, self._move, unit, life, free, drain_s, waited_s)

    # Accounts ------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Count what runs until now."""
        for unit in self.units.values():
            self._bill(unit)
            if unit.serving is not None:
                self._count(unit.serving)

    def _bill(self, unit: Unit) -> None:
        if unit.billed_from >= 0 and unit.zone is not None:
            ran_s = self._timeline.now - unit.billed_from
            self.replica_s += ran_s
            if self._ground.bills_replicas:
                self.money += ran_s / 3600.0 * unit.zone.price_per_hour
            unit.billed_from = self._timeline.now

    def _count(self, serving: SimReplica) -> None:
        self.cached_tokens += serving.cached_tokens
        self.prompt_tokens += serving.prompt_tokens


def _observed(unit: Unit) -> Replica:
    return Replica(
        id=unit.id,
        state=unit.state,
        url=f"sim://{unit.id}",
        restarts=unit.life,
        started_at=EPOCH + unit.began_at,
    )
