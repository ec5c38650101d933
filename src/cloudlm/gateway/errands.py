"""One request on its way to replicas: until one answers, or the attempts, the budget or the
replicas are used up.

``retry`` and ``router`` decide, ``trust`` remembers how replicas did. Every attempt leaves exactly
one ledger row. Must not know who asks, nor reserve, admit or cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final

from cloudlm.core.deployment import Endpoint
from cloudlm.core.errors import (
    CloudlmError,
    InternalError,
    NoReplica,
    RequestCancelled,
    UpstreamFailed,
)
from cloudlm.core.routing import Policy
from cloudlm.gateway.account import Attempt, Exchange
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.openai import Call
from cloudlm.gateway.exchange import GatewayResponse
from cloudlm.gateway.hedge import Race, quickest
from cloudlm.gateway.interrupt import Interrupt
from cloudlm.gateway.mirror import Mirror
from cloudlm.gateway.prefixes import block_keys
from cloudlm.gateway.relay import Relay
from cloudlm.gateway.replies import JSON, headers_of
from cloudlm.gateway.resume import RESUMABLE, Resumer, may_help
from cloudlm.gateway.retry import HedgeBudget, RetryBudget, full_jitter
from cloudlm.gateway.rooms import Rooms
from cloudlm.gateway.router import choose, may_retry
from cloudlm.gateway.split import choose_side, mark_of
from cloudlm.gateway.trust import Trust
from cloudlm.gateway.upstream import Answer, Declined

NO_REPLICA_RETRY_AFTER_S: Final = 2.0
_SAID: Final = {policy: policy.value.replace("_", "-") for policy in Policy}
_STREAM_HEADERS: Final = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Errands:
    """Sends the requests of one gateway."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._tenants = rooms.tenants
        self._trust = Trust(rooms.loads, rooms.clock, rooms.cooled)
        self._budgets: dict[str, RetryBudget] = {}
        self._hedges: dict[str, HedgeBudget] = {}
        self.mirror = Mirror(self._attempt, rooms.view, rooms.loads, rooms.clock, rooms.meter)

    def budget(self, model: str) -> RetryBudget:
        """A model's budget for retries."""
        budget = self._budgets.get(model)
        if budget is None:
            budget = self._budgets[model] = RetryBudget()
        return budget

    async def serve(self, exchange: Exchange, call: Call) -> GatewayResponse:
        """Try replicas until one answers, the attempts or the budget are used up, or none is
        left; then the last replica's verdict stands."""
        rooms = self._rooms
        budget = self.budget(call.model)
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
        now = rooms.clock.monotonic()
        turn = rooms.loads.begin(replica, exchange.prompt_keys, now)
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
        deadline = now + timeout_s
        try:
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
                    resumer = Resumer(rooms, exchange, call, endpoint, said, self._trust.judge)
                    relay = Relay(exchange, attempt, answer, call, rooms.settings, resumer)
                    await relay.begin(deadline)
                    win()
                    rooms.loads.computed(replica, turn)
                    self._trust.answered(exchange)
                    headers = {"content-type": relay.content_type, **_STREAM_HEADERS}
                    return GatewayResponse(200, headers_of(exchange, headers), relay)
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
                self._trust.judge(replica, known)
            if isinstance(known, Declined):
                exchange.declined += (replica,)
            attempt.fail(known or InternalError("the gateway failed"))
            raise

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
        answer = openai.whole(call, body, raw)
        win()
        if generates:
            attempt.first_content()
        if field is not None and usage is not None:
            attempt.relayed(usage)
        self._trust.answered(exchange)
        attempt.finish()
        exchange.finish()
        return GatewayResponse(200, headers_of(exchange, JSON), answer)

    def _choose(
        self, exchange: Exchange, call: Call, tried: set[str], *, stay: bool = False
    ) -> Endpoint | None:
        """The replica for the next attempt, out of those that serve at this moment. With ``stay``
        only of the revision that the request falls to."""
        rooms = self._rooms
        model = rooms.view.snapshot().models.get(call.model)
        if model is None:
            return None
        retrying, draws = bool(tried), (rooms.fraction(), rooms.fraction())
        if not model.split:
            return choose(
                model.endpoints,
                rooms.loads,
                rooms.clock.monotonic(),
                tried=tried,
                retrying=retrying,
                keys=exchange.prompt_keys,
                policy=exchange.routing.policy,
                session=exchange.session,
                draws=draws,
            )
        return choose_side(
            model.endpoints,
            rooms.loads,
            rooms.clock.monotonic(),
            mark=mark_of(exchange.session or exchange.request_id.encode(), model.name),
            stay=stay,
            tried=tried,
            retrying=retrying,
            keys=exchange.prompt_keys,
            policy=exchange.routing.policy,
            session=exchange.session,
            draws=draws,
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

    def _said(self, exchange: Exchange) -> dict[str, str]:
        """What a replica is told about the request besides its body."""
        own = {"x-request-id": exchange.request_id}
        if exchange.key is None:
            return own
        return own | self._tenants.facts(exchange.key.tenant).headers

    def keep_only(self, models: Collection[str]) -> None:
        """Forget the budgets of models that are gone."""
        for name in [name for name in self._budgets if name not in models]:
            del self._budgets[name]
            self._hedges.pop(name, None)


async def _discard(response: GatewayResponse) -> None:
    """Nobody takes a response any more."""
    if not isinstance(response.body, bytes):
        await response.body.aclose()
