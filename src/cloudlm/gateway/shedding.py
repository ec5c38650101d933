"""Turning requests away at the door while a model's line is full, before they cost anything.

At ten times the work that replicas can do, nine of ten requests are refused; each that went the
whole way to the gate would cost those that are served almost as much as one of them. So while a
line is full, the door itself looks at what the gate would say: whose request it is, for which model
and how critical; nothing else of it is read. It refuses only what the gate would refuse, whatever
else the request says; everything else goes the whole way. Must not wait, and must not refuse for
any other reason.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cloudlm.core.errors import CloudlmError, Overloaded
from cloudlm.core.tenant import Outcome
from cloudlm.gateway.dialects import routes
from cloudlm.gateway.dialects.openai import Operation
from cloudlm.gateway.entrance import Entrance
from cloudlm.gateway.exchange import GatewayRequest, GatewayResponse, header_safe, request_id
from cloudlm.gateway.recall import Recall
from cloudlm.gateway.replies import refusal
from cloudlm.gateway.rooms import Rooms
from cloudlm.gateway.view import Snapshot
from cloudlm.telemetry.damping import Damper
from cloudlm.telemetry.logs import get_logger

MOST_READ_BYTES = 1024 * 1024
"""Larger bodies go the whole way: looking for the model's name must not hold up others."""
_OTHERS = ("/v1/responses", "/v1/messages")
_PATHS = frozenset({*(one.value for one in Operation), *_OTHERS} - {Operation.MODERATION.value})
"""Where the body's ``model`` is the model: a moderation's may be one of the gateway itself."""

_log = get_logger(__name__)


# All that is read of a body; made so because compiled classes cannot be msgspec's.
_Named: Any = msgspec.defstruct("_Named", [("model", str, "")])
_decoder = msgspec.json.Decoder(_Named)


class Shedding:
    """Stands at the door of the handler, and works with the same ``rooms``."""

    def __init__(self, rooms: Rooms, entrance: Entrance, recall: Recall) -> None:
        self._rooms = rooms
        self._clock = rooms.clock
        self._known = entrance.known
        self._recall = recall
        self._damper = Damper()

    def refuse(self, request: GatewayRequest) -> GatewayResponse | None:
        """The refusal of a request that would not come in; None if it has to be asked for in
        full."""
        if not self._rooms.gate.crowded or request.method != "POST" or request.path not in _PATHS:
            return None
        rooms, began = self._rooms, self._clock.monotonic()
        try:
            view = rooms.view.snapshot()
        except CloudlmError:
            return None
        key = self._known(request.headers, view, self._clock.now())
        if key is None:
            return None
        name = _model_of(request.body)
        if not self._is_plain(name, view) or not view.may_use(key, name):
            return None
        error = rooms.gate.turned_away(name, key.tenant, request.headers)
        if error is None:
            return None
        rooms.demand.count(name, len(request.body))
        self._say(name, error)
        said = {"x-request-id": request_id(request.headers), "x-cloudlm-model": header_safe(name)}
        response = refusal(error, said, routes.find(request)[0].dialect)
        took_s = self._clock.monotonic() - began
        rooms.meter.request_ended(name, Outcome.REFUSED, response.status, took_s)
        return response

    def _is_plain(self, name: str, view: Snapshot) -> bool:
        """Whether a replica of this model has to answer, for nobody else can: no answer that is
        kept, no other model of a route."""
        model = view.models.get(name)
        if model is None or not model.endpoints or model.asleep:
            return False
        return name not in self._rooms.routes and not self._recall.has_part(name)

    def _say(self, name: str, error: Overloaded) -> None:
        count = self._damper.take(name, self._clock.monotonic())
        if count is not None:
            fields = {"model": name, "status": error.status, "reason": error.message}
            _log.warning("request_not_answered", extra={"fields": {**fields, "count": count}})


def _model_of(body: bytes) -> str:
    if len(body) > MOST_READ_BYTES:
        return ""
    try:
        return str(_decoder.decode(body).model)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return ""
