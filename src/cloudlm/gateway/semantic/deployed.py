"""A deployment that serves embeddings as the embedder of the semantic cache.

Each vector is one attempt at one replica with a ledger row of its own, at the price of that model,
for the tenant whose request it is. Bounded in time; after a failure nobody asks for a moment. A
revision that gives other vectors than the calibrated one is not used. Must not know what the
vectors are for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cloudlm.core.clock import Clock
from cloudlm.core.deployment import Endpoint
from cloudlm.core.errors import CloudlmError, InternalError, RequestCancelled, UpstreamFailed
from cloudlm.core.tenant import Outcome
from cloudlm.gateway.account import Attempt, Exchange
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.openai import Operation
from cloudlm.gateway.known import Tenants
from cloudlm.gateway.ledger import Ledger
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.router import choose
from cloudlm.gateway.semantic.meaning import Meaning
from cloudlm.gateway.semantic.vectors import unit
from cloudlm.gateway.sender import Sender
from cloudlm.gateway.version import Version, version_of
from cloudlm.gateway.view import View
from cloudlm.telemetry.logs import get_logger

PROBE = "The quick brown fox jumps over the lazy dog 12 times."
"""What a fingerprint is the vector of."""
SAME_VECTORS = 0.999
PAUSE_S = 1.0

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Means:
    """What it takes to ask a replica."""

    view: View
    loads: Loads
    upstream: Sender
    ledger: Ledger
    tenants: Tenants
    clock: Clock
    price: Callable[[Exchange, str], None]
    count: Callable[[str], None]


class DeployedEmbedder:
    """See the module. ``fingerprint`` is the calibrated vector of PROBE."""

    def __init__(
        self, name: str, fingerprint: tuple[float, ...], timeout_s: float, means: Means
    ) -> None:
        self.name = name
        self._fingerprint = unit(fingerprint)
        self._timeout_s = timeout_s
        self._means = means
        self._checked: tuple[Version, bool] | None = None
        self._checking = asyncio.Lock()
        self._paused_until = float("-inf")

    def identity(self) -> bytes | None:
        """Whose vectors these are now; None while there are none, or of two revisions."""
        model = self._means.view.snapshot().models.get(self.name)
        version = version_of(model) if model is not None else None
        paused = self._means.clock.monotonic() < self._paused_until
        if version is None or paused or self._checked == (version, False):
            return None
        return repr(version).encode()

    async def vector(self, text: str, meaning: Meaning, exchange: Exchange) -> Any | None:
        """The unit vector of ``text``, None if it cannot be had now."""
        try:
            async with asyncio.timeout(self._timeout_s):
                if not await self._is_calibrated(exchange):
                    return None
                return await self._ask(text, exchange)
        except (CloudlmError, TimeoutError) as error:
            if error is exchange.interrupt.error:  # not the embedder's fault
                raise
            self._paused_until = self._means.clock.monotonic() + PAUSE_S
            _log.warning("embedder_unavailable", extra={"fields": {"reason": repr(error)[:200]}})
            return None

    async def _is_calibrated(self, exchange: Exchange) -> bool:
        model = self._means.view.snapshot().models.get(self.name)
        version = version_of(model) if model is not None else None
        if version is None:
            return False
        async with self._checking:
            if self._checked is None or self._checked[0] != version:
                vector = await self._ask(PROBE, exchange)
                fits = vector.shape == self._fingerprint.shape
                good = fits and float(vector @ self._fingerprint) >= SAME_VECTORS
                self._checked = (version, good)
                if not good:
                    fields = {"embedder": self.name, "revision": version.revision}
                    _log.warning("embedder_not_the_calibrated_one", extra={"fields": fields})
            return self._checked[1]

    async def _ask(self, text: str, exchange: Exchange) -> Any:
        """One attempt. Raises CloudlmError."""
        means = self._means
        assert exchange.key is not None
        means.count(self.name)
        view = means.view.snapshot()
        if not view.may_use(exchange.key, self.name):  # nothing of a tenant goes where it may not
            raise UpstreamFailed(f"the key may not use {self.name!r}")
        model = view.models.get(self.name)
        now = means.clock.monotonic()
        endpoint = choose(model.endpoints if model is not None else (), means.loads, now)
        if endpoint is None:
            raise UpstreamFailed(f"no replica of {self.name!r} takes requests now")
        aside = Exchange(exchange.request_id, exchange.clock, exchange.meter)
        aside.key, aside.model, aside.replica = exchange.key, self.name, endpoint.replica
        aside.attempts = 1
        means.price(aside, self.name)
        turn = means.loads.begin(endpoint.replica, (), now)
        attempt = Attempt(aside, means.ledger, lambda: means.loads.end(endpoint.replica, turn))
        try:
            with exchange.interrupt:
                vector = await self._send(endpoint, text, aside, attempt)
        except BaseException as error:
            known = error if isinstance(error, CloudlmError) else InternalError("not embedded")
            cut = isinstance(error, asyncio.CancelledError)
            attempt.fail(RequestCancelled("not waited for") if cut else known)
            raise
        finally:
            exchange.cost += aside.cost
            exchange.tokens_aside += aside.usage.prompt_tokens
        return vector

    async def _send(self, endpoint: Endpoint, text: str, aside: Exchange, attempt: Attempt) -> Any:
        means, key = self._means, aside.key
        assert key is not None
        facts = means.tenants.facts(key.tenant)
        body = {"model": self.name, "input": text, "cache_salt": facts.salt}
        answer = await means.upstream.send(
            endpoint,
            Operation.EMBEDDING.value,
            openai.encode(body),
            {"x-request-id": aside.request_id, **facts.headers},
            timeout_s=self._timeout_s,
            now=means.clock.now(),
        )
        try:
            said = openai.decode(await answer.whole(self._timeout_s)) or {}
        finally:
            answer.close()
        vectors = openai.vectors_of(said) if isinstance(said.get("data"), list) else []
        try:
            vector = unit(vectors[0])
        except (IndexError, TypeError, ValueError):
            raise UpstreamFailed(f"{self.name!r} sent no vector") from None
        usage = openai.usage_of(said)
        if usage is not None:
            attempt.relayed(usage)
        attempt.settle(Outcome.FINISHED, 200)
        means.loads.answered(aside.replica)
        return vector
