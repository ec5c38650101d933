"""The one handler of the inference API, to be read from top to bottom.

authorise → parse, validate → reserve → screen → known? → admit → choose → send → relay → account.

Knows no web framework: it takes a ``GatewayRequest`` and returns a ``GatewayResponse``. Every
request ends exactly once, every attempt leaves exactly one ledger row. Must not decide how to
route, limit, admit or retry; it asks ``router``, ``limits``, ``admission`` and ``retry``, which are
pure.
"""

from __future__ import annotations

import asyncio
import functools
import math
import random
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from cloudlm.core.access import Verb
from cloudlm.core.clock import Clock
from cloudlm.core.deployment import Endpoint
from cloudlm.core.errors import (
    AuthenticationFailed,
    CloudlmError,
    InternalError,
    ModelAsleep,
    ModelTooLarge,
    NoReplica,
    PermissionDenied,
    RequestCancelled,
    Retry,
    UpstreamFailed,
)
from cloudlm.core.routing import Policy
from cloudlm.core.settings import GatewaySettings
from cloudlm.core.tenant import KeyRecord, Outcome
from cloudlm.gateway.account import Attempt, Exchange, status_of
from cloudlm.gateway.courses import LARGE_BODY_BYTES, Course, Courses
from cloudlm.gateway.demand import DemandReporter
from cloudlm.gateway.dialects import openai, routes
from cloudlm.gateway.dialects.base import Asker, Dialect, Route
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.exchange import GatewayRequest, GatewayResponse, header_safe, request_id
from cloudlm.gateway.gate import PRIORITY_HEADER, Gate
from cloudlm.gateway.hedge import Race, quickest
from cloudlm.gateway.interrupt import Interrupt
from cloudlm.gateway.known import KnownKeys, Tenants
from cloudlm.gateway.ledger import Ledger
from cloudlm.gateway.limiter import Limiter
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.meter import Meter
from cloudlm.gateway.mirror import Mirror
from cloudlm.gateway.model_routes import ModelRoute
from cloudlm.gateway.people import People
from cloudlm.gateway.prefixes import block_keys
from cloudlm.gateway.recall import Recall
from cloudlm.gateway.relay import Relay
from cloudlm.gateway.resume import RESUMABLE, Resumer, may_help
from cloudlm.gateway.retry import HedgeBudget, RetryBudget, full_jitter
from cloudlm.gateway.router import choose, may_retry
from cloudlm.gateway.sender import Sender
from cloudlm.gateway.sessions import session_of
from cloudlm.gateway.split import choose_side, mark_of
from cloudlm.gateway.upstream import Answer, Declined, ReplicaRefused, Unreachable
from cloudlm.gateway.view import ServedModel, Snapshot, View
from cloudlm.gateway.waiting import Waiting
from cloudlm.security import keys
from cloudlm.security.tokens import looks_signed
from cloudlm.telemetry.damping import Damper
from cloudlm.telemetry.logs import get_logger, request_id_var

if TYPE_CHECKING:
    from cloudlm.gateway.semantic.likeness import Likeness
    from cloudlm.security.guardrails.config import Moderation

NO_REPLICA_RETRY_AFTER_S = 2.0
ASLEEP_RETRY_AFTER_S = 30.0
_BY_SESSION = Policy.SESSION_AFFINITY
_SAID = {policy: policy.value.replace("_", "-") for policy in Policy}
_JSON = {"content-type": "application/json"}
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

_log = get_logger(__name__)


class Screen(Protocol):
    """What looks at requests and answers between client and model: ``guardrails``."""

    @property
    def moderation(self) -> Moderation: ...

    async def screen(self, exchange: Exchange, call: Call, model: ServedModel) -> Call: ...


@dataclass(frozen=True, slots=True)
class Rooms:
    """All that the handler works with; assembled in ``app``."""

    settings: GatewaySettings
    pepper: bytes
    tenants: Tenants
    clock: Clock
    view: View
    limiter: Limiter
    gate: Gate
    waiting: Waiting
    loads: Loads
    demand: DemandReporter
    upstream: Sender
    ledger: Ledger
    meter: Meter
    weights: Mapping[str, float] = field(default_factory=dict)
    likeness: Likeness | None = None
    routes: Mapping[str, ModelRoute] = field(default_factory=dict)
    people: People | None = None
    fraction: Callable[[], float] = random.random
    guardrails: Screen | None = None
    refused: Callable[[GatewayRequest, Exchange, CloudlmError], None] = lambda *_: None
    cooled: Callable[[str, float], None] = lambda *_: None


class Handler:
    """Answers requests of the inference API."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._budgets: dict[str, RetryBudget] = {}
        self._damper = Damper()
        self._hedges: dict[str, HedgeBudget] = {}
        self._open: set[Exchange] = set()
        self.known = KnownKeys()
        self._tenants = rooms.tenants
        self.recall = Recall(
            rooms.settings,
            rooms.pepper,
            rooms.clock,
            rooms.view,
            rooms.ledger,
            self._headers,
            rooms.weights,
            rooms.likeness,
        )
        self._courses = Courses(rooms, self._budget)
        self.mirror = Mirror(self._attempt, rooms.view, rooms.loads, rooms.clock, rooms.meter)
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
        self._open.add(exchange)
        exchange.at_end(functools.partial(self._open.discard, exchange))
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
        exchange.key = self.known.find(request.headers, view, rooms.clock.now())
        if exchange.key is None:
            exchange.key = await self._authorise(request, view)
            self.known.remember(request.headers, exchange.key)
            view = rooms.view.snapshot()  # a look again may have brought a newer one
        route.check(request)
        asker = self._asker(exchange.key, view)
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
            return await self._serve(exchange, call)
        return await question.ask(lambda: self._serve(exchange, call))

    async def _authorise(self, request: GatewayRequest, view: Snapshot) -> KeyRecord:
        """The key's record. Missing, malformed, unknown and revoked keys cost the same work and
        get the same answer. Every well-formed key that fails is looked up once more, known or
        not, so that the time says nothing either."""
        try:
            text = keys.bearer(
                request.headers.get("authorization"), request.headers.get("x-api-key")
            )
        except AuthenticationFailed:
            text = ""
        if self._rooms.people is not None and looks_signed(text):
            return await self._rooms.people.session(text)
        key_id = keys.key_id(text)
        if key_id is None:
            return keys.verify(text, None, self._rooms.pepper, 0.0)
        try:
            return self._verified(text, key_id, view)
        except AuthenticationFailed:
            return self._verified(text, key_id, await self._rooms.view.look_again())

    def _verified(self, text: str, key_id: str, view: Snapshot) -> KeyRecord:
        rooms = self._rooms
        record = keys.verify(text, view.keys.get(key_id), rooms.pepper, rooms.clock.now())
        if not view.directory.stands(record):
            raise keys.invalid_key()
        return record

    def _expect(
        self, exchange: Exchange, call: Call, model: ServedModel, *, may_hold: bool
    ) -> float | None:
        """Count a request for a model, served or not. Returns how long it may be held for a first
        replica, None if it need not. Raises NoReplica if there is none and none to wait for."""
        rooms = self._rooms
        exchange.model = model.name
        rooms.demand.count(model.name, len(call.body))
        held_s = None
        if model.asleep:
            raise ModelAsleep(
                f"model {model.name!r} is asleep: its memory was given back, and no request wakes "
                f"it; 'cloudlm wake {model.parent or model.name}' does",
                retry_after_s=ASLEEP_RETRY_AFTER_S,
            )
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

    def _budget(self, model: str) -> RetryBudget:
        budget = self._budgets.get(model)
        if budget is None:
            budget = self._budgets[model] = RetryBudget()
        return budget

    async def _serve(self, exchange: Exchange, call: Call) -> GatewayResponse:
        """Try replicas until one answers, the attempts or the budget are used up, or none is
        left; then the last replica's verdict stands."""
        rooms = self._rooms
        budget = self._budget(call.model)
        budget.count_request(rooms.clock.monotonic())
        if exchange.routing.hedge_after_s:
            self._hedges.setdefault(call.model, HedgeBudget()).count_request()
        tried: set[str] = set()
        exchange.declined = ()  # by another model's replicas, before a course turned
        if exchange.key is not None:
            exchange.prompt_keys = block_keys(call.body, exchange.key.tenant)
        model = rooms.view.snapshot().models.get(call.model)
        if model is not None and model.beside:
            self.mirror.watch(exchange, call, model)
        endpoint = self._choose(exchange, call, tried)
        if endpoint is None:
            raise NoReplica(
                f"no replica of {call.model!r} takes requests now",
                retry_after_s=NO_REPLICA_RETRY_AFTER_S,
            )
        hedged = bool(exchange.routing.hedge_after_s)
        while True:
            tried.add(endpoint.replica)
            try:
                if hedged:
                    return await self._hedged(exchange, call, endpoint, tried)
                return await self._attempt(exchange, call, endpoint)
            except CloudlmError as error:
                if not self._may_retry(exchange, call, error, tried, budget):
                    raise
                last = error
            wait_s = full_jitter(exchange.attempts, rooms.fraction())
            with exchange.interrupt:
                await rooms.clock.sleep(wait_s)
            # Not before the wait: others have chosen, failed and asked for time meanwhile.
            endpoint = self._choose(exchange, call, tried)
            if endpoint is None:
                raise last
            rooms.meter.retried(call.model)

    async def _hedged(
        self, exchange: Exchange, call: Call, endpoint: Endpoint, tried: set[str]
    ) -> GatewayResponse:
        """One attempt, and another beside it if it is slow."""
        after_s = exchange.routing.hedge_after_s
        race = Race()

        def second() -> Coroutine[Any, Any, GatewayResponse] | None:
            other = self._hedge(exchange, call, tried)
            return None if other is None else self._attempt(exchange, call, other, race)

        first = self._attempt(exchange, call, endpoint, race)
        return await quickest(first, second, after_s, exchange.interrupt, _discard)

    async def _attempt(
        self, exchange: Exchange, call: Call, endpoint: Endpoint, race: Race | None = None
    ) -> GatewayResponse:
        rooms, replica = self._rooms, endpoint.replica
        exchange.attempts += 1
        exchange.replica = replica
        exchange.revision = endpoint.revision
        turn = rooms.loads.begin(replica, exchange.prompt_keys, rooms.clock.monotonic())
        had = len(exchange.prompt_keys) - turn.blocks
        route = f"{_SAID[exchange.routing.policy]}; known={had}"
        if exchange.asked:
            route += f"; via={exchange.asked}"
        exchange.route = route
        attempt = Attempt(exchange, rooms.ledger, lambda: rooms.loads.end(replica, turn))
        said = self._said(exchange)
        if call.stream:
            said |= RESUMABLE
        answer: Answer | None = None

        def win() -> None:
            if race is not None:
                race.claim()
            exchange.replica, exchange.revision = replica, endpoint.revision
            exchange.route = route

        timeout_s = rooms.settings.first_token_timeout_s
        try:
            deadline = rooms.clock.monotonic() + timeout_s
            with exchange.interrupt if race is None else Interrupt():
                answer = await rooms.upstream.send(
                    endpoint,
                    call.path,
                    call.body,
                    said,
                    timeout_s=timeout_s,
                    now=rooms.clock.now(),
                )
                if call.stream:
                    resumer = Resumer(rooms, exchange, call, endpoint, said, self._judge)
                    relay = Relay(exchange, attempt, answer, call, rooms.settings, resumer)
                    await relay.begin(deadline)
                    win()
                    rooms.loads.computed(replica, turn)
                    self._answered(exchange)
                    headers = {"content-type": relay.content_type, **_STREAM_HEADERS}
                    return GatewayResponse(200, self._headers(exchange, headers), relay)
                raw = await answer.whole(max(deadline - rooms.clock.monotonic(), 0.0))
            answer.close()
            return self._whole(exchange, attempt, call, raw, win)
        except BaseException as error:
            if answer is not None:
                answer.close()
            known = error if isinstance(error, CloudlmError) else None
            if isinstance(error, asyncio.CancelledError):
                known = exchange.interrupt.error or RequestCancelled("the request was cancelled")
            if known is not None:
                self._judge(replica, known)
            if isinstance(known, Declined):
                exchange.declined += (replica,)
            attempt.fail(known or InternalError("the gateway failed"))
            raise

    def _judge(self, replica: str, error: CloudlmError) -> None:
        """Remember what a failed attempt says about its replica. That it declined the request says
        something only once another answers: ``_answered``."""
        now = self._rooms.clock.monotonic()
        if isinstance(error, ReplicaRefused):
            if error.retry_after_s:
                self._rooms.loads.cool(replica, now + error.retry_after_s)
                self._rooms.cooled(replica, error.retry_after_s)
            elif error.answered_status >= 500 and error.elsewhere:
                self._rooms.loads.failed(replica, now)
        elif error.retry is Retry.ELSEWHERE and not isinstance(error, Declined):
            away = isinstance(error, Unreachable)
            self._rooms.loads.failed(replica, now, unreachable=away)

    def _answered(self, exchange: Exchange) -> None:
        """The exchange's replica answers; whoever declined the request could have done so too."""
        loads, now = self._rooms.loads, self._rooms.clock.monotonic()
        loads.answered(exchange.replica)
        for replica in exchange.declined:
            loads.declined(replica, now)
        exchange.declined = ()

    def _whole(
        self,
        exchange: Exchange,
        attempt: Attempt,
        call: Call,
        raw: bytes,
        win: Callable[[], None],
    ) -> GatewayResponse:
        """An answer that came in one piece. It stands once ``win`` has not raised."""
        body = openai.decode(raw)
        generates, field = call.generates, call.result_field
        if body is None or (field is not None and not isinstance(body.get(field), list)):
            raise UpstreamFailed(f"replica {exchange.replica} sent an answer that is no answer")
        if openai.is_aborted(body):
            raise UpstreamFailed("a replica gave up on the answer")
        usage = openai.usage_of(body)
        answer = openai.rendering(call).whole(body)
        win()
        if generates:
            attempt.first_content()
        if field is not None and usage is not None:
            attempt.relayed(usage)
        self._answered(exchange)
        attempt.finish()
        exchange.finish()
        return GatewayResponse(200, self._headers(exchange, _JSON), answer)

    # What the path asks ---------------------------------------------------------------------------

    def _choose(
        self, exchange: Exchange, call: Call, tried: set[str], *, stay: bool = False
    ) -> Endpoint | None:
        """The replica for the next attempt, out of those that serve at this moment. With ``stay``
        only of the revision that the request falls to."""
        rooms = self._rooms
        model = rooms.view.snapshot().models.get(call.model)
        among = choose
        if model is not None and model.split:
            mark = mark_of(exchange.session or exchange.request_id.encode(), model.name)
            among = functools.partial(choose_side, mark=mark, stay=stay)
        return among(
            model.endpoints if model is not None else (),
            rooms.loads,
            rooms.clock.monotonic(),
            tried=tried,
            retrying=bool(tried),
            keys=exchange.prompt_keys,
            policy=exchange.routing.policy,
            session=exchange.session,
            draws=(rooms.fraction(), rooms.fraction()),
        )

    def _hedge(self, exchange: Exchange, call: Call, tried: set[str]) -> Endpoint | None:
        """The replica for an attempt beside a slow one, if there may be one: a trusted one."""
        rooms = self._rooms
        if exchange.attempts >= rooms.settings.max_attempts:
            return None
        other = self._choose(exchange, call, tried, stay=True)
        if other is None or rooms.loads.of(other.replica).failures:
            return None
        budget = self._hedges.get(call.model)  # none once the model is gone
        if budget is None or not budget.take():
            return None
        tried.add(other.replica)
        rooms.meter.hedged(call.model)
        return other

    def _may_retry(
        self,
        exchange: Exchange,
        call: Call,
        error: CloudlmError,
        tried: set[str],
        budget: RetryBudget,
    ) -> bool:
        """Whether there shall be another attempt after ``error``; if so, it is counted."""
        rooms = self._rooms
        if not may_help(error) or exchange.attempts >= rooms.settings.max_attempts:
            return False
        now = rooms.clock.monotonic()
        model = rooms.view.snapshot().models.get(call.model)
        there = model.endpoints if model is not None else ()
        return may_retry(there, rooms.loads, now, tried) and budget.take(now)

    def _asker(self, key: KeyRecord, view: Snapshot) -> Asker:
        """Who asks, as a dialect may know it."""
        return Asker(
            functools.partial(self._tenants.salted, key.tenant),
            lambda name: view.directory.may_infer(key, name, Verb.LEAD),
            lambda: sorted(view.models_of(key), key=lambda model: model.name),
            lambda name: view.model(name, key),
            guardrails.moderation if (guardrails := self._rooms.guardrails) is not None else None,
        )

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
        return GatewayResponse(200, self._headers(exchange, _JSON), body)

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
        return refusal(error, self._headers(exchange, {}), dialect)

    def _headers(self, exchange: Exchange, more: Mapping[str, str]) -> dict[str, str]:
        """Who served the request, for every answer."""
        headers = {"x-request-id": exchange.request_id, **exchange.headers, **more}
        if exchange.model:
            headers["x-cloudlm-model"] = header_safe(exchange.model)
        if exchange.replica:
            headers["x-cloudlm-replica"] = header_safe(exchange.replica)
            headers["x-cloudlm-attempts"] = str(exchange.attempts)
            headers["x-cloudlm-route"] = exchange.route
        return headers

    def _said(self, exchange: Exchange) -> dict[str, str]:
        """What a replica is told about the request besides its body."""
        own = {"x-request-id": exchange.request_id}
        if exchange.key is None:
            return own
        return own | self._tenants.facts(exchange.key.tenant).headers

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
        for name in [name for name in self._budgets if name not in view.models]:
            del self._budgets[name]
            self._hedges.pop(name, None)

    def cut_all(self, error: CloudlmError) -> int:
        """End every open exchange with ``error``; returns how many there were."""
        exchanges = list(self._open)
        for exchange in exchanges:
            exchange.interrupt.cut(error)
        return len(exchanges)


async def _discard(response: GatewayResponse) -> None:
    """Nobody takes a response any more."""
    if not isinstance(response.body, bytes):
        await response.body.aclose()


def refusal(
    error: CloudlmError, headers: dict[str, str], dialect: Dialect = openai.DIALECT
) -> GatewayResponse:
    """The response that says ``error``."""
    headers["content-type"] = "application/json"
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, AuthenticationFailed):
        headers["www-authenticate"] = "Bearer"
    return GatewayResponse(
        status_of(error), headers, msgspec.json.encode(dialect.error_body(error))
    )
