"""The one handler of the inference API, to be read from top to bottom.

authorise → parse and validate → reserve → known? → admit → choose → send → relay → account.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from cloudlm.core.access import Verb
from cloudlm.core.clock import Clock
from cloudlm.core.deployment import Endpoint
from cloudlm.core.errors import (
    AuthenticationFailed,
    CloudlmError,
    InternalError,
    ModelAsleep,
    NoReplica,
    RequestCancelled,
    Retry,
    UpstreamFailed,
)
from cloudlm.core.settings import GatewaySettings
from cloudlm.core.tenant import KeyRecord, Outcome
from cloudlm.gateway.account import Attempt, Exchange, status_of
from cloudlm.gateway.demand import DemandReporter
from cloudlm.gateway.dialects import openai, routes
from cloudlm.gateway.dialects.base import Asker, Dialect, Route
from cloudlm.gateway.dialects.openai import Call
from cloudlm.gateway.exchange import GatewayRequest, GatewayResponse, header_safe, request_id
from cloudlm.gateway.gate import Gate
from cloudlm.gateway.known import KnownKeys, Tenants
from cloudlm.gateway.ledger import Ledger
from cloudlm.gateway.limiter import Limiter
from cloudlm.gateway.meter import Meter
from cloudlm.gateway.people import People
from cloudlm.gateway.prefixes import block_keys
from cloudlm.gateway.recall import Recall
from cloudlm.gateway.relay import Relay
from cloudlm.gateway.resume import RESUMABLE, Resumer, may_help
from cloudlm.gateway.retry import RetryBudget, full_jitter
from cloudlm.gateway.router import Loads, choose
from cloudlm.gateway.upstream import Answer, ReplicaRefused, Upstream
from cloudlm.gateway.view import ServedModel, Snapshot, View
from cloudlm.security import keys
from cloudlm.security.tokens import looks_signed
from cloudlm.telemetry.logs import get_logger, request_id_var

NO_REPLICA_RETRY_AFTER_S = 2.0
ASLEEP_RETRY_AFTER_S = 30.0
LARGE_BODY_BYTES = 256 * 1024
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Rooms:
    """All that the handler works with; assembled in ``app``."""

    settings: GatewaySettings
    pepper: bytes
    clock: Clock
    view: View
    limiter: Limiter
    gate: Gate
    loads: Loads
    demand: DemandReporter
    upstream: Upstream
    ledger: Ledger
    meter: Meter
    weights: Mapping[str, float] = field(default_factory=dict)
    people: People | None = None
    fraction: Callable[[], float] = random.random
    refused: Callable[[GatewayRequest, Exchange, CloudlmError], None] = lambda *_: None


class Handler:
    """Answers requests of the inference API."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._budgets: dict[str, RetryBudget] = {}
        self._open: set[Exchange] = set()
        self._keys = KnownKeys()
        self._tenants = Tenants(rooms.pepper, rooms.weights)
        self.recall = Recall(
            rooms.settings, rooms.pepper, rooms.clock, rooms.view, rooms.ledger, self._headers
        )
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
        exchange.at_end(lambda: self._open.discard(exchange))
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
        view = self._rooms.view.snapshot()
        exchange.key = self._keys.find(request.headers, view, self._rooms.clock.now())
        if exchange.key is None:
            exchange.key = await self._authorise(request, view)
            self._keys.remember(request.headers, exchange.key)
            view = self._rooms.view.snapshot()  # a look again may have brought a newer one
        route.check(request)
        asker = self._asker(exchange.key, view)
        if route.parse is None:
            return self._listed(exchange, route, request, name, asker)
        if len(request.body) < LARGE_BODY_BYTES:
            call = route.parse(request, name, asker)
        else:  # in a thread, so that reading a megabyte of token ids holds up nobody else
            call = await asyncio.to_thread(route.parse, request, name, asker)
        known = view.models.get(call.model)
        if known is None or not known.endpoints or known.asleep:
            view = await self._rooms.view.look_again()
        model = view.model(call.model, exchange.key)
        self._expect(exchange, model)
        ticket = self._rooms.gate.ticket(exchange, request.headers, may_lead=asker.may_lead)
        ticket.weight = self._rooms.weights.get(exchange.key.tenant, 1.0)
        ticket.cost = await self._rooms.limiter.reserve(exchange, call, view)
        question = self.recall.question(exchange, request, call, model)
        answer = question.known()
        if answer is not None:
            return answer
        await self._rooms.gate.enter(ticket, exchange)
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

    def _expect(self, exchange: Exchange, model: ServedModel) -> None:
        """Count a request for a model, served or not. Raises NoReplica if there is none."""
        rooms = self._rooms
        exchange.model = model.name
        rooms.demand.count(model.name)
        if not model.endpoints:
            raise NoReplica(
                f"model {model.name!r} is deployed but none of its replicas is ready yet "
                "(starting…); try again in a few seconds",
                retry_after_s=NO_REPLICA_RETRY_AFTER_S,
            )
        if model.asleep:
            raise ModelAsleep(
                f"model {model.name!r} is asleep: its memory was given back, and no request wakes "
                f"it; 'cloudlm wake {model.parent or model.name}' does",
                retry_after_s=ASLEEP_RETRY_AFTER_S,
            )
        rooms.meter.entered(model.name)
        exchange.at_end(lambda: rooms.meter.left(model.name))

    async def _serve(self, exchange: Exchange, call: Call) -> GatewayResponse:
        """Try replicas until one answers, the attempts or the budget are used up, or none is
        left; then the last replica's verdict stands."""
        budget = self._budgets.setdefault(call.model, RetryBudget())
        budget.count_request(self._rooms.clock.monotonic())
        tried: set[str] = set()
        if exchange.key is not None:
            exchange.prompt_keys = block_keys(call.body, exchange.key.tenant)
        endpoint = self._choose(exchange, call, tried)
        if endpoint is None:
            raise NoReplica(
                f"no replica of {call.model!r} takes requests now",
                retry_after_s=NO_REPLICA_RETRY_AFTER_S,
            )
        while True:
            tried.add(endpoint.replica)
            try:
                return await self._attempt(exchange, call, endpoint)
            except CloudlmError as error:
                if not self._may_retry(exchange, call, error, tried, budget):
                    raise
                last = error
            wait_s = full_jitter(exchange.attempts, self._rooms.fraction())
            with exchange.interrupt:
                await self._rooms.clock.sleep(wait_s)
            endpoint = self._choose(exchange, call, tried)
            if endpoint is None:
                raise last
            self._rooms.meter.retried(call.model)

    async def _attempt(self, exchange: Exchange, call: Call, endpoint: Endpoint) -> GatewayResponse:
        rooms, replica = self._rooms, endpoint.replica
        exchange.attempts += 1
        exchange.replica = replica
        exchange.revision = endpoint.revision
        blocks = rooms.loads.begin(replica, exchange.prompt_keys, rooms.clock.monotonic())
        exchange.route = f"least-cost; known={len(exchange.prompt_keys) - blocks}"
        attempt = Attempt(exchange, rooms.ledger, lambda: rooms.loads.end(replica, blocks))
        said = self._said(exchange) | (RESUMABLE if call.stream else {})
        answer: Answer | None = None
        try:
            deadline = rooms.clock.monotonic() + rooms.settings.first_token_timeout_s
            with exchange.interrupt:
                answer = await rooms.upstream.send(
                    endpoint.url + call.path,
                    call.body,
                    said,
                    replica=replica,
                    timeout_s=rooms.settings.first_token_timeout_s,
                    now=rooms.clock.now(),
                )
                if call.stream:
                    revision = endpoint.revision
                    resumer = Resumer(rooms, exchange, call, revision, said, self._judge)
                    relay = Relay(exchange, attempt, answer, call, rooms.settings, resumer)
                    await relay.begin(deadline)
                    rooms.loads.answered(replica)
                    headers = {"content-type": relay.content_type, **_STREAM_HEADERS}
                    return GatewayResponse(200, self._headers(exchange, headers), relay)
                raw = await answer.whole(max(deadline - rooms.clock.monotonic(), 0.0))
            answer.close()
            return self._whole(exchange, attempt, call, raw)
        except BaseException as error:
            if answer is not None:
                answer.close()
            known = error if isinstance(error, CloudlmError) else None
            if isinstance(error, asyncio.CancelledError):
                known = RequestCancelled("the request was cancelled")
            if known is not None:
                self._judge(replica, known)
            attempt.fail(known or InternalError("the gateway failed"))
            raise

    def _judge(self, replica: str, error: CloudlmError) -> None:
        """Remember what a failed attempt says about its replica."""
        now = self._rooms.clock.monotonic()
        if isinstance(error, ReplicaRefused):
            if error.retry_after_s:
                self._rooms.loads.cool(replica, now + error.retry_after_s)
            elif error.answered_status >= 500 and error.elsewhere:
                self._rooms.loads.failed(replica, now)
        elif error.retry is Retry.ELSEWHERE:
            self._rooms.loads.failed(replica, now)

    def _whole(
        self, exchange: Exchange, attempt: Attempt, call: Call, raw: bytes
    ) -> GatewayResponse:
        """An answer that came in one piece."""
        body = openai.decode(raw)
        field = call.result_field
        if body is None or (field is not None and not isinstance(body.get(field), list)):
            raise UpstreamFailed(f"replica {exchange.replica} sent an answer that is no answer")
        if openai.is_aborted(body):
            raise UpstreamFailed("a replica gave up on the answer")
        usage = openai.usage_of(body)
        answer = openai.rendering(call).whole(body)
        if call.generates:
            attempt.first_content()
        if field is not None and usage is not None:
            attempt.relayed(usage)
        self._rooms.loads.answered(exchange.replica)
        attempt.settle(Outcome.FINISHED, 200)
        exchange.end(Outcome.FINISHED, 200)
        headers = self._headers(exchange, {"content-type": "application/json"})
        return GatewayResponse(200, headers, answer)

    # What the path asks ---------------------------------------------------------------------------

    def _choose(self, exchange: Exchange, call: Call, tried: set[str]) -> Endpoint | None:
        """The replica for the next attempt, out of those that serve at this moment."""
        model = self._rooms.view.snapshot().models.get(call.model)
        return choose(
            model.endpoints if model is not None else (),
            self._rooms.loads,
            self._rooms.clock.monotonic(),
            tried=tried,
            retrying=bool(tried),
            keys=exchange.prompt_keys,
        )

    def _may_retry(
        self,
        exchange: Exchange,
        call: Call,
        error: CloudlmError,
        tried: set[str],
        budget: RetryBudget,
    ) -> bool:
        return (
            may_help(error)
            and exchange.attempts < self._rooms.settings.max_attempts
            and self._choose(exchange, call, tried) is not None
            and budget.take(self._rooms.clock.monotonic())
        )

    def _asker(self, key: KeyRecord, view: Snapshot) -> Asker:
        """Who asks, as a dialect may know it."""
        return Asker(
            functools.partial(self._tenants.salted, key.tenant),
            view.directory.may_infer(key, "", Verb.LEAD),
            lambda: sorted(view.models_of(key), key=lambda model: model.name),
            lambda name: view.model(name, key),
        )

    def _listed(
        self, exchange: Exchange, route: Route, request: GatewayRequest, name: str, asker: Asker
    ) -> GatewayResponse:
        """An answer out of what the gateway knows itself."""
        assert route.read is not None
        body = openai.encode(route.read(request, name, asker))
        exchange.end(Outcome.FINISHED, 200)
        headers = self._headers(exchange, {"content-type": "application/json"})
        return GatewayResponse(200, headers, body)

    def _refusal(
        self, exchange: Exchange, error: CloudlmError, dialect: Dialect
    ) -> GatewayResponse:
        status = status_of(error)
        if status >= 500:
            fields = {"model": exchange.model, "status": status, "reason": error.message}
            _log.warning("request_not_answered", extra={"fields": fields})
        return refusal(error, self._headers(exchange, {}), dialect)

    def _headers(self, exchange: Exchange, more: dict[str, str]) -> dict[str, str]:
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
        headers = {"x-request-id": exchange.request_id}
        if exchange.key is not None:
            headers |= self._tenants.facts(exchange.key.tenant).headers
        return headers

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
                ):
                    exchange.interrupt.cut(keys.invalid_key())
        self._rooms.loads.keep_only(
            {endpoint.replica for model in view.models.values() for endpoint in model.endpoints}
        )
        for name in [name for name in self._budgets if name not in view.models]:
            del self._budgets[name]

    def cut_all(self, error: CloudlmError) -> int:
        """End every open exchange with ``error``; returns how many there were."""
        exchanges = list(self._open)
        for exchange in exchanges:
            exchange.interrupt.cut(error)
        return len(exchanges)


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
