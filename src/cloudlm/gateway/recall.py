"""Answering again what was answered before, and once what is asked many times at once.

``Recall`` says what the handler may take from the ``cache``; a ``Question`` is one request there.
The first of several equal questions leads and asks a replica; the others wait for its whole answer.
A leader that gives up hands over to the next; one whose replicas fail lets all go on by themselves,
for an error is nobody's answer. Only what a client got to its end is kept. Must not decide who may
ask, nor choose, send or retry.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

from cloudlm.core.chat import Usage
from cloudlm.core.clock import Clock
from cloudlm.core.settings import GatewaySettings
from cloudlm.core.tenant import Outcome
from cloudlm.gateway import cache
from cloudlm.gateway.account import Attempt, Exchange
from cloudlm.gateway.cache import Answer, AnswerStore
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.exchange import GatewayRequest, GatewayResponse
from cloudlm.gateway.flight import Flight, Recorded, Turn
from cloudlm.gateway.ledger import Ledger
from cloudlm.gateway.view import ServedModel, View
from cloudlm.security import keys

CACHE_HEADER = "x-cloudlm-cache"
LARGEST_QUESTION_BYTES = 256 * 1024
_PRIVATE = {"cache-control": "private, no-cache", "vary": "authorization, x-api-key"}


class Version(NamedTuple):
    """What answers under a model's name: a deployment, told by its birth too from an earlier one of
    the same name, and its revision."""

    model: str
    created_at: float
    revision: int


class Recall:
    """The answers of one gateway. ``headers`` makes an exchange's headers with some more."""

    def __init__(
        self,
        settings: GatewaySettings,
        pepper: bytes,
        clock: Clock,
        view: View,
        ledger: Ledger,
        headers: Callable[[Exchange, dict[str, str]], dict[str, str]],
    ) -> None:
        self.clock = clock
        self.ledger = ledger
        self.headers = headers
        self.store = AnswerStore(settings.cache_mb * 1024 * 1024, settings.cache_ttl_s)
        self.flights: dict[bytes, Flight] = {}
        self._view = view
        self._names = tuple(filter(None, map(str.strip, settings.cache_models.split(","))))
        self._tenant_key = lru_cache(4096)(lambda tenant: keys.answer_key(tenant, pepper))

    def question(
        self, exchange: Exchange, request: GatewayRequest, call: Call, model: ServedModel
    ) -> Question:
        """What the cache knows of a request that may use ``model``."""
        key = version = None
        if self._serves(model.name):
            version = version_of(model)
            if version is not None and not _unwanted(request.headers):
                key = self._key(exchange, request, call, version)
            exchange.headers[CACHE_HEADER] = "bypass" if key is None else "miss"
        return Question(self, exchange, request.headers.get("if-none-match", ""), key, version)

    def _serves(self, model: str) -> bool:
        return any(
            model.startswith(name[:-1]) if name.endswith("*") else model == name
            for name in self._names
        )

    def _key(
        self, exchange: Exchange, request: GatewayRequest, call: Call, version: Version
    ) -> bytes | None:
        """The question's key, None if its answer must not be used again."""
        if len(request.body) > LARGEST_QUESTION_BYTES:
            return None
        if call.private:
            return None
        if not call.generates and call.operation is not Operation.EMBEDDING:
            return None
        body = openai.decode(call.body)
        if body is None or (call.generates and not cache.deterministic(body)):
            return None
        assert exchange.key is not None
        # Answers are kept as they were written for the client: what a replica is asked says it for
        # OpenAI's own API but for the usage shown, for others nothing less than path and body.
        form = bytes((call.include_usage, call.continuous_usage))
        parts = (
            repr(version).encode(),
            call.policy.encode(),
            call.path.encode(),
            request.path.encode("utf-8", "surrogatepass"),
            request.query.encode("utf-8", "surrogatepass"),
            cache.canonical(body),
            form if request.path == call.path else request.path.encode() + b"\0" + request.body,
        )
        return cache.question_key(self._tenant_key(exchange.key.tenant), parts)

    def version_now(self, model: str) -> Version | None:
        """What serves under a name at this moment, see ``version_of``."""
        served = self._view.snapshot().models.get(model)
        return version_of(served) if served is not None else None

    def end(self, key: bytes, flight: Flight, how: Answer | Turn) -> None:
        """A flight is over: later questions begin anew."""
        if self.flights.get(key) is flight:
            del self.flights[key]
        flight.end(how)


class Question:
    """One request beside the cache; without a ``key`` the cache has no part in it."""

    def __init__(
        self,
        recall: Recall,
        exchange: Exchange,
        condition: str,
        key: bytes | None,
        version: Version | None,
    ) -> None:
        self._recall = recall
        self._exchange = exchange
        self._condition = condition
        self._key = key
        self._version = version

    def known(self) -> GatewayResponse | None:
        """The response out of the store, if it has the answer."""
        if self._key is None:
            return None
        answer = self._recall.store.get(self._key, self._recall.clock.monotonic())
        return None if answer is None else self._give(answer, "hit")

    async def ask(self, serve: Callable[[], Awaitable[GatewayResponse]]) -> GatewayResponse:
        """The response of ``serve``, or of another one that asks the same now. Raises what
        ``serve`` raises and what cuts the exchange."""
        recall, key = self._recall, self._key
        if key is None:
            return await serve()
        while (flight := recall.flights.get(key)) is not None:
            end = await flight.wait(self._exchange)
            if isinstance(end, Answer):
                return self._give(end, "coalesced")
            if end is Turn.ALONE:
                response = await serve()
                return GatewayResponse(200, {**response.headers, **_PRIVATE}, response.body)
        return self.known() or await self._lead(key, serve)

    async def _lead(
        self, key: bytes, serve: Callable[[], Awaitable[GatewayResponse]]
    ) -> GatewayResponse:
        flight = self._recall.flights[key] = Flight()
        self._exchange.at_leave(lambda: self._left(key, flight))
        response = await serve()
        headers = {**response.headers, **_PRIVATE}
        if not isinstance(response.body, bytes):
            limit = self._recall.store.largest_bytes
            content_type = response.headers["content-type"]

            def whole(body: bytes | None) -> None:
                self._land(key, flight, body, content_type)

            return GatewayResponse(200, headers, Recorded(response.body, whole, limit, self._done))
        answer = self._land(key, flight, response.body, headers["content-type"])
        if answer is not None:
            headers["etag"] = answer.tag
        return GatewayResponse(200, headers, response.body)

    def _done(self) -> bool:
        return self._exchange.outcome is Outcome.FINISHED

    def _left(self, key: bytes, flight: Flight) -> None:
        """The leader's exchange ended. If not with an answer, then either for reasons of its own
        (the client, its key, a limit), which are not those of the next, or because replicas
        failed, and each may try for itself; so too if it asks another model (no outcome yet)."""
        outcome = self._exchange.outcome
        if outcome is not Outcome.FINISHED:
            how = Turn.ALONE if outcome in (Outcome.FAILED, None) else Turn.NEXT
            self._recall.end(key, flight, how)

    def _land(
        self, key: bytes, flight: Flight, body: bytes | None, content_type: str
    ) -> Answer | None:
        """The leader has its answer: keep it and hand it to those who wait. None if it is none to
        keep: too large, or another version gave it than the one that was asked for."""
        recall, exchange = self._recall, self._exchange
        answer = None
        if body is not None and self._same_version():
            answer = Answer(body, content_type, exchange.usage, cache.entity_tag(key, body))
            recall.store.put(key, answer, recall.clock.monotonic())
        recall.end(key, flight, answer or Turn.ALONE)
        return answer

    def _same_version(self) -> bool:
        asked, answered = self._version, self._exchange.revision
        assert asked is not None
        return answered == asked.revision and self._recall.version_now(asked.model) == asked

    def _give(self, answer: Answer, how: str) -> GatewayResponse:
        """An answer that no replica gives: a ledger row of its own, all its prompt cached."""
        exchange, usage = self._exchange, answer.usage
        exchange.headers[CACHE_HEADER] = how
        exchange.attempts += 1
        attempt = Attempt(exchange, self._recall.ledger, lambda: None)
        known = bool(self._condition) and cache.matches(self._condition, answer.tag)
        status = 304 if known else 200
        if not known:
            attempt.first_content()
            prompt = usage.prompt_tokens
            attempt.relayed(Usage(prompt, usage.completion_tokens, prompt))
        attempt.settle(Outcome.CACHED, status)
        exchange.end(Outcome.CACHED, status)
        headers = {**self._recall.headers(exchange, {}), **_PRIVATE, "etag": answer.tag}
        if known:
            return GatewayResponse(status, headers)
        headers["content-type"] = answer.content_type
        return GatewayResponse(status, headers, answer.body)


def version_of(model: ServedModel) -> Version | None:
    """What serves a model. None while no revision does or several do: then each answers its share,
    and no answer is for all."""
    revisions = {endpoint.revision for endpoint in model.endpoints}
    if len(revisions) != 1:
        return None
    return Version(model.name, model.created_at, revisions.pop())


def _unwanted(headers: Mapping[str, str]) -> bool:
    """Whether the client wants a new answer, or none kept."""
    wanted = {one.strip().lower() for one in headers.get("cache-control", "").split(",")}
    return not wanted.isdisjoint({"no-cache", "no-store", "max-age=0"})
