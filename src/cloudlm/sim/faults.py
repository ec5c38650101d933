"""What goes wrong and when: scripted in a scenario, or drawn from a seed.

A fault is data; ``Faults`` does to a world what it says and takes it back after its duration. Must
not look at how the fleet copes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random
from typing import TYPE_CHECKING

from cloudlm.core.errors import InvalidRequest
from cloudlm.sim.fleet import Unit
from cloudlm.sim.state import Trouble

if TYPE_CHECKING:
    from cloudlm.sim.simulation import World


class FaultKind(StrEnum):
    """What goes wrong."""

    CRASH = "crash"
    STALL = "stall"
    SLOW_START = "slow_start"
    ZONE_LOSS = "zone_loss"
    PREEMPTION = "preemption"
    NO_SPOT = "no_spot"
    NETWORK_CUT = "network_cut"
    REPORTS = "reports"
    CONTROL_CRASH = "control_crash"
    CLOCK_JUMP = "clock_jump"
    STATE_DOWN = "state_down"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong at ``at`` seconds, for ``duration_s`` where it lasts.

    ``replicas`` are hit (crash, stall, preemption, network cut), drawn from those that run, in
    ``zone`` if one is named. A preemption tells ``notice_s`` before, and so does a zone in which no
    machine on spot is to be had. ``factor`` is how many times as long starts take, ``jump_s`` how
    far a clock jumps (``process``: control or gateway). ``lost``, ``late`` (by ``delay_s``) and
    ``doubled`` are shares of the gateways' reports.
    """

    kind: FaultKind
    at: float
    duration_s: float = 30.0
    replicas: int = 1
    zone: str = ""
    notice_s: float = 0.0
    factor: float = 4.0
    jump_s: float = 3600.0
    process: str = "control"
    lost: float = 0.0
    late: float = 0.0
    doubled: float = 0.0
    delay_s: float = 5.0


def drawn_faults(
    chance: Random, per_hour: Mapping[FaultKind, float], duration_s: float, zones: Sequence[str]
) -> list[Fault]:
    """Faults at random moments: of each kind so many an hour in the mean, in order of time."""
    found: list[Fault] = []
    for kind, rate in per_hour.items():
        at = chance.expovariate(rate / 3600.0) if rate > 0 else duration_s
        while at < duration_s:
            fault = Fault(kind, at, duration_s=chance.uniform(5.0, 120.0))
            if kind in IN_A_ZONE:
                fault = replace(fault, zone=chance.choice(zones))
            if kind is FaultKind.NO_SPOT:
                fault = replace(fault, duration_s=chance.uniform(600.0, 7200.0))
            if kind in TOLD_BEFORE:
                fault = replace(fault, notice_s=chance.choice((0.0, 30.0, 120.0)))
            elif kind is FaultKind.REPORTS:
                lost, late, doubled = (chance.uniform(0.0, 0.5) for _ in range(3))
                fault = replace(fault, lost=lost, late=late, doubled=doubled)
            elif kind is FaultKind.CLOCK_JUMP:
                jump_s = chance.choice((-3600.0, -30.0, 30.0, 3600.0))
                fault = replace(fault, jump_s=jump_s, process=chance.choice(PROCESSES))
            found.append(fault)
            at += chance.expovariate(rate / 3600.0)
    return sorted(found, key=lambda one: one.at)


PROCESSES = ("control", "gateway")
IN_A_ZONE = frozenset({FaultKind.ZONE_LOSS, FaultKind.NO_SPOT})
TOLD_BEFORE = frozenset({FaultKind.PREEMPTION, FaultKind.NO_SPOT})


def check_fault(fault: Fault, zones: Sequence[str]) -> Fault:
    """Return ``fault`` if it can happen. Raises InvalidRequest."""
    needed = fault.kind in IN_A_ZONE
    if (needed or fault.zone) and fault.zone not in zones:
        raise InvalidRequest(
            f"a {fault.kind.value} fault names the zone {fault.zone!r}; the fleet has "
            f"{', '.join(zones)}",
            param="faults.zone",
        )
    if fault.process not in PROCESSES:
        raise InvalidRequest(
            f"a clock_jump's process must be {' or '.join(PROCESSES)}, not {fault.process!r}",
            param="faults.process",
        )
    return fault


class Faults:
    """Does faults to a world."""

    def __init__(self, world: World, chance: Random) -> None:
        self._world = world
        self._chance = chance
        self._acts: Mapping[FaultKind, Callable[[Fault], None]] = {
            FaultKind.CRASH: self._crash,
            FaultKind.STALL: self._stall,
            FaultKind.SLOW_START: self._slow_start,
            FaultKind.ZONE_LOSS: self._zone_loss,
            FaultKind.PREEMPTION: self._preemption,
            FaultKind.NO_SPOT: self._no_spot,
            FaultKind.NETWORK_CUT: self._network_cut,
            FaultKind.REPORTS: self._reports,
            FaultKind.CONTROL_CRASH: self._control_crash,
            FaultKind.CLOCK_JUMP: self._clock_jump,
            FaultKind.STATE_DOWN: self._state_down,
        }
        self.done = 0

    def schedule(self, faults: Sequence[Fault]) -> None:
        """Have them happen."""
        for fault in faults:
            self._world.timeline.at(fault.at, self._do, fault)

    def _do(self, fault: Fault) -> None:
        self._acts[fault.kind](fault)
        self.done += 1

    def _after(self, fault: Fault, action: Callable[[], None]) -> None:
        self._world.timeline.after(fault.duration_s, action)

    def _hit(self, fault: Fault, *, answering: bool = False) -> list[Unit]:
        """The replicas that a fault hits."""
        units = [
            unit
            for unit in self._world.fleet.units.values()
            if unit.zone is not None
            and (not fault.zone or unit.zone.name == fault.zone)
            and (unit.serving is not None or not answering)
        ]
        return self._chance.sample(units, min(fault.replicas, len(units)))

    def _crash(self, fault: Fault) -> None:
        for unit in self._hit(fault):
            self._world.fleet.crash(unit)

    def _stall(self, fault: Fault) -> None:
        for unit in self._hit(fault, answering=True):
            serving = unit.serving
            assert serving is not None
            open_now = [(work, serving.produced(work)) for work in unit.open]
            serving.pause()
            self._world.silent(open_now)
            self._after(fault, serving.resume)

    def _slow_start(self, fault: Fault) -> None:
        slower = self._world.fleet.slower_starts
        slower.append(fault.factor)
        self._after(fault, lambda: slower.remove(fault.factor))

    def _zone_loss(self, fault: Fault) -> None:
        fleet = self._world.fleet
        fleet.close(fault.zone)
        self._after(fault, lambda: fleet.open(fault.zone))

    def _preemption(self, fault: Fault) -> None:
        machines = self._world.machines
        if machines is not None:
            rented = machines.on_spot(fault.zone)
            for one in self._chance.sample(rented, min(fault.replicas, len(rented))):
                machines.preempt(one, fault.notice_s)
            return
        for unit in self._hit(fault):
            if fault.notice_s > 0:
                self._world.fleet.warn(unit, fault.notice_s)
            else:
                self._world.fleet.crash(unit)

    def _no_spot(self, fault: Fault) -> None:
        machines = self._world.machines
        if machines is not None:
            machines.dry_up(fault.zone, fault.notice_s)
            self._after(fault, lambda: machines.fill_up(fault.zone))

    def _network_cut(self, fault: Fault) -> None:
        for unit in self._hit(fault, answering=True):
            assert unit.serving is not None
            unit.cut_until = max(unit.cut_until, self._world.timeline.now + fault.duration_s)
            self._world.silent([(work, unit.serving.produced(work)) for work in unit.open])

    def _reports(self, fault: Fault) -> None:
        troubles = self._world.state.troubles
        trouble = Trouble(fault.lost, fault.late, fault.doubled, fault.delay_s)
        troubles.append(trouble)
        self._after(fault, lambda: troubles.remove(trouble))

    def _control_crash(self, fault: Fault) -> None:
        control = self._world.control
        control.crashes += 1
        control.forget()

        def back() -> None:
            control.crashes -= 1

        self._after(fault, back)

    def _clock_jump(self, fault: Fault) -> None:
        world = self._world
        clocks = [world.control.clock]
        if fault.process == "gateway":
            clocks = [gateway.clock for gateway in world.gateways]
        for clock in clocks:
            clock.ahead_s += fault.jump_s

        def back() -> None:
            for clock in clocks:
                clock.ahead_s -= fault.jump_s

        self._after(fault, back)

    def _state_down(self, fault: Fault) -> None:
        state = self._world.state
        state.outages += 1

        def back() -> None:
            state.outages -= 1
            state.tell_again()

        self._after(fault, back)
