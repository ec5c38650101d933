"""The models that one request may be answered by, one after the other.

Most requests have one: the model that they name. One that names a route (``gateway.routes``) goes
to the model that ``model_routes`` says, and on to the next when that one fails, is overloaded or
has too small a window. A model that the key may not use is not there for it. Must not send: the
handler asks the models.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cloudlm.core.errors import (
    CloudlmError,
    ContextLengthExceeded,
    InternalError,
    ModelAsleep,
    NoReplica,
    Overloaded,
)
from cloudlm.core.routing import SESSION_HEADER
from cloudlm.gateway.account import Exchange
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.openai import Call
from cloudlm.gateway.model_routes import ModelRoute, order
from cloudlm.gateway.recall import CACHE_HEADER
from cloudlm.gateway.resume import may_help
from cloudlm.gateway.retry import RetryBudget
from cloudlm.gateway.router import available
from cloudlm.gateway.sessions import evenly, session_of
from cloudlm.gateway.upstream import ReplicaRefused
from cloudlm.telemetry.logs import get_logger

if TYPE_CHECKING:
    from cloudlm.gateway.rooms import Rooms

LARGE_BODY_BYTES = 256 * 1024
_TOO_LONG = "maximum context length"

_log = get_logger(__name__)


class Course:
    """One request's models; ``model`` is the one that is asked now. ``tokens`` are those reserved
    from limits for it, None before."""

    __slots__ = ("_call", "_later", "_longer", "model", "tokens")

    def __init__(self, call: Call, models: Iterable[str], longer: Sequence[str] = ()) -> None:
        self._call = call
        self.model, *self._later = models
        self._longer = [name for name in longer if name != self.model] if longer else []
        self.tokens: int | None = None

    @property
    def others(self) -> Collection[str]:
        """The models that may still be asked."""
        return {*self._later, *self._longer} if self._later or self._longer else ()

    @property
    def may_turn(self) -> bool:
        """Whether another model may be asked if this one has no replica."""
        return bool(self._later)

    @property
    def asked(self) -> Call | None:
        """What the model is asked, if that is what the client asked; else see ``call``."""
        return self._call if self._call.model == self.model else None

    async def call(self) -> Call:
        """What the model is asked: the client's call under the model's own name."""
        call = self._call
        if call.model == self.model:
            return call
        if len(call.body) < LARGE_BODY_BYTES:
            body = _named(call.body, self.model)
        else:  # in a thread, so that a megabyte of text holds up nobody else
            body = await asyncio.to_thread(_named, call.body, self.model)
        return replace(call, model=self.model, body=body)

    def screened(self, call: Call) -> Call:
        """Remember what guardrails made of the call: a model that is asked later gets that too, so
        that falling back leaves no policy behind."""
        self._call = call
        return call

    def next_after(self, error: CloudlmError) -> str | None:
        """The model that may do better after ``error``, None if there is none."""
        if is_too_long(error):
            return self._longer[0] if self._longer else None
        return self._later[0] if self._later and may_fall_back(error) else None

    def move_to(self, model: str, *, too_long: bool) -> None:
        """Ask ``model`` now; no model is asked twice. If the prompt was ``too_long``, only models
        with larger windows follow: the others would refuse it again."""
        self.model = model
        self._longer = [name for name in self._longer if name != model]
        later = self._longer if too_long else self._later
        self._later = [name for name in later if name != model]


class Courses:
    """Finds each request's course. ``budget`` is a model's budget for retries."""

    def __init__(self, rooms: Rooms, budget: Callable[[str], RetryBudget]) -> None:
        self._rooms = rooms
        self._routes: Mapping[str, ModelRoute] = rooms.routes
        self._budget = budget

    def direct(self, call: Call) -> Course | None:
        """The course of a request that names a model; None if it names a route."""
        return Course(call, (call.model,)) if call.model not in self._routes else None

    async def of(self, exchange: Exchange, headers: Mapping[str, str], call: Call) -> Course:
        """The course of a validated request that names a route. Raises ModelNotFound."""
        route = self._routes[call.model]
        assert exchange.key is not None
        key, rooms = exchange.key, self._rooms
        view = rooms.view.snapshot()
        if call.model not in view.routed:
            view = await rooms.view.look_again()
        view.model(call.model, key)  # whether the key may use the route, and a model of it
        route = route.only(lambda name: name in view.models and view.may_use(key, name))
        session = session_of(key.tenant, headers, SESSION_HEADER, call.body)
        draw = evenly(session) if session else rooms.fraction()
        models = order(route, self._health, draw) or route.longer[:1]
        exchange.asked = call.model
        self._count_absent(route, models[0])
        return Course(call, models, route.longer)

    def turn(self, course: Course, exchange: Exchange, error: CloudlmError) -> bool:
        """Whether another model shall be asked after ``error``; then ``course`` has moved there.

        A model with a replica to trust may always be; one that failed lately takes from the budget
        for retries, so that chains of models do not multiply attempts when all are down.
        """
        left, model, too_long = course.model, course.next_after(error), is_too_long(error)
        if model is None or exchange.interrupt.error is not None:
            return False
        is_free = too_long or not exchange.attempts or self._health(model) > 0.0
        if not is_free and not self._budget(left).take(self._rooms.clock.monotonic()):
            return False
        _log.info("fell_back", extra={"fields": {"from": left, "to": model}})
        self._rooms.meter.fell_back(left)
        course.move_to(model, too_long=too_long)
        exchange.headers.pop(CACHE_HEADER, None)
        exchange.replica = exchange.route = ""  # what a cache knows of the next model is nobody's
        exchange.leave()
        return True

    def _health(self, model: str) -> float:
        """The share of a model's replicas that is available."""
        served = self._rooms.view.snapshot().models.get(model)
        if served is None or not served.endpoints:
            return 0.0
        now = self._rooms.clock.monotonic()
        return available(served.endpoints, self._rooms.loads, now) / len(served.endpoints)

    def _count_absent(self, route: ModelRoute, first: str) -> None:
        """Models of the first priority that have no replica are in demand though others answer."""
        models = self._rooms.view.snapshot().models
        for target in route.levels[0] if route.levels else ():
            if target.model != first and not models[target.model].endpoints:
                self._rooms.demand.count(target.model)


def _named(raw: bytes, model: str) -> bytes:
    body = openai.decode(raw)
    if body is None:
        raise InternalError("a validated body is no JSON object")
    body["model"] = model
    return openai.encode(body)


def may_fall_back(error: CloudlmError) -> bool:
    """Whether another model may do better: this one failed or is overloaded."""
    return may_help(error) or isinstance(error, NoReplica | ModelAsleep | Overloaded)


def is_too_long(error: CloudlmError) -> bool:
    """Whether the prompt does not fit the model's window, as we, OpenAI and vLLM say it."""
    if isinstance(error, ReplicaRefused):
        told = error.body()["error"]
        return error.answered_status == 400 and (
            told.get("code") == ContextLengthExceeded.code or _TOO_LONG in str(told.get("message"))
        )
    return isinstance(error, ContextLengthExceeded)
