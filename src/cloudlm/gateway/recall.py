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
from typing import TYPE_CHECKING

from cloudlm.core.chat import Usage
from cloudlm.core.clock import Clock
from cloudlm.core.settings import GatewaySettings
from cloudlm.core.tenant import Outcome
from cloudlm.gateway import cache
from cloudlm.gateway.account import Attempt, Exchange
from cloudlm.gateway.answers import Answers, LocalAnswers
from cloudlm.gateway.asked import Asked, repeatable
from cloudlm.gateway.cache import Answer
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.exchange import GatewayRequest, GatewayResponse
from cloudlm.gateway.flight import Flight, Recorded, Turn
from cloudlm.gateway.ledger import Ledger
from cloudlm.gateway.version import Version, version_of
from cloudlm.gateway.view import ServedModel, View
from cloudlm.security import keys
from cloudlm.security.access import covers_name

if TYPE_CHECKING:
    from cloudlm.gateway.semantic.likeness import LastTurn, Likeness

CACHE_HEADER = "x-cloudlm-cache"
_VARY = {"vary": "authorization, x-api-key"}
_NOT_KEPT = {"cache-control": "no-store", **_VARY}
_PRIVATE = {"cache-control": "private, no-cache", **_VARY}


class Recall:
    """The answers of one gateway. ``headers`` makes an exchange's headers with some more,
    ``weights`` are the tenants' shares of the memory."""

    def __init__(
        self,
        settings: GatewaySettings,
        pepper: bytes,
        clock: Clock,
        view: View,
        ledger: Ledger,
        headers: Callable[[Exchange, dict[str, str]], dict[str, str]],
        weights: Mapping[str, float],
        likeness: Likeness | None = None,
    ) -> None:
        self.clock = clock
        self.ledger = ledger
        self.headers = headers
        self.flights: dict[bytes, Flight] = {}
        self._view = view
        self.likeness = likeness
        self._semantic = read_names(settings.semantic_models)
        self._names = read_names(settings.cache_models) + self._semantic
        self._tenant_key = lru_cache(4096)(lambda tenant: keys.answer_key(tenant, pepper))
        self._shared = _shared_headers(settings)
        self.answers = self._open(settings, weights)

    def _open(self, settings: GatewaySettings, weights: Mapping[str, float]) -> Answers:
        max_bytes, ttl_s = settings.cache_mb * 1024 * 1024, settings.cache_ttl_s
        local = LocalAnswers(max_bytes, ttl_s, weights, self.clock)
        if not settings.cache_url:
            return local
        from cloudlm.gateway.answers_redis import RedisAnswers, Seal

        return RedisAnswers(settings.cache_url, local, Seal(self._tenant_key), ttl_s, self.clock)

    def has_part(self, model: str) -> bool:
        """Whether answers of a model may be known."""
        return bool(self._names) and serves(self._names, model)

    def question(
        self, exchange: Exchange, request: GatewayRequest, call: Call, model: ServedModel
    ) -> Question | None:
        """What the cache knows of a request that may use ``model``, None if it has no part."""
        if not self.has_part(model.name):
            return None
        version = version_of(model)
        body = None if version is None else repeatable(request, call)
        if version is None or body is None:
            exchange.headers[CACHE_HEADER] = "bypass"
            return None
        exchange.headers[CACHE_HEADER] = "miss"
        assert exchange.key is not None
        tenant_key = self._tenant_key(exchange.key.tenant)
        asked = Asked(tenant_key, exchange, request, call, version, body)
        http = self._shared if request.method == "GET" else _PRIVATE
        return Question(self, exchange, request.headers.get("if-none-match", ""), asked, http)

    def compares(self, asked: Asked) -> Likeness | None:
        """The semantic cache, if it has a part in a question."""
        if self.likeness is None or not serves(self._semantic, asked.version.model):
            return None
        chat = asked.call.operation is Operation.CHAT and asked.path == asked.call.path
        return self.likeness if chat else None

    def version_now(self, model: str) -> Version | None:
        """What serves under a name at this moment, see ``version_of``; None where that is not known
        because the state is away for too long."""
        if not self._view.ready:
            return None
        served = self._view.snapshot().models.get(model)
        return version_of(served) if served is not None else None

    def end(self, key: bytes, flight: Flight, how: Answer | Turn) -> None:
        """A flight is over: later questions begin anew."""
        if self.flights.get(key) is flight:
            del self.flights[key]
        flight.end(how)


class Question:
    """One request that the cache has a part in. ``http`` says what other caches may do."""

    def __init__(
        self,
        recall: Recall,
        exchange: Exchange,
        condition: str,
        asked: Asked,
        http: Mapping[str, str],
    ) -> None:
        self._recall = recall
        self._exchange = exchange
        self._condition = condition
        self._asked = asked
        self._place, self._version = asked.place, asked.version
        self._http = http
        self._turn: LastTurn | None = None

    async def known(self) -> GatewayResponse | None:
        """The response out of what is kept, if it has the answer, or that of a question that means
        the same. Raises what cuts the exchange."""
        answer = await self._recall.answers.get(self._place)
        if answer is not None:
            return self._give(answer, "hit")
        likeness = self._recall.compares(self._asked)
        if likeness is None or self._place.key in self._recall.flights:  # its own answer comes
            return None
        return await self._alike(likeness)

    async def _alike(self, likeness: Likeness) -> GatewayResponse | None:
        asked = self._asked
        self._turn = await likeness.turn(asked.body, asked.key, self._exchange)
        place = likeness.find(self._turn) if self._turn is not None else None
        if place is None:
            return None
        answer = await self._recall.answers.get(place)
        likeness.found(place, answer is not None)
        if answer is None:
            return None
        self._condition = ""  # what is known of another question is for now alone
        self._http = _NOT_KEPT
        return self._give(answer, "semantic")

    async def ask(self, serve: Callable[[], Awaitable[GatewayResponse]]) -> GatewayResponse:
        """The response of ``serve``, or of another one that asks the same now. Raises what
        ``serve`` raises and what cuts the exchange."""
        recall, key = self._recall, self._place.key
        while (flight := recall.flights.get(key)) is not None:
            end = await flight.wait(self._exchange)
            if isinstance(end, Answer):
                return self._give(end, "coalesced")
            if end is Turn.ALONE:
                response = await serve()
                return GatewayResponse(200, {**response.headers, **_NOT_KEPT}, response.body)
        answer = recall.answers.near(self._place)
        return self._give(answer, "hit") if answer is not None else await self._lead(key, serve)

    async def _lead(
        self, key: bytes, serve: Callable[[], Awaitable[GatewayResponse]]
    ) -> GatewayResponse:
        flight = self._recall.flights[key] = Flight()
        self._exchange.at_leave(lambda: self._left(key, flight))
        response = await serve()
        headers = {**response.headers, **_NOT_KEPT}  # a stream may yet break, and say so
        if not isinstance(response.body, bytes):
            limit = self._recall.answers.largest_bytes
            content_type = response.headers["content-type"]

            def whole(body: bytes | None) -> None:
                self._land(key, flight, body, content_type)

            return GatewayResponse(200, headers, Recorded(response.body, whole, limit, self._done))
        answer = self._land(key, flight, response.body, headers["content-type"])
        if answer is not None:
            headers |= {**self._http, "etag": answer.tag}
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
            recall.answers.put(self._place, answer)
            if self._turn is not None and recall.likeness is not None:
                recall.likeness.keep(self._turn, self._place)
        recall.end(key, flight, answer or Turn.ALONE)
        return answer

    def _same_version(self) -> bool:
        asked, answered = self._version, self._exchange.revision
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
        outcome = Outcome.SEMANTIC if how == "semantic" else Outcome.CACHED
        attempt.settle(outcome, status)
        exchange.end(outcome, status)
        headers = {**self._recall.headers(exchange, {}), **self._http}
        if how != "semantic":
            headers["etag"] = answer.tag
        if known:
            return GatewayResponse(status, headers)
        headers["content-type"] = answer.content_type
        return GatewayResponse(status, headers, answer.body)


def read_names(text: str) -> tuple[str, ...]:
    """The names in ``name, begin*, …``."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def serves(names: tuple[str, ...], model: str) -> bool:
    """Whether ``names`` hold a model's name or its beginning."""
    return any(covers_name(name, model) for name in names)


def _shared_headers(settings: GatewaySettings) -> dict[str, str]:
    """What caches between gateway and clients may do with the answer to a GET."""
    longest_s = int(min(settings.cache_max_age_s, settings.cache_ttl_s))
    how = f"max-age={longest_s}, must-revalidate" if longest_s else "no-cache"
    return {"cache-control": f"public, {how}", **_VARY}
