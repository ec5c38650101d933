"""Control processes of a run: production's leadership, terms and reconciler, begun and killed.

Only what they stand on is replaced: their connection to the state, the registry, the drivers and
the way to ask replicas. Must not decide what they do.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.fuzz.fleet import PROBE_TIMEOUT_S, Fleet, FleetDriver, FleetProber
from tests.fuzz.life import Life
from tests.fuzz.loop import VirtualClock, VirtualLoop
from tests.fuzz.outside import Weather
from tests.fuzz.replicas import MemoryUpstream

from cloudlm.control.budget import MemoryBudget
from cloudlm.control.drivers import Drivers
from cloudlm.control.footprint import replica_bytes
from cloudlm.control.jobs import Jobs
from cloudlm.control.leading import LEASE, Leadership
from cloudlm.control.metrics import ControlMetrics
from cloudlm.control.observe import Observer
from cloudlm.control.reconcile import Reconciler
from cloudlm.control.standby import Standby
from cloudlm.control.terms import Terms
from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import BrokenModel, ModelNotFound, NotSupported, Unavailable
from cloudlm.core.lease import Lease
from cloudlm.core.model import Manifest, ModelRef
from cloudlm.core.settings import ControlSettings, EngineSettings
from cloudlm.drivers.base import DriverContext
from cloudlm.state.leases import only_reads
from cloudlm.state.memory import MemoryState

LEASE_S = 3.0
SHORTEST_STAY_S = 1.0
SETTINGS = ControlSettings(
    reconcile_interval_s=0.5,
    probe_timeout_s=PROBE_TIMEOUT_S,
    stall_timeout_s=6.0,
    drain_timeout_s=8.0,
    lease_s=LEASE_S,
)


class Registry:
    """Every version of ``bank`` exists; ``champion`` is the one that the alias means."""

    def __init__(self) -> None:
        self.champion = 1

    def resolve(self, ref: ModelRef) -> Manifest:
        if ref.name != "bank":
            raise ModelNotFound(f"model {ref.name!r} is not registered")
        number = self.champion if ref.alias is not None else ref.version or 1
        return Manifest(ref.name, number, (), "generate", "LlamaForCausalLM", "float32", 10, 64)

    def configuration(self, ref: ModelRef) -> dict[str, Any]:
        raise BrokenModel(f"{ref} has no config.json")

    def each_bytes(self) -> int:
        """What a replica of any version takes."""
        spec = DeploymentSpec("any", "models:/bank/1")
        manifest = self.resolve(ModelRef("bank", version=1))
        return replica_bytes(spec, manifest, {}, EngineSettings())


class NoTurner:
    """No replica here can sleep."""

    async def turn(self, url: str, *, asleep: bool) -> None:
        raise NotSupported("this replica cannot sleep")


class ControlState:
    """A control process's connection to the state, or that of one of its terms. Notes a write of
    whoever does not lead any more. ``wrote`` is told of each write that was done, ``comes`` of
    each that is done next: it may hinder it."""

    def __init__(
        self,
        asked: Any,
        state: MemoryState,
        weather: Weather,
        life: Life,
        note: Callable[[str, str], None],
        wrote: Callable[..., None],
        comes: Callable[[str, Any], Awaitable[None]],
        term: Lease | None = None,
    ) -> None:
        self._asked, self._state, self._weather, self._life = asked, state, weather, life
        self._note, self._wrote, self._comes, self._term = note, wrote, comes, term

    def fenced(self, lease: Lease) -> ControlState:
        held = self._state.fenced(lease)
        return ControlState(
            held,
            self._state,
            self._weather,
            self._life,
            self._note,
            self._wrote,
            self._comes,
            lease,
        )

    def __getattr__(self, name: str) -> Any:
        found, reads = getattr(self._asked, name), only_reads(name)

        async def asked(*arguments: Any, **named: Any) -> Any:
            await self._life.leaves()
            await self._weather.before()
            if self._life.dead:
                raise Unavailable("this process is dead")
            if not reads:
                await self._comes(name, arguments[0] if arguments else None)
            result = await found(*arguments, **named)
            if not reads:
                self._check(name)
                self._wrote(self._life, name, arguments, result)
                self._life.comes("after a write")
            await self._life.returns(wrote=not reads)
            if not reads and self._weather.forgets:
                raise Unavailable("the state broke off", retry_after_s=1.0)
            return result

        self.__dict__[name] = asked
        return asked

    def _check(self, name: str) -> None:
        now = self._state._lease(LEASE).token
        if self._term is not None and self._term.token < now:
            self._note("writer", f"{name} with token {self._term.token} while {now} leads")


class ControlProcess:
    """One of the controls of a run. ``killed`` is told when it dies by itself."""

    def __init__(
        self,
        holder: str,
        loop: VirtualLoop,
        clock: VirtualClock,
        state: MemoryState,
        weather: Weather,
        fleet: Fleet,
        upstream: MemoryUpstream,
        registry: Registry,
        latency_s: float,
        note: Callable[[str, str], None],
        wrote: Callable[..., None],
        comes: Callable[[str, Any], Awaitable[None]],
        seed: int,
    ) -> None:
        self.holder = holder
        self._loop, self._clock, self._state, self._weather = loop, clock, state, weather
        self._fleet, self._upstream, self._registry = fleet, upstream, registry
        self._latency_s, self._note, self._wrote = latency_s, note, wrote
        self._comes = comes
        self._chance = random.Random(f"{seed}/{holder}")
        self._tasks: list[asyncio.Task[None]] = []
        self._comes_back_s = 0.5
        self.life: Life | None = None

    def begin(self) -> None:
        """A process that has just been started, and knows nothing."""
        life = self.life = Life(self._loop, self._chance, self._latency_s, self._died)
        state: Any = ControlState(
            self._state, self._state, self._weather, life, self._note, self._wrote, self._comes
        )
        clock, metrics = self._clock, ControlMetrics()
        build = {"process": lambda _: FleetDriver(self._fleet, life, self._loop, self._note)}
        drivers = Drivers(DriverContext(Path("/"), clock, {}, {}), build)
        prober = FleetProber(self._fleet, life, self._loop, self._upstream)
        leadership = Leadership(state, clock, metrics, self.holder, SETTINGS.lease_s)
        observer = Observer(drivers, prober, clock, SETTINGS.stall_timeout_s)
        standby = Standby(state, drivers, observer, clock, SETTINGS.drain_timeout_s)
        registry: Any = self._registry
        size_bytes = int(self._registry.each_bytes() * (self._fleet.fits + 0.5))
        size_bytes = size_bytes if self._fleet.fits else 0
        memory = MemoryBudget(registry, size_bytes, SHORTEST_STAY_S, clock=clock)

        def reconciler(fenced: Any, checked: Drivers) -> Reconciler:
            return Reconciler(
                fenced,
                checked,
                registry,
                prober,
                clock,
                SETTINGS,
                metrics,
                NoTurner(),
                memory=memory,
            )

        terms = Terms(
            leadership,
            drivers,
            Jobs(state, clock, {}, alone=False),
            standby,
            SETTINGS.reconcile_interval_s,
            reconciler,
        )
        self._tasks = [
            asyncio.create_task(one.run(), name=f"{self.holder}") for one in (terms, leadership)
        ]

    def kill(self, away_s: float) -> None:
        """SIGKILL; it comes back after a while."""
        if self.life is not None and not self.life.dead:
            self.life.dead = True
            self._comes_back_s = away_s
            self._died()

    def dies_soon(self, calls: int, away_s: float, *, after: bool) -> None:
        """SIGKILL at one of its next calls."""
        if self.life is not None:
            self._comes_back_s = away_s
            self.life.dies_in(calls, after=after)

    def pauses(self, moment: str, for_s: float) -> None:
        """SIGSTOP if it leads, at such a moment or, if that is empty, now; so long that another
        may lead, and ``for_s`` more."""
        life = self.life
        if life is None or life.dead or self._state._lease(LEASE).holder != self.holder:
            return
        if moment:
            life.pauses_at(moment, LEASE_S + 1.0 + for_s)
        else:
            life.paused_until = max(life.paused_until, self._loop.time() + LEASE_S + 1.0 + for_s)

    async def end(self) -> None:
        """The run is over."""
        if self.life is not None:
            self.life.dead = True
        self.life = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check_alive(self) -> None:
        """Its tasks may end in no other way than by its death."""
        for task in self._tasks:
            alive = self.life is not None and not self.life.dead
            if alive and task.done():
                self._note("internal", f"{self.holder} ended: {task!r}")

    def _died(self) -> None:
        life = self.life
        for task in self._tasks:
            self._loop.call_soon(task.cancel)
        self._loop.call_later(self._comes_back_s, self._again, life)

    def _again(self, before: Life | None) -> None:
        if self.life is before and before is not None:
            self.begin()
