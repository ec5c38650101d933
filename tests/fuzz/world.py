"""One run: the schedule of a seed, carried out in virtual time through the production gateway.

The gateway is the real one, assembled as in production, on the memory state; only the network to
its replicas is replaced. Clients do what the server does with a request and its response. Must not
judge: it writes down what happened, and ``invariants`` says what may not have.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from tests.fuzz.loop import EPOCH_S, Stuck, VirtualClock, VirtualLoop
from tests.fuzz.outside import FragileState, Weather, kill
from tests.fuzz.replicas import MemoryUpstream, Replica, Send
from tests.fuzz.schedule import EVERYBODY, KEYS, TENANTS, Ask, Fault, Schedule

from cloudlm.core.access import Limits, Tenant
from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.routing import Policy, Routing
from cloudlm.core.settings import GatewaySettings
from cloudlm.core.tenant import LedgerRow, Role
from cloudlm.gateway import app as assembly
from cloudlm.gateway.app import Gateway
from cloudlm.gateway.exchange import GatewayRequest
from cloudlm.security.keys import MintedKey, mint, tenant_mark
from cloudlm.state.memory import MemoryState

MODEL = "tiny"
PEPPER = b"p" * 32
LONGEST_S = 120.0
"""No request may take longer, whatever happens."""
CANCEL_WITHIN_S = 0.25
SETTLE_S = 3.0
PROBES = 3
IDLE_TIMEOUT_S = 1.5
HEARTBEAT_S = 0.4
FIRST_TOKEN_TIMEOUT_S = 4.0


@dataclass(slots=True)
class Seen:
    """What one client saw. ``ended``: how; empty while it waits. ``left``: it went away."""

    ask: Ask
    mark: str
    ended: str = ""
    status: int = 0
    pieces: list[bytes] = field(default_factory=list)
    stream: bool = False
    left: bool = False
    killed: bool = False
    asked: bool = False


@dataclass(slots=True)
class Story:
    """What happened in one run."""

    schedule: Schedule
    seen: list[Seen] = field(default_factory=list)
    probes: list[Seen] = field(default_factory=list)
    rows: dict[str, list[LedgerRow]] = field(default_factory=dict)
    upstream: MemoryUpstream | None = None
    lives: int = 0
    most_endpoints: int = 0
    revoked_at: float | None = None
    broken: list[tuple[str, str]] = field(default_factory=list)
    trace: str = ""
    took_s: float = 0.0

    def note(self, invariant: str, what: str) -> None:
        """Something that may not be."""
        if len(self.broken) < 20:
            self.broken.append((invariant, what))


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
        self.gateway: Gateway | None = None
        self._outside: FragileState | None = None
        self._stop = asyncio.Event()
        self._process: asyncio.Task[None] | None = None
        self._serving: dict[asyncio.Task[Any], Seen] = {}
        self._trace = hashlib.blake2b(digest_size=8)
        self.revision = 1

    # The run ------------------------------------------------------------------------------------

    async def run(self) -> None:
        await self._prepare()
        await self._begin_gateway()
        faults = [asyncio.create_task(self._fault(one)) for one in self.schedule.faults]
        clients = []
        for ask in self.schedule.asks:
            mark = tenant_mark(KEYS[ask.key], PEPPER)
            seen = Seen(ask, mark)
            self.story.seen.append(seen)
            clients.append(asyncio.create_task(self._client(seen)))
        await self._ended([*clients, *faults], LONGEST_S)
        await self._converged()
        self._leaks()
        await self._end_gateway()
        for row in self.state._ledger.values():
            self.story.rows.setdefault(row.request_id, []).append(row)
        self.story.took_s = self.loop.time()
        self.story.trace = self._trace.hexdigest()

    async def _ended(self, tasks: list[asyncio.Task[Any]], within_s: float) -> None:
        if not tasks:
            return
        done, open_ = await asyncio.wait(tasks, timeout=within_s)
        for task in open_:
            self.story.note("deadlock", f"not ended within {within_s:g} s: {task.get_name()}")
            task.cancel()
        for task in done:
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
            minted = mint(
                f"key{number}", Role.USER, PEPPER, EPOCH_S + number, tenant=tenant, limits=limits
            )
            self.keys.append(minted)
            await self.state.put_key(minted.record)
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
        self._trace.update(repr((round(self.loop.time(), 6), *what)).encode())

    # The gateway's process ------------------------------------------------------------------------

    async def _begin_gateway(self) -> None:
        schedule = self.schedule
        settings = GatewaySettings(
            first_token_timeout_s=FIRST_TOKEN_TIMEOUT_S,
            idle_timeout_s=IDLE_TIMEOUT_S,
            heartbeat_s=HEARTBEAT_S,
            queue_timeout_s=10.0,
            replica_capacity=schedule.capacity,
            max_queued_requests=schedule.queued,
            max_resumes=schedule.max_resumes,
            cache_models=MODEL if schedule.cached else "",
            prices="*=0/0/100",
        )
        self._outside = FragileState(self.state, self.weather)
        with mock.patch.object(assembly, "Upstream", lambda **_: self.upstream):
            self.gateway = Gateway(
                settings,
                self._outside,  # type: ignore[arg-type]
                home=self.home,
                pepper=PEPPER,
                worker_token=None,
                clock=self.clock,
            )
        self.gateway.handler._rooms = replace(self.gateway.handler._rooms, fraction=random.random)
        self.story.lives += 1
        self._stop = asyncio.Event()
        begun: asyncio.Future[None] = self.loop.create_future()
        self._process = asyncio.create_task(self._live(self.gateway, self._stop, begun))
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
        gateway, outside = self.gateway, self._outside
        if gateway is None or outside is None:
            return
        self.gateway = None
        kill(gateway, outside)
        for task, seen in list(self._serving.items()):
            seen.killed = True
            task.cancel()
        for replica in self.replicas.values():  # the system closes the dead process's sockets
            for line in list(replica.lines):
                line.close()
        self._stop.set()
        await asyncio.sleep(away_s)
        await self._begin_gateway()

    # Clients --------------------------------------------------------------------------------------

    async def _client(self, seen: Seen) -> None:
        await asyncio.sleep(seen.ask.at_s)
        serving = asyncio.ensure_future(self._served(seen))
        serving.set_name(f"request {seen.ask.number}")
        self._serving[serving] = seen
        try:
            await serving
        except asyncio.CancelledError:
            if not seen.killed:
                raise
            seen.ended = "cut"
        finally:
            serving.cancel()
            self._serving.pop(serving, None)
            self.tell("end", seen.ask.number, seen.ended, seen.status, len(seen.pieces))

    async def _served(self, seen: Seen) -> None:
        if self.gateway is None:
            seen.ended = "no gateway"
            return
        ask = seen.ask
        gone: asyncio.Future[None] = self.loop.create_future()
        if ask.leaves_after_s is not None:
            self.loop.call_later(ask.leaves_after_s, self._leave, seen, gone)
        seen.asked = True
        request = self._request(ask, gone)
        response = await self.gateway.handler.handle(request)
        seen.status = response.status
        if isinstance(response.body, bytes):
            seen.pieces.append(response.body)
            seen.stream = response.headers.get("content-type", "") != "application/json"
            seen.ended = "whole"
            return
        seen.stream = True

        def pour(piece: bytes) -> bool:
            seen.pieces.append(piece)
            return not (gone.done() or ask.slow_s)

        try:  # as the server does
            async for piece in response.body:
                seen.pieces.append(piece)
                if gone.done():
                    break
                if ask.slow_s:
                    await asyncio.sleep(ask.slow_s)
                await response.body.pump(pour)
        finally:
            await response.body.aclose()
        seen.ended = "left" if seen.left else "read"

    def _request(self, ask: Ask, gone: asyncio.Future[None]) -> GatewayRequest:
        headers = {
            "authorization": f"Bearer {self.keys[ask.key].text}",
            "content-type": "application/json",
            "x-request-id": f"q{ask.number}",
        }
        if ask.deadline_ms is not None:
            headers["x-cloudlm-deadline-ms"] = str(ask.deadline_ms)
        body: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"prompt {ask.prompt}"}],
            "max_tokens": ask.max_tokens,
            "temperature": 0,
        }
        if ask.stream:
            body["stream"] = True
            if ask.usage:
                body["stream_options"] = {"include_usage": True}
        path = "/v1/chat/completions"
        return GatewayRequest("POST", path, headers, json.dumps(body).encode(), gone)

    def _leave(self, seen: Seen, gone: asyncio.Future[None]) -> None:
        if seen.ended or gone.done():
            return
        seen.left = True
        gone.set_result(None)
        self.loop.call_later(CANCEL_WITHIN_S, self._is_free, seen)

    def _is_free(self, seen: Seen) -> None:
        name = f"q{seen.ask.number}"
        if any(send.open for send in self.upstream.sends if send.request_id == name):
            self.story.note("cancel", f"a replica still works for {name}, whose client left")

    def _sent(self, send: Send) -> None:
        """A request is about to reach a replica: neither its key nor the replicas may have more
        under way than they take."""
        self.tell("send", send.request_id, send.replica, send.resumed)
        schedule, note = self.schedule, self.story.note
        under_way = {one.request_id for one in self.upstream.under_way}
        if len(under_way) > schedule.capacity * self.story.most_endpoints:
            note("capacity", f"{len(under_way)} requests at {self.story.most_endpoints} replicas")
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
        there = [one for one in self.replicas.values() if one.alive]
        ill = there if fault.who == EVERYBODY else there[fault.who % max(len(there), 1) :][:1]
        match fault.kind:
            case "state_down":
                self.weather.down_until = max(self.weather.down_until, until)
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
            case _:
                await asyncio.gather(*(self._ill(one, fault, until) for one in ill))

    async def _ill(self, who: Replica, fault: Fault, until: float) -> None:
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
        await asyncio.sleep(SETTLE_S)
        probes = []
        for number in range(PROBES):
            ask = Ask(10_000 + number, 0.1 * number, 0, 500 + number, True, True, 8, None, 0, None)
            seen = Seen(ask, tenant_mark(KEYS[0], PEPPER))
            self.story.probes.append(seen)
            probes.append(asyncio.create_task(self._client(seen)))
        await self._ended(probes, LONGEST_S)

    def _leaks(self) -> None:
        """Everything that a request took was given back."""
        gateway, note = self.gateway, self.story.note
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


@contextmanager
def _loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        yield loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def play(schedule: Schedule, home: Path) -> Story:
    """Carry out a schedule; ``home`` is an empty folder for the gateway's files."""
    random.seed(schedule.seed)
    with _loop() as loop:
        world = None

        async def whole() -> None:
            nonlocal world
            world = World(schedule, loop, home)
            await world.run()

        task = loop.create_task(whole())
        try:
            loop.run_until_complete(task)
        except Stuck as stuck:
            assert world is not None
            world.story.note("deadlock", str(stuck))
        finally:
            _sweep(loop, task)
        assert world is not None
        return world.story


def _sweep(loop: VirtualLoop, task: asyncio.Task[None]) -> None:
    """End what a broken run left, so that nothing complains of it later."""
    left = [one for one in asyncio.all_tasks(loop) if not one.done()]
    for one in left:
        one.cancel()
    if left:
        with suppress(Stuck, RuntimeError):
            loop.run_until_complete(asyncio.wait(left, timeout=60.0))
    if task.done() and not task.cancelled():
        task.exception()
