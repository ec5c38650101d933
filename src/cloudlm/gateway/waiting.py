"""Requests for models that have no replica at the moment and start one when asked.

They are *held*: they wait at the gate as others do, in order, each until its deadline, so many and
no more. This module says which models hold, tells control of the first request at once instead of
in the next second, and looks for the new endpoint as soon as it can be there. When it is there,
requests go to it as many at once as the deployment wants at a replica, until nobody waits: a
replica that was just started must not get the whole herd. Where so many come that always somebody
waits, it is sent twice as many every few seconds, until it is as any other. Must not start anything
or choose a replica.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass

from cloudlm.core.clock import Clock
from cloudlm.gateway.capacity import herd_is_over
from cloudlm.gateway.demand import DemandReporter
from cloudlm.gateway.gate import Gate
from cloudlm.gateway.view import ServedModel, Snapshot, View
from cloudlm.state.news import LOOK_S, SELDOM_S, News, PolledNews
from cloudlm.telemetry.logs import get_logger

DOUBLE_EVERY_S = 5.0
"""How often a replica that was just started is sent twice as many at once, while requests wait."""
GATHER_S = 0.005
"""How long the first report of a herd waits for the rest of it."""

_log = get_logger(__name__)


@dataclass(slots=True)
class _Held:
    """A model whose requests were held: how many a replica gets ``at_once``, and when that doubles
    (infinity: it has no replica)."""

    at_once: int
    double_at: float = math.inf


class Waiting:
    """Knows for which models requests are held now. ``timeout_s`` is the longest wait of a held
    request, seconds; ``news`` tells when there may be a replica."""

    def __init__(
        self,
        view: View,
        gate: Gate,
        demand: DemandReporter,
        clock: Clock,
        timeout_s: float,
        news: News | None = None,
    ) -> None:
        self._view = view
        self._gate = gate
        self._demand = demand
        self._clock = clock
        self._news = news or PolledNews(clock)
        self.timeout_s = timeout_s
        self._models: dict[str, _Held] = {}
        self._untold: set[str] = set()
        self._called = asyncio.Event()
        view.on_change.append(self._follow)

    @property
    def models(self) -> frozenset[str]:
        """The models for which requests are held, or were and are being let go one by one."""
        return frozenset(self._models)

    def hold(self, model: ServedModel) -> None:
        """A request for ``model`` comes to the gate next, to wait for its first replica."""
        if model.name not in self._models:
            held = self._models[model.name] = _Held(math.ceil(model.target_ongoing_requests))
            self._gate.narrow(model.name, held.at_once)
            _log.info("holding", extra={"fields": {"model": model.name}})
            self._untold.add(model.name)
            self._called.set()

    async def run(self) -> None:
        """Tell control at once of whoever is held, and look out for replicas, until cancelled."""
        while True:
            if not self._models:
                await self._called.wait()
            if self._called.is_set():
                await self._clock.sleep(GATHER_S)
                self._called.clear()
            try:
                untold = frozenset(self._untold)
                if untold and await self._demand.report():
                    self._untold -= untold
                await self._view.refresh()
                if self._view.ready:
                    self._let_go(self._view.snapshot().models)
            except Exception:
                _log.exception("holding_failed")
            await self._pause()

    async def _pause(self) -> None:
        """Until there may be news, or another model is asked for. Who waits at a replica that is
        there, and what could not be told, is looked at often: no write tells of that."""
        changes = self._untold or any(one.double_at < math.inf for one in self._models.values())
        news = asyncio.ensure_future(self._news.wait(LOOK_S if changes else SELDOM_S))
        called = asyncio.ensure_future(self._called.wait())
        try:
            await asyncio.wait((news, called), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in (news, called):
                one.cancel()
            await asyncio.gather(news, called, return_exceptions=True)
        if not news.cancelled() and news.exception() is not None:
            _log.error("news_failed", extra={"fields": {"reason": repr(news.exception())}})
            await self._clock.sleep(LOOK_S)

    def _follow(self, view: Snapshot) -> None:
        self._let_go(view.models)

    def _let_go(self, models: Mapping[str, ServedModel]) -> None:
        """Models that answer and for which nobody waits are as all others again."""
        now = self._clock.monotonic()
        for name, held in list(self._models.items()):
            served = models.get(name)
            answers = served is None or bool(served.endpoints)
            queued, ongoing = self._gate.queued(name), self._gate.ongoing(name)
            if herd_is_over(queued, ongoing, answers=answers):
                del self._models[name]
                self._gate.widen(name)
            elif not answers:
                held.double_at = math.inf
            elif held.double_at == math.inf:
                held.double_at = now + DOUBLE_EVERY_S
            elif held.double_at <= now:
                held.at_once, held.double_at = 2 * held.at_once, now + DOUBLE_EVERY_S
                self._gate.narrow(name, held.at_once)
