"""The one handler of the inference API, to be read from top to bottom.

authorise → parse, validate → reserve → screen → known? → admit → choose → send → relay → account.

Knows no web framework: it takes a ``GatewayRequest`` and returns a ``GatewayResponse``. Every
request ends exactly once, every attempt leaves exactly one ledger row. Must not decide how to
limit or admit; it asks ``limits`` and ``admission``, which are pure. ``entrance`` knows who asks,
``errands`` sends to replicas, ``replies`` says who answered.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Final

from cloudlm.core.errors import (
    CloudlmError,
    InternalError,
    ModelTooLarge,
    NoReplica,
    PermissionDenied,
    RequestCancelled,
)
from cloudlm.core.routing import Policy
from cloudlm.core.tenant import Outcome
from cloudlm.gateway.account import Exchange, status_of
from cloudlm.gateway.courses import LARGE_BODY_BYTES, Course, Courses
from cloudlm.gateway.dialects import openai, routes
from cloudlm.gateway.dialects.base import Asker, Dialect, Route
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.entrance import Entrance
from cloudlm.gateway.errands import NO_REPLICA_RETRY_AFTER_S, Errands
from cloudlm.gateway.exchange import GatewayRequest, GatewayResponse, request_id
from cloudlm.gateway.gate import PRIORITY_HEADER
from cloudlm.gateway.recall import Recall
from cloudlm.gateway.replies import JSON, headers_of, refusal
from cloudlm.gateway.rooms import Rooms
from cloudlm.gateway.sessions import session_of
from cloudlm.gateway.sleeping import asleep
from cloudlm.gateway.view import ServedModel, Snapshot
from cloudlm.security import keys
from cloudlm.telemetry.damping import Damper
from cloudlm.telemetry.logs import get_logger, request_id_var

_BY_SESSION: Final = Policy.SESSION_AFFINITY

_log = get_logger(__name__)


class Handler:
    """Answers requests of the inference API."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._damper = Damper()
        self._open: dict[Exchange, None] = {}  # in the order in which they came
        self.entrance = Entrance(rooms)
        self.errands = Errands(rooms)
        self.recall = Recall(
            rooms.settings,
            rooms.pepper,
            rooms.clock,
            rooms.view,
            rooms.ledger,
            headers_of,
            rooms.weights,
            rooms.likeness,
        )
        self._courses = Courses(rooms, self.errands.budget)
        rooms.view.on_change.append(self._follow)

    # The straight path ---------------------------------------------------------------------------

    async def handle(self, request: GatewayRequest) -> GatewayResponse:
        """Answer one request; never raises but for cancellation."""
        rooms = self._rooms
        exchange = Exchange(request_id(request.headers), rooms.clock, rooms.meter)
        request_id_var.set(exchange.request_id)
        request.disconnected.add_done_callback(
            lambda _: exchange.interrupt.cut(RequestCancelled("the client went away"))
        )
        self._open[exchange] = None
        exchange.at_end(functools.partial(self._open.pop, exchange, None))
        route, name = routes.find(request)
        try:
            return await self._answer(exchange, request, route, name)
        except CloudlmError as error:
            self._rooms.refused(request, exchange, error)
            exchange.fail(error)
            return self._refusal(exchange, error, route.dialect)
        except asyncio.CancelledError:
            exchange.end(Outcome.CANCELLED, RequestCancelled.status)
            raise
        except Exception:
            _log.exception("request_failed", extra={"fields": {"path": request.path}})
            fault = InternalError(f"the gateway failed; its log knows {exchange.request_id}")
            exchange.fail(fault)
            return self._refusal(exchange, fault, route.dialect)

    async def _answer(
        self, exchange: Exchange, request: GatewayRequest, route: Route, name: str
    ) -> GatewayResponse:
        rooms = self._rooms
        view = rooms.view.snapshot()
        exchange.key = self.entrance.known(request.headers, view, exchange.started_at)
        if exchange.key is None:
            exchange.key = await self.entrance.authorise(request, view)
            view = rooms.view.snapshot()  # a look again may have brought a newer one
        route.check(request)
        asker = self.entrance.asker(exchange.key, view)
        if route.unfold is not None:
            exchange.headers["cache-control"] = "no-store"  # unless what follows says better
            request = route.unfold(request)
        parse = route.parse or (route.perhaps and route.perhaps(request, asker))
        if parse is None:
            return await self._listed(exchange, route, request, name, asker)
        if len(request.body) < LARGE_BODY_BYTES:
            call = parse(request, name, asker)
        else:  # in a thread, so that reading a megabyte of token ids holds up nobody else
            call = await asyncio.to_thread(parse, request, name, asker)
        course = self._courses.direct(call)
        if course is None:
            course = await self._courses.of(exchange, request.headers, call)
        while True:
            try:
                return await self._ask(exchange, request, course, asker)
            except CloudlmError as error:
                if not self._courses.turn(course, exchange, error):
                    raise

    async def _ask(
        self, exchange: Exchange, request: GatewayRequest, course: Course, asker: Asker
    ) -> GatewayResponse:
        """Ask the model that the course is at."""
        rooms, key = self._rooms, exchange.key
        assert key is not None
        call, view = course.asked or await course.call(), rooms.view.snapshot()
        known = view.models.get(call.model)
        if (known is None or not known.endpoints or known.asleep) and not course.may_turn:
            view = await rooms.view.look_again()
        model = view.deployed(call.model, key)
        held_s = self._expect(exchange, call, model, may_hold=not course.may_turn)
        may_lead = PRIORITY_HEADER in request.headers and asker.may_lead(model.name)
        ticket = rooms.gate.ticket(exchange, request.headers, may_lead=may_lead, held_s=held_s)
        ticket.weight = rooms.weights.get(key.tenant, 1.0)
        if course.tokens is None:
            course.tokens = await rooms.limiter.reserve(exchange, call, view, course.others)
        else:
            rooms.limiter.price(exchange, call.model)
        ticket.cost = float(course.tokens)
        self._note_routing(exchange, request, call, model)
        if rooms.guardrails is not None:
            call = course.screened(await rooms.guardrails.screen(exchange, call, model))
        question = self.recall.question(exchange, request, call, model)
        answer = await question.known() if question is not None else None
        if answer is not None:
            return answer
        if held_s is not None:
            rooms.waiting.hold(model)
        await rooms.gate.enter(ticket, exchange)
        if question is None:
            return await self.errands.serve(exchange, call)
        return await question.ask(lambda: self.errands.serve(exchange, call))

    def _expect(
        self, exchange: Exchange, call: Call, model: ServedModel, *, may_hold: bool
    ) -> float | None:
        """Count a request for a model, served or not. Returns how long it may be held for a first
        replica, None if it need not. Raises NoReplica if there is none and none to wait for,
        ModelAsleep, ModelTooLarge."""
        rooms = self._rooms
        exchange.model = model.name
        rooms.demand.count(model.name, len(call.body))
        held_s = None
        if model.asleep:
            raise asleep(model)
        if not model.endpoints and model.too_large:
            raise ModelTooLarge(
                f"model {model.name!r} is deployed, but its machine's memory budget does not hold "
                f"it; 'cloudlm status {model.parent or model.name}' says what it needs"
            )
        if not model.endpoints and model.holds and may_hold:
            held_s = rooms.waiting.timeout_s
        elif not model.endpoints:
            raise NoReplica(
                f"model {model.name!r} is deployed but none of its replicas is ready yet "
                "(starting…); try again in a few seconds",
                retry_after_s=NO_REPLICA_RETRY_AFTER_S,
            )
        rooms.meter.entered(model.name)
        exchange.at_leave(functools.partial(rooms.meter.left, model.name))
        return held_s

    def _note_routing(
        self, exchange: Exchange, request: GatewayRequest, call: Call, model: ServedModel
    ) -> None:
        routing = exchange.routing = model.routing
        wants = routing.policy is _BY_SESSION or model.split or bool(model.beside)
        if wants and exchange.key is not None:
            tenant, header = exchange.key.tenant, routing.session_header
            exchange.session = session_of(tenant, request.headers, header, call.body)

    # What the path asks ---------------------------------------------------------------------------

    async def _listed(
        self, exchange: Exchange, route: Route, request: GatewayRequest, name: str, asker: Asker
    ) -> GatewayResponse:
        """An answer out of what the gateway knows itself."""
        assert route.read is not None
        if route.counted_as:  # reads as much text as a model would
            await self._count(exchange, route.counted_as, request.body)
            found = await asyncio.to_thread(route.read, request, name, asker)
        else:
            found = route.read(request, name, asker)
        body = openai.encode(found)
        exchange.finish()
        return GatewayResponse(200, headers_of(exchange, JSON), body)

    async def _count(self, exchange: Exchange, name: str, body: bytes) -> None:
        """Rights and limits of what the gateway does itself. Raises PermissionDenied."""
        assert exchange.key is not None
        view = self._rooms.view.snapshot()
        if not view.directory.may_infer(exchange.key, name):
            raise PermissionDenied(f"this key may not use {name!r}")
        await self._rooms.limiter.reserve(exchange, Call(Operation.MODERATION, name, body), view)

    def _refusal(
        self, exchange: Exchange, error: CloudlmError, dialect: Dialect
    ) -> GatewayResponse:
        status = status_of(error)
        if status >= 500:
            reason = exchange.model, status, error.code, type(error)
            count = self._damper.take(reason, self._rooms.clock.monotonic())
            if count is not None:
                fields = {"model": exchange.model, "status": status, "reason": error.message}
                _log.warning("request_not_answered", extra={"fields": {**fields, "count": count}})
        return refusal(error, headers_of(exchange, {}), dialect)

    # What happens around it -----------------------------------------------------------------------

    def _follow(self, view: Snapshot) -> None:
        """Called when the state changed: cut what runs on revoked rights, forget what is gone."""
        for exchange in list(self._open):
            if exchange.key is not None:
                record = view.holder(exchange.key.id)
                if (
                    record is None
                    or not view.directory.stands(record)
                    or (exchange.model and not view.may_use(record, exchange.model))
                    or (exchange.asked and not view.directory.may_infer(record, exchange.asked))
                ):
                    exchange.interrupt.cut(keys.invalid_key())
        self._rooms.loads.keep_only(
            {
                endpoint.replica
                for model in view.models.values()
                for endpoint in (*model.endpoints, *model.beside)
            }
        )
        self.errands.keep_only(view.models)

    def cut_all(self, error: CloudlmError) -> int:
        """End every open exchange with ``error``; returns how many there were."""
        exchanges = list(self._open)
        for exchange in exchanges:
            exchange.interrupt.cut(error)
        return len(exchanges)
