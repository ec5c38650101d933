"""Copies of requests for a revision that is being tried out: the answers are thrown away.

A copy is sent once its request was answered well, so that it can neither delay nor break anything
for its client, who has nothing to do with it any more: it may have gone away. Copies are few
(AT_ONCE; more are left out, not kept waiting). Each leaves a ledger row like any attempt, from
which control judges the revision, under the key MIRROR_KEY, as attempt 0, at no price: nobody is
billed and no budget is touched. Must not touch the exchange that it copies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from cloudlm.core.access import DEFAULT_TENANT
from cloudlm.core.clock import Clock
from cloudlm.core.deployment import Endpoint
from cloudlm.core.errors import CloudlmError
from cloudlm.core.tenant import KeyRecord, Outcome, Role
from cloudlm.gateway.account import Exchange
from cloudlm.gateway.dialects.openai import Call
from cloudlm.gateway.exchange import GatewayResponse
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.meter import Meter
from cloudlm.gateway.router import choose
from cloudlm.gateway.split import mark_of
from cloudlm.gateway.view import ServedModel, View
from cloudlm.telemetry.logs import get_logger

AT_ONCE = 8
"""Copies that one gateway process has under way."""
LONGEST_S = 600.0
MIRROR_KEY = "@mirror"
"""No key has this id."""

Attempting = Callable[[Exchange, Call, Endpoint], Awaitable[GatewayResponse]]
_log = get_logger(__name__)


class Mirror:
    """The copies of one gateway process. ``attempt`` sends a request to a replica."""

    def __init__(
        self, attempt: Attempting, view: View, loads: Loads, clock: Clock, meter: Meter
    ) -> None:
        self._attempt = attempt
        self._view = view
        self._loads = loads
        self._clock = clock
        self._meter = meter
        self._aside = Meter()  # copies are no requests: their numbers are not shown as such
        self._copies: dict[asyncio.Task[None], None] = {}  # in the order in which they came

    def watch(self, exchange: Exchange, call: Call, model: ServedModel) -> None:
        """A request is about to be served; copy it afterwards if it falls to the mirror."""
        who = exchange.session or exchange.request_id.encode()
        if is_copied(model.beside, who, call.model):
            exchange.at_end(lambda: self._begin(exchange, call))

    def _begin(self, exchange: Exchange, call: Call) -> None:
        if exchange.outcome is not Outcome.FINISHED or exchange.model != call.model:
            return
        if len(self._copies) >= AT_ONCE:
            self._meter.not_mirrored(call.model)
            return
        self._meter.mirrored(call.model)
        copying = self._copy(exchange.request_id, replace(call, translate=None))
        task = asyncio.get_running_loop().create_task(copying)
        self._copies[task] = None
        task.add_done_callback(lambda done: self._copies.pop(done, None))

    async def _copy(self, request_id: str, call: Call) -> None:
        model = self._view.snapshot().models.get(call.model)
        if model is None:
            return
        endpoint = choose_for_copy(model.beside, self._loads, self._clock.monotonic())
        if endpoint is None:
            return
        aside = Exchange(request_id, self._clock, self._aside)
        aside.key, aside.model = _key(model.tenant or DEFAULT_TENANT), call.model
        aside.is_copy = True
        try:
            async with asyncio.timeout(LONGEST_S):
                await _read(await self._attempt(aside, call, endpoint))
        except (CloudlmError, TimeoutError) as error:  # its row says so
            _log.debug("mirror_failed", extra={"fields": {"reason": repr(error)[:200]}})
        except Exception:
            _log.exception("mirror_failed")

    async def close(self) -> None:
        """Break off what is under way; each copy leaves its row."""
        copies = list(self._copies)
        for task in copies:
            task.cancel()
        await asyncio.gather(*copies, return_exceptions=True)


def is_copied(beside: Iterable[Endpoint], who: bytes, model: str) -> bool:
    """Whether the request of ``who`` falls to the mirror: pure. ``beside`` are the replicas that
    take no new requests."""
    part = max((one.mirror for one in beside if one.weight > 0), default=0.0)
    return part > 0 and mark_of(who, model, copy=True) < part


def choose_for_copy(beside: Iterable[Endpoint], loads: Loads, now: float) -> Endpoint | None:
    """The replica that gets a copy, if there is one: pure."""
    return choose([one for one in beside if one.mirror > 0], loads, now)


async def _read(response: GatewayResponse) -> None:
    """Take an answer to its end."""
    body = response.body
    if isinstance(body, bytes):
        return
    try:
        async for _ in body:
            pass
    finally:
        await body.aclose()


def _key(tenant: str) -> KeyRecord:
    """In whose name a copy is sent: that of who keeps the deployment."""
    return KeyRecord(MIRROR_KEY, "mirror", Role.USER, "", "", tenant=tenant)
