"""OpenAI's API as clients and replicas speak it: bodies in, chunks and bodies out.

Requests are validated with ``core.requests`` and then forwarded as the client wrote them, only
three fields altered: ``stream_options``, because the gateway needs the usage in every chunk to
account for a stream that breaks, ``cache_salt``, which keeps tenants' prefixes apart, and
``priority``, with which only some may go ahead of others. What the client did not ask for is
stripped on the way back. Must not do I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import msgspec

from cloudlm.core.chat import ChatRequest, CompletionRequest, Usage
from cloudlm.core.errors import (
    CloudlmError,
    InvalidRequest,
)
from cloudlm.core.requests import (
    decode_body,
    parse_chat,
    parse_completion,
    parse_embedding,
    read_priority,
)
from cloudlm.gateway.dialects import plain
from cloudlm.gateway.dialects.base import EVENT_STREAM, Asker, Dialect, Parse, Rendering
from cloudlm.gateway.dialects.orders import refuse_orders
from cloudlm.gateway.exchange import GatewayRequest
from cloudlm.gateway.sse import event
from cloudlm.gateway.view import ServedModel

DONE_DATA = b"[DONE]"
DONE_EVENT = event(DONE_DATA)
OWNER = "cloudlm"
_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder()


DIALECT: Dialect = Dialect("OpenAI", lambda error: error.body())


class Operation(StrEnum):
    """What a path asks for; the value of those that need a replica is its path there."""

    CHAT = "/v1/chat/completions"
    COMPLETION = "/v1/completions"
    EMBEDDING = "/v1/embeddings"
    TOKENIZE = "/tokenize"
    DETOKENIZE = "/detokenize"
    MODERATION = "/v1/moderations"


_WRITTEN: Final = (Operation.CHAT, Operation.COMPLETION)
_CHAT: Final = Operation.CHAT


@dataclass(slots=True, init=False)  # never changed; making frozen ones takes four times as long
class Call:
    """One validated request for a replica. ``body`` is what is sent there. ``translate`` makes what
    says the answer of the model of that name in another dialect than OpenAI's, or what a guardrail
    lets through of it."""

    operation: Operation
    model: str
    body: bytes
    stream: bool
    include_usage: bool
    continuous_usage: bool
    max_tokens: int  # of one answer; 0 if the request does not say
    choices: int
    translate: Callable[[str], Rendering] | None
    policy: str  # what tells apart the guardrails that looked at it
    private: bool  # its answer is nobody else's, and not its own asker's again

    def __init__(  # written out because one that ``dataclass`` makes is not compiled
        self,
        operation: Operation,
        model: str,
        body: bytes,
        stream: bool = False,
        include_usage: bool = False,
        continuous_usage: bool = False,
        max_tokens: int = 0,
        choices: int = 1,
        translate: Callable[[str], Rendering] | None = None,
        policy: str = "",
        private: bool = False,
    ) -> None:
        self.operation = operation
        self.model = model
        self.body = body
        self.stream = stream
        self.include_usage = include_usage
        self.continuous_usage = continuous_usage
        self.max_tokens = max_tokens
        self.choices = choices
        self.translate = translate
        self.policy = policy
        self.private = private

    @property
    def path(self) -> str:
        return self.operation._value_  # the same as ``value``, which is slow until Python 3.12

    @property
    def result_field(self) -> str | None:
        """The list that an answer must hold, where its tokens are accounted for; else None."""
        if self.operation is Operation.EMBEDDING:
            return "data"
        return "choices" if self.generates else None

    @property
    def generates(self) -> bool:
        """Whether the answer is text that a model wrote."""
        return self.operation in _WRITTEN


MayLead = Callable[[str], bool]
"""Whether the client may go ahead of others with the model of a name."""


def never(model: str) -> bool:
    """Ahead of nobody."""
    return False


def parse(
    operation: Operation, raw: bytes, salted: Callable[[str], str], *, may_lead: MayLead = never
) -> Call:
    """Validate a body. ``salted`` makes the cache salt that is sent on out of the client's own
    (empty if it gave none). Unless the client ``may_lead``, its ``priority`` can only let others go
    first. Raises InvalidRequest and NotSupported naming the field."""
    if operation is _CHAT:
        chat = plain.read(raw)
        if chat is not None:
            return _plain(chat, salted)
    return parse_body(operation, decode_body(raw), salted, may_lead=may_lead)


def parser(operation: Operation) -> Parse:
    """``parse`` as a route wants it."""
    return lambda request, _, asker: parse(
        operation, request.body, asker.salted, may_lead=asker.may_lead
    )


def read_models(request: GatewayRequest, _: str, asker: Asker) -> dict[str, Any]:
    """The list of models, by name."""
    return {"object": "list", "data": [model_body(model) for model in asker.models()]}


def read_model(request: GatewayRequest, name: str, asker: Asker) -> dict[str, Any]:
    """One model, see ``model_state_body``."""
    return model_state_body(asker.model(name))


def parse_body(
    operation: Operation,
    body: dict[str, Any],
    salted: Callable[[str], str],
    *,
    may_lead: MayLead = never,
) -> Call:
    """As ``parse``, from a decoded body, which is changed."""
    refuse_orders(body)
    if body.get("priority") is not None:
        priority = read_priority(body)
        body["priority"] = priority if may_lead(str(body.get("model"))) else max(priority, 0)
    if operation is Operation.CHAT:
        return _generation(operation, body, parse_chat(body), salted)
    if operation is Operation.COMPLETION:
        return _generation(operation, body, parse_completion(body), salted)
    if operation is Operation.EMBEDDING:
        embedding = parse_embedding(body)
        _salt(body, salted)
        return Call(operation, embedding.model, encode(body))
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("model is required: the name of a deployed model", param="model")
    return Call(operation, model, encode(body))


def _plain(chat: plain.PlainChat, salted: Callable[[str], str]) -> Call:
    """The same as ``_generation``, for the form that needs no more checks."""
    wanted = chat.stream_options or plain.NO_OPTIONS
    chat.cache_salt = salted(chat.cache_salt or "")
    stream = chat.stream is True
    if stream:
        plain.ask_for_usage(chat)
    return Call(
        _CHAT,
        chat.model,
        _encoder.encode(chat),
        stream=stream,
        include_usage=wanted.include_usage,
        continuous_usage=wanted.include_usage and wanted.continuous_usage_stats,
        max_tokens=chat.max_completion_tokens or chat.max_tokens or 0,
        choices=chat.n or 1,
    )


def _generation(
    operation: Operation,
    body: dict[str, Any],
    parsed: ChatRequest | CompletionRequest,
    salted: Callable[[str], str],
) -> Call:
    prompts = len(parsed.prompts) if isinstance(parsed, CompletionRequest) else 1
    _salt(body, salted)
    if parsed.stream:
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    options = parsed.stream_options
    return Call(
        operation,
        parsed.model,
        encode(body),
        stream=parsed.stream,
        include_usage=options.include_usage,
        continuous_usage=options.include_usage and options.continuous_usage_stats,
        max_tokens=parsed.sampling.max_tokens or 0,
        choices=parsed.n * prompts,
    )


def _salt(body: dict[str, Any], salted: Callable[[str], str]) -> None:
    own_salt = body.get("cache_salt")
    if own_salt is not None and not isinstance(own_salt, str):
        raise InvalidRequest("cache_salt must be a text", param="cache_salt")
    body["cache_salt"] = salted(own_salt or "")


def encode(body: Any) -> bytes:
    """``body`` as JSON. Raises InvalidRequest for text that is not Unicode."""
    try:
        return _encoder.encode(body)
    except (UnicodeEncodeError, ValueError, OverflowError, RecursionError):
        raise InvalidRequest("the body holds a value that JSON cannot carry") from None


def decode(raw: bytes) -> dict[str, Any] | None:
    """A JSON object that a replica sent, None if it is anything else."""
    try:
        body = _decoder.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def usage_of(body: dict[str, Any]) -> Usage | None:
    """The tokens that a body or chunk states, None if it states none or nonsense."""
    usage = body.get("usage")
    return read_usage(usage) if isinstance(usage, dict) else None


def read_usage(usage: dict[str, Any]) -> Usage:
    """A usage object as it was stated; what is nonsense in it counts as 0."""
    details = usage.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    return Usage(_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")), cached)


def vectors_of(body: dict[str, Any]) -> list[Any]:
    """The vectors of an embedding answer, in the order of its inputs."""
    data = [entry for entry in body.get("data") or () if isinstance(entry, dict)]
    data.sort(key=lambda entry: _count(entry.get("index")))
    return [entry.get("embedding") for entry in data]


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0


def has_content(chunk: dict[str, Any]) -> bool:
    """Whether a chunk holds something of the answer: text, or the end of a choice. A chunk that
    only names the role is none."""
    choices = chunk.get("choices")
    if isinstance(choices, list):
        for choice in choices:  # loops, not generators: this is asked of every event
            if isinstance(choice, dict) and _speaks(choice):
                return True
    return False


def _speaks(choice: dict[str, Any]) -> bool:
    if choice.get("text") or choice.get("finish_reason") is not None:
        return True
    delta = choice.get("delta")
    if isinstance(delta, dict):
        for name, value in delta.items():
            if value and name != "role":
                return True
    return False


def is_aborted(chunk: dict[str, Any]) -> bool:
    """Whether a replica says that it gave up on a choice."""
    choices = chunk.get("choices")
    if isinstance(choices, list):
        for choice in choices:
            if isinstance(choice, dict) and choice.get("finish_reason") == "abort":
                return True
    return False


def shape_chunk(chunk: dict[str, Any], call: Call) -> bytes:
    """A chunk as an event for this client; empty if the client did not ask for it.

    The model has the name that was asked for; usage is as ``stream_options`` said.
    """
    if not chunk.get("choices") and not call.include_usage:
        return b""
    chunk["model"] = call.model
    if not call.continuous_usage and "usage" in chunk:
        if not call.include_usage:
            del chunk["usage"]
        elif chunk.get("choices"):
            chunk["usage"] = None
    return event(_encoder.encode(chunk))


def shape_answer(body: dict[str, Any], call: Call) -> bytes:
    """A whole answer as JSON for this client."""
    if "model" in body:
        body["model"] = call.model
    return _encoder.encode(body)


def whole(call: Call, body: dict[str, Any], raw: bytes) -> bytes:
    """A whole answer for this client. ``raw`` is the text that ``body`` was read from, and goes on
    as it came where nothing in it is to be changed."""
    if call.translate is None and body.get("model", call.model) == call.model:
        return raw
    return rendering(call).whole(body)


class OpenAIRendering:
    """Says an answer to a client of OpenAI's API: what the replica sent, hardly touched."""

    stream_type = EVENT_STREAM

    def __init__(self, call: Call) -> None:
        self._call = call

    def whole(self, body: dict[str, Any]) -> bytes:
        return shape_answer(body, self._call)

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        return shape_chunk(chunk, self._call)

    def done(self) -> bytes:
        return DONE_EVENT

    def error(self, error: CloudlmError) -> bytes:
        """The event that ends a broken stream; ``[DONE]`` never follows it."""
        return event(_encoder.encode(error.body()))


def rendering(call: Call) -> Rendering:
    """What says one attempt's answer; a new one for each, because streams have a state."""
    return OpenAIRendering(call) if call.translate is None else call.translate(call.model)


def model_body(model: ServedModel) -> dict[str, Any]:
    """One model in OpenAI's form; an adapter also names the deployment that serves it."""
    body = {
        "id": model.name,
        "object": "model",
        "created": int(model.created_at),
        "owned_by": OWNER,
    }
    return body if model.parent is None else {**body, "parent": model.parent}


def model_state_body(model: ServedModel) -> dict[str, Any]:
    """One model for all who ask at ``/v1/models/{name}``: with KServe's and TensorFlow Serving's
    fields besides OpenAI's. Its versions are the revisions that serve: none while it sleeps."""
    serving = () if model.asleep else model.endpoints
    versions = sorted({endpoint.revision for endpoint in serving})
    fine = {"error_code": "OK", "error_message": ""}
    states = [{"version": str(v), "state": "AVAILABLE", "status": fine} for v in versions]
    return {
        **model_body(model),
        "name": model.name,
        "ready": bool(versions),
        "model_version_status": states,
    }
