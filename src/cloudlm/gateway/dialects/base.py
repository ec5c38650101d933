"""What a dialect is: an API that clients speak, translated into OpenAI's, which replicas speak.

A dialect reads a request into a ``Call``, answers questions about models, and writes answers and
errors in its own words. ``routes`` finds the dialect of a path. Must not do I/O or decide anything
about keys, limits or replicas: those are the handler's, the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from cloudlm.core.errors import (
    CloudlmError,
    InternalError,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
)
from cloudlm.gateway.exchange import GatewayRequest
from cloudlm.gateway.view import ServedModel

if TYPE_CHECKING:
    from cloudlm.gateway.dialects.openai import Call
    from cloudlm.security.guardrails.config import Moderation

EVENT_STREAM = "text/event-stream; charset=utf-8"
NDJSON = "application/x-ndjson"


class Rendering(Protocol):
    """Says one answer in a dialect: all at once, or chunk by chunk. Bodies and chunks are OpenAI's,
    as a replica sent them; in a stream each chunk states the usage so far. ``done`` and ``error``
    end a stream and are never empty. ``chunk`` may raise AnswerEnded."""

    @property
    def stream_type(self) -> str: ...

    def whole(self, body: dict[str, Any]) -> bytes: ...

    def chunk(self, chunk: dict[str, Any]) -> bytes: ...

    def done(self) -> bytes: ...

    def error(self, error: CloudlmError) -> bytes: ...


class AnswerEnded(Exception):
    """A rendering says that the answer is over, whatever else the replica may send. ``events`` are
    the last ones, the dialect's end included."""

    def __init__(self, events: bytes) -> None:
        super().__init__("the answer is over")
        self.events = events


class WholeRendering:
    """Says answers that never come as a stream; ``say`` turns OpenAI's body into the dialect's."""

    stream_type = "application/json"

    def __init__(self, say: Callable[[dict[str, Any]], Any]) -> None:
        self._say = say

    def whole(self, body: dict[str, Any]) -> bytes:
        return msgspec.json.encode(self._say(body))

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        raise InternalError("an answer that has no stream came as one")

    def done(self) -> bytes:
        raise InternalError("an answer that has no stream came as one")

    def error(self, error: CloudlmError) -> bytes:
        raise InternalError("an answer that has no stream came as one")


@dataclass(slots=True)  # one is made per request, and making frozen ones takes four times as long
class Asker:
    """What a dialect may know of who asks. ``salted`` makes the cache salt out of the client's own,
    ``may_lead`` says for which models its ``priority`` pushes ahead. ``models`` are those that it
    may see, by name; ``model`` finds one or raises ModelNotFound; ``moderation`` says which of them
    moderate."""

    salted: Callable[[str], str]
    may_lead: Callable[[str], bool]
    models: Callable[[], Sequence[ServedModel]]
    model: Callable[[str], ServedModel]
    moderation: Moderation | None = None

    def only_model(self) -> str:
        """The model of an API whose requests name none. Raises ModelNotFound unless there is
        exactly one."""
        names = [model.name for model in self.models()]
        if len(names) == 1:
            return names[0]
        if not names:
            raise ModelNotFound("nothing is deployed here yet", param="model")
        raise ModelNotFound(
            "this path serves one model, but several are deployed; name one with the field "
            f"'model': {', '.join(names[:20])}",
            param="model",
        )


Parse = Callable[[GatewayRequest, str, Asker], "Call"]
Read = Callable[[GatewayRequest, str, Asker], Any]


@dataclass(frozen=True, slots=True)
class Dialect:
    """A name for people and the shape of its errors."""

    name: str
    error_body: Callable[[CloudlmError], Any]


@dataclass(frozen=True, slots=True)
class Route:
    """What a path asks for. One of three: ``parse`` makes a call for a replica, ``read`` answers
    out of what the gateway knows (unless ``perhaps`` finds that a replica is asked), ``fault``
    says why there is nothing. The first two get the model's name where the path holds one.
    ``unfold`` makes the request that a shorter one stands for."""

    dialect: Dialect
    method: str = "POST"
    parse: Parse | None = None
    read: Read | None = None
    fault: Callable[[str], CloudlmError] | None = None
    counted_as: str = ""
    unfold: Callable[[GatewayRequest], GatewayRequest] | None = None
    perhaps: Callable[[GatewayRequest, Asker], Parse | None] | None = None

    def check(self, request: GatewayRequest) -> None:
        """Raise MethodNotAllowed, or why there is nothing at this path."""
        if self.fault is not None:
            raise self.fault(request.path)
        if request.method != self.method:
            raise MethodNotAllowed(
                f"{request.path[:80]} takes {self.method}, not {request.method[:20]}"
            )


def nothing_there(what: str) -> Callable[[str], CloudlmError]:
    """The fault of a path that no dialect has; ``what`` says what is spoken here."""
    return lambda path: NotFound(f"there is nothing at {path[:80]!r}; {what}")
