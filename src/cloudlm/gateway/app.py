"""The gateway's process, assembled in sight.

``Gateway`` makes every part and says who gets what; ``make_server`` puts the server around it and
says which paths go straight to the handler. Must not hold rules of its own about models or keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from cloudlm.core.clock import Clock, SystemClock
from cloudlm.core.errors import CloudlmError, Unavailable
from cloudlm.core.settings import ExternalSettings, GatewaySettings
from cloudlm.gateway import openapi
from cloudlm.gateway.admission import Admission
from cloudlm.gateway.bridge import Bridge
from cloudlm.gateway.channel import Channel
from cloudlm.gateway.chat import Handler
from cloudlm.gateway.connection import Site
from cloudlm.gateway.counters import Counters, LocalCounters
from cloudlm.gateway.demand import DemandReporter
from cloudlm.gateway.desk import Cooling, Numbers, SharedCounters
from cloudlm.gateway.exchange import GatewayRequest, GatewayResponse, request_id
from cloudlm.gateway.foreign import Foreign
from cloudlm.gateway.gate import Gate
from cloudlm.gateway.known import Tenants
from cloudlm.gateway.ledger import Ledger, open_journal
from cloudlm.gateway.limiter import Limiter
from cloudlm.gateway.live_settings import LiveSettings, Source, read_live
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.meter import Meter
from cloudlm.gateway.people import People
from cloudlm.gateway.refusals import Refusals
from cloudlm.gateway.replies import refusal
from cloudlm.gateway.rooms import Rooms
from cloudlm.gateway.sender import Sender
from cloudlm.gateway.server import ACCEPTS_AT_ONCE, ACCEPTS_SHARED, GatewayServer
from cloudlm.gateway.shedding import Shedding
from cloudlm.gateway.upstream import Upstream
from cloudlm.gateway.view import View
from cloudlm.gateway.waiting import Waiting
from cloudlm.security import keys
from cloudlm.security.access import Policies
from cloudlm.security.credentials import Credentials
from cloudlm.security.door import Door
from cloudlm.security.hosts import HostGuard
from cloudlm.security.issuer import Issuer
from cloudlm.security.matrix import OPEN, Server
from cloudlm.security.outside import Outside
from cloudlm.security.transport import external_context, replica_context
from cloudlm.state.base import State
from cloudlm.state.home import Home
from cloudlm.state.news import News
from cloudlm.telemetry.logs import get_logger

if TYPE_CHECKING:
    from cloudlm.gateway.cooling_redis import RedisCooling
    from cloudlm.gateway.live_guardrails import LiveGuardrails
    from cloudlm.gateway.semantic.likeness import Likeness

_PLAIN_PATHS = frozenset(OPEN[Server.GATEWAY])

_log = get_logger(__name__)


class Place(NamedTuple):
    """One of several processes on a port: its number, and the way to their parent."""

    number: int
    channel: Channel


class Gateway:
    """All parts of one gateway. ``home`` holds the ledger's journal and the certificates,
    ``pepper`` opens key digests, ``worker_token`` opens workers, ``issuer`` knows the tokens of
    people who sign in, ``policies`` hold beside roles, ``place`` is given to one of several
    processes, ``external`` and ``credentials`` say which other services may be asked, and how,
    ``source`` is where settings that may change come from, ``news`` tells of writes in the
    state."""

    def __init__(
        self,
        settings: GatewaySettings,
        state: State,
        *,
        home: Path,
        pepper: bytes,
        worker_token: str | None,
        clock: Clock | None = None,
        issuer: Issuer | None = None,
        policies: Policies | None = None,
        place: Place | None = None,
        external: ExternalSettings = ExternalSettings(),
        credentials: Credentials | None = None,
        source: Source | None = None,
        news: News | None = None,
    ) -> None:
        clock = clock or SystemClock()
        self.settings = settings
        self._clock = clock
        self.held = read_live(settings)
        routes, weights = self.held["routes"], self.held["tenant_weights"]
        self.view = View(state, clock, routes=routes, policies=policies)
        self.admission = Admission(settings.max_ongoing_requests, settings.max_queued_requests)
        self.gate = Gate(self.admission, clock, settings.replica_capacity, settings.queue_timeout_s)
        self.view.on_change.append(self.gate.follow)
        self.counters = _counters(settings, clock, place)
        self.limiter = Limiter(
            self.counters,
            self.held["prices"],
            state,
            clock,
            settings.reserved_answer_tokens,
        )
        self.view.on_change.append(self.limiter.follow)
        self.loads = Loads()
        self.meter = Meter()
        self.numbers = Numbers(place.channel, self.meter.exposition, clock) if place else None
        self._cooling = _cooling(settings, place, pepper, self._left_alone, clock)
        self.ledger = Ledger(open_journal(home), state, clock)
        self.door = Door("gateway", settings, home / "tls", clock)
        self.replica_tls = replica_context(settings, home / "tls")
        own = Upstream(
            token=worker_token,
            connect_timeout_s=settings.connect_timeout_s,
            tls=self.replica_tls,
            plaintext=settings.upstream_plaintext == "anywhere",
        )
        self.external_tls = external_context(external)
        foreign = Foreign(
            credentials=credentials or Credentials(Home(home).credentials, {}),
            outside=Outside(external),
            tls=self.external_tls,
            connect_timeout_s=settings.connect_timeout_s,
            clock=clock,
        )
        self.upstream = Sender(own, foreign)
        name = f"{socket.gethostname()}:{settings.port}"
        if place is not None:
            name += f"/{place.number}"
        self.demand = DemandReporter(name, state, self.view, self.admission, self.loads, clock)
        self.ledger.on_row.append(self.demand.ended)
        hold_s = settings.hold_timeout_s
        self.waiting = Waiting(self.view, self.gate, self.demand, clock, hold_s, news)
        self.refusals = Refusals(state, clock)
        self.tenants = Tenants(pepper, weights)
        likeness = None
        if settings.semantic_models:
            likeness = self._likeness(settings, home, weights, clock)
        self.guardrails = _guardrails(settings, home, self.meter)
        self.live = None
        if source is not None:
            self.live = LiveSettings(source, settings, self.held, self._settings_changed)
        rooms = Rooms(
            settings=settings,
            pepper=pepper,
            tenants=self.tenants,
            clock=clock,
            view=self.view,
            limiter=self.limiter,
            gate=self.gate,
            waiting=self.waiting,
            loads=self.loads,
            demand=self.demand,
            upstream=self.upstream,
            ledger=self.ledger,
            meter=self.meter,
            weights=weights,
            likeness=likeness,
            routes=routes,
            refused=self.refusals.note,
            cooled=self._cooled,
            guardrails=self.guardrails,
            people=None if issuer is None else People(issuer, self.view),
        )
        self.handler = Handler(rooms)
        self.shedding = Shedding(rooms, self.handler.entrance, self.handler.recall)
        self.stopping = False
        self.meter.watch(
            "cloudlm_gateway_cache_bytes",
            "Memory held by answers that may be used again.",
            lambda: self.handler.recall.answers.size_bytes,
        )
        self.meter.watch(
            "cloudlm_gateway_cache_shared_away",
            "1 while the shared cache (gateway.cache_url) cannot be reached.",
            lambda: self.handler.recall.answers.away,
        )
        self.meter.watch(
            "cloudlm_gateway_state_age_seconds",
            "Seconds since the state was last read.",
            lambda: self.view.age_s,
        )
        self.meter.watch(
            "cloudlm_gateway_certificate_expires_seconds",
            "When the gateway's certificate ends, Unix seconds; 0 without TLS.",
            lambda: self.door.expires_at,
        )
        self.meter.watch(
            "cloudlm_gateway_requests_queued",
            "Requests that wait in the gateway for a place at a replica.",
            lambda: self.gate.waiting,
        )
        self.meter.watch(
            "cloudlm_gateway_ledger_rows_waiting",
            "Ledger rows in memory that the state does not have yet.",
            lambda: self.ledger.rows_in_memory,
        )
        self.meter.watch(
            "cloudlm_gateway_ledger_rows_dropped",
            "Ledger rows lost because neither state nor disk took them.",
            lambda: self.ledger.rows_dropped,
        )
        self.meter.watch(
            "cloudlm_gateway_files_refused",
            "Files (settings, guardrails) that changed and could not be used; the last good one "
            "of each holds.",
            self._files_refused,
        )

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.view.ready and not self.stopping

    def notes(self) -> list[str]:
        """What an operator should know, for anybody to read."""
        notes = [] if self.live is None else self.live.notes
        return notes if self.guardrails is None else [*notes, *self.guardrails.notes]

    def _cooled(self, replica: str, wait_s: float) -> None:
        """A replica asked this gateway for time."""
        for others in self._cooling:
            others.tell(replica, wait_s)

    def _left_alone(self, replica: str, wait_s: float) -> None:
        """A replica asked another process or gateway for time."""
        with contextlib.suppress(Unavailable):
            models = self.view.snapshot().models.values()
            if any(one.replica == replica for model in models for one in model.endpoints):
                self.loads.cool(replica, self._clock.monotonic() + wait_s)

    async def _settings_changed(self) -> None:
        """Routes, prices or weights are others now."""
        self.tenants.forget()
        await self.view.reread()

    def _files_refused(self) -> int:
        return sum(one is not None and one.refused for one in (self.live, self.guardrails))

    def _likeness(
        self,
        settings: GatewaySettings,
        home: Path,
        weights: dict[str, float],
        clock: Clock,
    ) -> Likeness | None:
        """The semantic cache. Raises BadSetting and MissingExtra."""
        from cloudlm.gateway.semantic.deployed import Means
        from cloudlm.gateway.semantic.open import open_likeness

        means = Means(
            view=self.view,
            loads=self.loads,
            upstream=self.upstream,
            ledger=self.ledger,
            tenants=self.tenants,
            clock=clock,
            price=self.limiter.price,
            count=self.demand.count,
        )
        likeness = open_likeness(settings, home, weights, means)
        if likeness is not None:
            self.meter.registry.register(likeness)
        return likeness

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The gateway's tasks, from start to a flushed ledger. Raises StorageFailed."""
        self.ledger.open()
        await self.upstream.open()
        if await self.view.refresh():
            await self.ledger.flush()  # what a dead process left in the journal was spent too
            await self.limiter.tend(self.view.snapshot())
        tasks = [
            asyncio.create_task(self.view.run(), name="view"),
            asyncio.create_task(self.ledger.run(), name="ledger"),
            asyncio.create_task(self.demand.run(), name="demand"),
            asyncio.create_task(self.refusals.run(), name="refusals"),
            asyncio.create_task(self.waiting.run(), name="waiting"),
        ]
        tasks.append(asyncio.create_task(self.door.run(), name="door"))
        tasks.append(asyncio.create_task(self.replica_tls.follow(), name="replica_tls"))
        tasks.append(asyncio.create_task(self.external_tls.follow(), name="external_tls"))
        if self.guardrails is not None:
            tasks.append(asyncio.create_task(self.guardrails.follow(), name="guardrails"))
        if self.live is not None:
            tasks.append(asyncio.create_task(self.live.follow(), name="live_settings"))
        if self.numbers is not None:
            tasks.append(asyncio.create_task(self.numbers.run(), name="numbers"))
        tasks.append(asyncio.create_task(self.counters.run(), name="counters"))
        tasks += [asyncio.create_task(one.run(), name="cooling") for one in self._cooling]
        tasks.append(asyncio.create_task(self.handler.recall.answers.run(), name="answers"))
        tasks.append(asyncio.create_task(self.limiter.run(self.view.snapshot), name="limits"))
        try:
            yield
        finally:
            self.stopping = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.handler.errands.mirror.close()
            await self.demand.report()
            await self.refusals.flush()
            await self.ledger.close()
            await self.upstream.close()

    async def exposition(self) -> bytes:
        """The numbers of this gateway, of all its processes."""
        if self.numbers is not None:
            with contextlib.suppress(Unavailable):
                return await self.numbers.exposition()
        return self.meter.exposition()

    def cut(self) -> None:
        """End every running request, telling its client why."""
        count = self.handler.cut_all(Unavailable("the gateway is stopping", retry_after_s=1.0))
        if count:
            _log.warning("requests_cut", extra={"fields": {"count": count}})


def _counters(settings: GatewaySettings, clock: Clock, place: Place | None) -> Counters:
    """Where limits are counted. Raises BadSetting and MissingExtra."""
    if not settings.limits_url:
        return LocalCounters(clock) if place is None else SharedCounters(place.channel)
    from cloudlm.gateway.counters_redis import Outage, RedisCounters

    refuse = settings.limits_after_outage == "refuse"
    outage = Outage(settings.limits_share, settings.limits_outage_s, refuse)
    return RedisCounters(settings.limits_url, clock, outage)


def _cooling(
    settings: GatewaySettings,
    place: Place | None,
    pepper: bytes,
    heard: Callable[[str, float], None],
    clock: Clock,
) -> list[Cooling | RedisCooling]:
    """The ways to other processes and gateways. Raises BadSetting and MissingExtra."""
    found: list[Cooling | RedisCooling] = []
    if place is not None:
        found.append(Cooling(place.channel, heard))
    if settings.limits_url:
        from cloudlm.gateway.cooling_redis import RedisCooling

        channel = f"cloudlm:cooling:{keys.installation_mark(pepper)}"
        found.append(RedisCooling(settings.limits_url, channel, heard, clock))
    return found


def _guardrails(settings: GatewaySettings, home: Path, meter: Meter) -> LiveGuardrails | None:
    if not settings.guardrails:
        return None
    from cloudlm.gateway.live_guardrails import LiveGuardrails  # RE2 is for those who want it

    return LiveGuardrails(home / Path(settings.guardrails).expanduser(), meter)


def make_server(gateway: Gateway) -> GatewayServer:
    """The server of a gateway: inference on the straight path, the rest through ASGI. Serve inside
    ``gateway.running()``."""
    settings = gateway.settings
    handle, bridge = gateway.handler.handle, Bridge(make_app(gateway))

    def answer(request: GatewayRequest) -> Awaitable[GatewayResponse]:
        return bridge(request) if request.path in _PLAIN_PATHS else handle(request)

    site = Site(
        answer=answer,
        refuse=_refuse,
        guard=HostGuard(settings.host, settings.allowed_origins),
        max_body_bytes=settings.max_body_bytes,
        stuck_after_s=settings.idle_timeout_s,
        compress_min_bytes=settings.compress_min_bytes,
        turn_away=gateway.shedding.refuse,
    )
    return GatewayServer(
        site,
        drain_timeout_s=settings.drain_timeout_s,
        cut=gateway.cut,
        tls=gateway.door.context,
        accepts_at_once=ACCEPTS_AT_ONCE if settings.workers == 1 else ACCEPTS_SHARED,
    )


def _refuse(error: CloudlmError, headers: dict[str, str]) -> GatewayResponse:
    """The answer to a request that was not read to its end."""
    return refusal(error, {"x-request-id": request_id(headers)})


def _status(gateway: Gateway) -> str:
    """In words why requests are taken or not."""
    if gateway.stopping:
        return "stopping"
    if gateway.view.ready:
        return "ready"
    return "the state was not read yet, or cannot be reached for too long"


def make_app(gateway: Gateway) -> Starlette:
    """The ASGI application for what is not inference."""

    async def livez(_: Request) -> Response:
        return PlainTextResponse("ok")

    async def readyz(_: Request) -> Response:
        said = {"ready": gateway.ready, "status": _status(gateway), "notes": gateway.notes()}
        return JSONResponse(said, 200 if gateway.ready else 503)

    async def metrics(_: Request) -> Response:
        return Response(await gateway.exposition(), media_type=gateway.meter.content_type)

    async def ping(_: Request) -> Response:
        """As TorchServe and SageMaker ask for ``readyz``."""
        said, status = ("Healthy", 200) if gateway.ready else ("Unhealthy", 503)
        return JSONResponse({"status": said}, status)

    async def v2_live(_: Request) -> Response:
        return JSONResponse({"live": True})

    async def v2_ready(_: Request) -> Response:
        return JSONResponse({"ready": gateway.ready}, 200 if gateway.ready else 503)

    async def described(_: Request) -> Response:
        return JSONResponse(openapi.document())

    routes = {
        openapi.PATH: described,
        "/livez": livez,
        "/readyz": readyz,
        "/health": readyz,
        "/metrics": metrics,
        "/ping": ping,
        "/v2/health/live": v2_live,
        "/v2/health/ready": v2_ready,
    }
    assert routes.keys() == _PLAIN_PATHS
    return Starlette(routes=[Route(path, route) for path, route in routes.items()])
