"""One run: the schedule of a seed, carried out in virtual time through the production gateway.

The gateway is the real one, assembled as in production, on the memory state; only the network to
its replicas is replaced. Clients do what the server does with a request and its response. Must not
judge: it writes down what happened, and ``invariants`` says what may not have.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

from tests.fuzz.clients import Clients
from tests.fuzz.loop import EPOCH_S, VirtualClock, VirtualLoop
from tests.fuzz.outside import FragileState, Weather, kill
from tests.fuzz.replicas import MemoryUpstream, Replica, Send
from tests.fuzz.schedule import EVERYBODY, KEYS, TENANTS, Ask, Fault, Schedule
from tests.fuzz.steering import Steering
from tests.fuzz.story import (
    A_MOMENT_S,
    FIRST_TOKEN_TIMEOUT_S,
    HEARTBEAT_S,
    IDLE_TIMEOUT_S,
    LAST_GOOD_VIEW_S,
    LONGEST_S,
    MARKS,
    MODEL,
    NAMES,
    PEPPER,
    PROBES,
    SETTLE_S,
    Seen,
    Story,
)

from cloudlm.core.access import Limits, Tenant
from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.routing import Policy, Routing
from cloudlm.core.settings import ExternalSettings, GatewaySettings
from cloudlm.core.tenant import Role
from cloudlm.gateway import app as assembly
from cloudlm.gateway.app import Gateway
from cloudlm.security.keys import MintedKey, mint
from cloudlm.security.transport import external_context
from cloudlm.state.memory import MemoryState

_OTHERS = external_context(ExternalSettings())
"""Towards services that are not ours, which no run asks."""


@lru_cache(256)
def _minted(number: int, tenant: str, limits: Limits) -> MintedKey:
    """The key of that number, the same in every run."""
    at = EPOCH_S + number
    return mint(f"key{number}", Role.USER, PEPPER, at, tenant=tenant, limits=limits)


class World:
    """All that takes part in a run."""

    def __init__(self, schedule: Schedule, loop: VirtualLoop, home: Path) -> None:
        self.schedule = schedule
        self.loop = loop
        self.home = home
        self.clock = VirtualClock(loop)
        self.state = MemoryState()
        self.weather = Weather(loop)
        self.replicas: dict[str, Replica] = {}
        self.story = Story(schedule)
        self.upstream = MemoryUpstream(
            loop, self.replicas, schedule.seed, self.story.note, self._sent
        )
        self.story.upstream = self.upstream
        self.keys: list[MintedKey] = []
        self._asks = {f"q{ask.number}": ask for ask in schedule.asks}
        self.clients = Clients(loop, self.story, self.keys, self.tell)
        self._outside: FragileState | None = None
        self._stop = asyncio.Event()
        self._process: asyncio.Task[None] | None = None
        self._trace: list[tuple[Any, ...]] = []
        self.revision = 1
        self.steering: Steering | None = None
        if schedule.plane is not None:
            self.steering = Steering(self, schedule.plane)

    # The run ------------------------------------------------------------------------------------

    async def run(self) -> None:
        await self._prepare()
        await self._begin_gateway()
        faults = [asyncio.create_task(self._fault(one)) for one in self.schedule.faults]
        if self.steering is not None:
            asked = (self.steering.carry_out(order) for order in self.schedule.orders)
            faults += [asyncio.create_task(one) for one in asked]
        clients = []
        for ask in self.schedule.asks:
            seen = Seen(ask, MARKS[KEYS[ask.key]])
            self.story.seen.append(seen)
            clients.append(asyncio.create_task(self.clients.ask(seen)))
        await self._ended([*clients, *faults], LONGEST_S)
        await self._converged()
        self._leaks()
        await self._end_gateway()
        if self.steering is not None:
            await self.steering.end()
        for row in self.state._ledger.values():
            self.story.rows.setdefault(row.request_id, []).append(row)
        self.story.took_s = self.loop.time()
        whole = "".join(map(repr, self._trace)).encode()
        self.story.trace = hashlib.blake2b(whole, digest_size=8).hexdigest()

    async def _ended(self, tasks: list[asyncio.Task[Any]], within_s: float) -> None:
        if not tasks:
            return
        done, open_ = await asyncio.wait(tasks, timeout=within_s)
        for task in (one for one in tasks if one in open_):
            self.story.note("deadlock", f"not ended within {within_s:g} s: {task.get_name()}")
            task.cancel()
        for task in (one for one in tasks if one in done):  # sets have no order
            if not task.cancelled() and (error := task.exception()) is not None:
                self.story.note("internal", f"{type(error).__name__}: {error}")

    async def _prepare(self) -> None:
        schedule = self.schedule
        for name in TENANTS:
            await self.state.put_identity(Tenant(name))
        for number, tenant in enumerate(KEYS):
            spend = schedule.spend[number]
            limits = Limits(
                requests_per_minute=schedule.per_minute[number],
                concurrent_streams=schedule.concurrent[number],
                spend_per_month=spend,
            )
            minted = _minted(number, tenant, limits)
            self.keys.append(minted)
            await self.state.put_key(minted.record)
        if self.steering is not None:
            await self.steering.begin(self.spec(1, schedule.replicas))
            return
        await self.state.put_deployment(self.spec(1, schedule.replicas), now=EPOCH_S)
        await self.serve([self.new_replica(f"{MODEL}-r1-{n}", 1) for n in range(schedule.replicas)])

    def spec(self, version: int, replicas: int) -> DeploymentSpec:
        """What is deployed."""
        schedule = self.schedule
        routing = Routing(Policy(schedule.policy), hedge_after_s=schedule.hedge_after_s)
        return DeploymentSpec(
            MODEL,
            f"models:/bank/{version}",
            min_replicas=replicas,
            max_replicas=replicas,
            routing=routing,
        )

    def new_replica(self, name: str, revision: int) -> Replica:
        replica = self.replicas[name] = Replica(name, revision)
        return replica

    async def serve(self, replicas: list[Replica]) -> None:
        """Have requests go there, and nowhere else."""
        found = [Endpoint(MODEL, r.name, f"http://{r.name}", r.revision) for r in replicas]
        self.story.most_endpoints = max(self.story.most_endpoints, len(found))
        await self.state.put_endpoints(MODEL, found)

    def tell(self, *what: Any) -> None:
        """One line of the trace."""
        self._trace.append((round(self.loop.time(), 6), *what))

    # The gateway's process ------------------------------------------------------------------------

    async def _begin_gateway(self) -> None:
        schedule = self.schedule
        settings = GatewaySettings(
            first_token_timeout_s=FIRST_TOKEN_TIMEOUT_S,
            idle_timeout_s=IDLE_TIMEOUT_S,
            heartbeat_s=HEARTBEAT_S,
            queue_timeout_s=10.0 if self.steering is None else 60.0,
            hold_timeout_s=60.0,
            replica_capacity=schedule.capacity,
            max_queued_requests=schedule.queued,
            max_resumes=schedule.max_resumes,
            cache_models=MODEL if schedule.cached else "",
            prices="*=0/0/100",
        )
        self._outside = FragileState(self.state, self.weather)
        with (
            mock.patch.object(assembly, "Upstream", lambda **_: self.upstream),
            mock.patch.object(assembly, "external_context", lambda _: _OTHERS),
        ):
            gateway = Gateway(
                settings,
                self._outside,  # type: ignore[arg-type]
                home=self.home,
                pepper=PEPPER,
                worker_token=None,
                clock=self.clock,
            )
        gateway.view._last_good_view_s = LAST_GOOD_VIEW_S
        handler, errands = gateway.handler, gateway.handler.errands
        handler._rooms = errands._rooms = replace(handler._rooms, fraction=random.random)
        self.clients.gateway = gateway
        self.story.lives += 1
        self._stop = asyncio.Event()
        begun: asyncio.Future[None] = self.loop.create_future()
        self._process = asyncio.create_task(self._live(gateway, self._stop, begun))
        await begun

    async def _live(
        self, gateway: Gateway, stop: asyncio.Event, begun: asyncio.Future[None]
    ) -> None:
        async with gateway.running():
            begun.set_result(None)
            await stop.wait()

    async def _end_gateway(self) -> None:
        self._stop.set()
        if self._process is not None:
            await self._ended([self._process], LONGEST_S)

    async def kill_gateway(self, away_s: float) -> None:
        """SIGKILL, and a new process after a while."""
        gateway, outside = self.clients.gateway, self._outside
        if gateway is None or outside is None:
            return
        kill(gateway, outside)
        self.clients.cut_off()
        for replica in self.replicas.values():  # the system closes the dead process's sockets
            for line in list(replica.lines):
                line.close()
        self._stop.set()
        await asyncio.sleep(away_s)
        await self._begin_gateway()

    def _most(self) -> int:
        return self.schedule.capacity * self.story.most_endpoints

    def _under_way(self) -> set[str]:
        """The requests at replicas of the model of which endpoints are counted."""
        own = f"{MODEL}-r"
        return {one.request_id for one in self.upstream.under_way if one.replica.startswith(own)}

    def _still_too_many(self) -> None:
        under_way = self._under_way()
        if len(under_way) > self._most():
            told = f"{len(under_way)} requests at {self.story.most_endpoints} replicas"
            self.story.note("capacity", told)

    def _sent(self, send: Send) -> None:
        """A request is about to reach a replica: neither its key nor the replicas may have more
        under way than they take."""
        self.tell("send", send.request_id, send.replica, send.resumed)
        schedule, note = self.schedule, self.story.note
        under_way = {one.request_id for one in self.upstream.under_way}
        if (
            len(self._under_way()) > self._most()
        ):  # one whose place was given on may end this very moment
            self.loop.call_later(A_MOMENT_S, self._still_too_many)
        asks = self._asks
        ask = asks.get(send.request_id)
        if ask is None:
            return
        limit = schedule.concurrent[ask.key]
        same = sum(one in asks and asks[one].key == ask.key for one in under_way)
        if limit is not None and same > limit:
            note("limits", f"{same} requests of key {ask.key} at once, {limit} allowed")

    # Faults ---------------------------------------------------------------------------------------

    async def _fault(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at_s)
        self.tell("fault", fault.kind, fault.who)
        now = self.loop.time()
        until = now + fault.for_s
        if self.steering is not None and await self.steering.suffer(fault):
            return
        there = [one for one in self.replicas.values() if one.alive]
        ill = there if fault.who == EVERYBODY else there[fault.who % max(len(there), 1) :][:1]
        match fault.kind:
            case "state_down":
                self.weather.down_until = max(self.weather.down_until, until)
            case "state_away":
                self.weather.down_until = max(self.weather.down_until, until)
                self._away(now, self.weather.down_until)
            case "state_hangs":
                self.weather.hangs_until = max(self.weather.hangs_until, until)
            case "lost_ack":
                self.weather.forgets_until = max(self.weather.forgets_until, until)
            case "gateway_kill":
                await self.kill_gateway(fault.for_s / 2)
            case "clock_jump":
                self.clock.jump_s += (fault.how - 0.5) * 7200
            case "revoke":
                if self.schedule.concurrent[3] is None:
                    return
                if self.story.revoked_at is None:
                    self.story.revoked_at = now
                await self.state.revoke_key(self.keys[3].record.id, now=self.clock.now())
            case "rollout":
                await self._roll_out(fault)
            case "network":
                for one in there[:: 1 + int(fault.how * 2)]:
                    one.cut_until = max(one.cut_until, until)
                    one.hold(until)
                    if self.steering is not None:
                        self.steering.mark_ill(one.name)
            case _:
                await asyncio.gather(*(self._ill(one, fault, until) for one in ill))

    def _away(self, since: float, until: float) -> None:
        spans = self.story.away
        if spans and spans[-1][1] >= since:
            since = spans.pop()[0]
        spans.append((since, until))

    async def _ill(self, who: Replica, fault: Fault, until: float) -> None:
        self.story.ill.add(who.name)
        if self.steering is not None:
            self.steering.mark_ill(who.name)
        if fault.kind == "crash":
            who.crash()
            await asyncio.sleep(fault.for_s)
            if who.name in self.replicas:
                who.alive = True
        elif fault.kind == "stall":
            who.hold(until)
        else:
            who.troubles[fault.kind] = (until, fault.how)

    async def _roll_out(self, fault: Fault) -> None:
        """A new revision takes over, as control would have written it; those of the old one are
        stopped by force after a while."""
        self.revision += 1
        old = [one for one in self.replicas.values() if one.alive]
        number = self.revision
        names = [f"{MODEL}-r{number}-{n}" for n in range(self.schedule.replicas)]
        await self.serve([self.new_replica(name, number) for name in names])
        await asyncio.sleep(fault.for_s)
        for one in old:
            one.crash()
            self.replicas.pop(one.name, None)

    # The end --------------------------------------------------------------------------------------

    async def _converged(self) -> None:
        """Once faults have ended, everything is answered again."""
        self.weather.heal()
        for one in self.replicas.values():
            one.heal()
        if self.steering is not None:
            await self.steering.settle()
        await asyncio.sleep(SETTLE_S)
        probes = []
        for number in range(PROBES):
            ask = Ask(10_000 + number, 0.1 * number, 0, 500 + number, True, True, 8, None, 0, None)
            if self.schedule.plane is not None and self.schedule.plane.fits:
                ask = replace(ask, model=number % len(NAMES))
            seen = Seen(ask, MARKS[KEYS[0]])
            self.story.probes.append(seen)
            probes.append(asyncio.create_task(self.clients.ask(seen)))
        await self._ended(probes, LONGEST_S)

    def _leaks(self) -> None:
        """Everything that a request took was given back."""
        gateway, note = self.clients.gateway, self.story.note
        if gateway is None:
            note("convergence", "there is no gateway")
            return
        held: dict[str, Any] = {
            "places in admission": gateway.admission.total,
            "waiters at the gate": gateway.gate.waiting,
            "open exchanges": len(gateway.handler._open),
            "running leases": len(gateway.limiter._running),
            "leases in the tally": len(gateway.counters._tally._leases),  # type: ignore[attr-defined]
            "flights": len(gateway.handler.recall.flights),
            "open attempts": len(gateway.ledger._open),
            "open lines": sum(len(one.lines) for one in self.replicas.values()),
            "open sends": sum(send.open for send in self.upstream.sends),
            "loads": sum(load.ongoing for load in gateway.loads._loads.values()),
            "blocks to compute": sum(load.blocks for load in gateway.loads._loads.values()),
        }
        for what, count in held.items():
            if count:
                note("leak", f"{count} {what} were not given back")
        if gateway.ledger.rows_dropped:
            note("ledger", f"{gateway.ledger.rows_dropped} rows were dropped")
