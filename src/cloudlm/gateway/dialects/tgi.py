"""Text Generation Inference's API: ``/generate``, ``/generate_stream``, ``/`` and ``/info``.

One model is served per address there, so requests name none: ``model`` may be added, and must be
where several are deployed. Token ids are not told. Written after TGI's public OpenAPI document.
Must not do I/O.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from cloudlm import __version__
from cloudlm.core.chat import Usage
from cloudlm.core.errors import CloudlmError, InvalidRequest
from cloudlm.core.fields import Fields, check_flag, shown
from cloudlm.core.requests import MAX_CHOICES, MAX_STOPS, decode_body
from cloudlm.gateway.account import status_of
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.base import EVENT_STREAM, Asker, Dialect
from cloudlm.gateway.dialects.generation import DEFAULT_MAX_TOKENS
from cloudlm.gateway.dialects.heard import Heard, copied, refuse, renamed
from cloudlm.gateway.dialects.heard import heard as heard_in
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.exchange import GatewayRequest
from cloudlm.gateway.sse import event

_ERROR_TYPES = {429: "overloaded", 503: "overloaded"}
_SAME = ("temperature", "top_k", "top_p", "repetition_penalty", "frequency_penalty", "seed", "stop")
_RENAMED = {name: f"parameters.{name}" for name in _SAME} | {
    "max_tokens": "parameters.max_new_tokens",
    "prompt": "inputs",
    "guided_json": "parameters.grammar",
    "guided_regex": "parameters.grammar",
}
_REFUSED = {
    "adapter_id": "an adapter is a model of its own name",
    "best_of": "send several requests",
    "decoder_input_details": "use /v1/completions with echo and logprobs",
    "top_n_tokens": "use /v1/completions with logprobs",
    "truncate": "shorten the input",
    "typical_p": "use top_p or min_p",
    "watermark": "texts are not marked",
}


def error_body(error: CloudlmError) -> dict[str, str]:
    """An error in TGI's shape."""
    status = status_of(error)
    kind = _ERROR_TYPES.get(status, "validation" if status < 500 else "generation")
    return {"error": error.message, "error_type": kind}


DIALECT = Dialect("Text Generation Inference", error_body)


def parse_generate(request: GatewayRequest, _: str, asker: Asker) -> Call:
    """A call out of ``POST /generate``. Raises InvalidRequest and NotSupported."""
    return _call(Fields(decode_body(request.body), "a generate request"), asker, stream=False)


def parse_stream(request: GatewayRequest, _: str, asker: Asker) -> Call:
    """A call out of ``POST /generate_stream``."""
    return _call(Fields(decode_body(request.body), "a generate request"), asker, stream=True)


def parse_either(request: GatewayRequest, _: str, asker: Asker) -> Call:
    """A call out of ``POST /``: a stream if the body says so; a whole answer is in a list."""
    fields = Fields(decode_body(request.body), "a generate request")
    stream = fields.raw("stream", None)
    streams = stream is not None and check_flag(stream, "stream")
    return _call(fields, asker, stream=streams, listed=True)


def read_info(request: GatewayRequest, _: str, asker: Asker) -> dict[str, Any]:
    """What is served here. Raises ModelNotFound unless that is one model."""
    return {
        "model_id": asker.only_model(),
        "version": __version__,
        "router": "cloudlm",
        "max_best_of": 1,
        "max_stop_sequences": MAX_STOPS,
        "max_client_batch_size": MAX_CHOICES,
    }


def _call(fields: Fields, asker: Asker, *, stream: bool, listed: bool = False) -> Call:
    prompt = fields.text("inputs", low=1, max_length=2**31)
    model = fields.optional_text("model") or asker.only_model()
    given = Fields(fields.raw("parameters", None) or {}, "parameters", path="parameters.")
    fields.end()
    refuse(given, _REFUSED)
    full, details = (_flag(given, name) for name in ("return_full_text", "details"))
    body: dict[str, Any] = {"model": model, "prompt": prompt, "stream": stream}
    body |= {"max_tokens": DEFAULT_MAX_TOKENS} | copied(given, {"max_new_tokens": "max_tokens"})
    body |= copied(given, {name: name for name in _SAME}) | _grammar(given.raw("grammar", None))
    if not _samples(given):
        body["temperature"] = 0.0
    given.end()
    if stream:
        body["logprobs"] = 0
    with renamed(_RENAMED):
        call = openai.parse_body(Operation.COMPLETION, body, asker.salted)
    before = prompt if full else ""
    seed = body.get("seed")
    return replace(call, translate=lambda _: TgiRendering(before, details, listed, seed))


def _flag(fields: Fields, name: str) -> bool:
    value = fields.raw(name, None)
    return value is not None and check_flag(value, fields.param(name))


def _samples(given: Fields) -> bool:
    """TGI is greedy unless it is told to sample, or how to."""
    told = (given.raw(name, None) for name in ("top_k", "top_p"))
    hot = given.raw("temperature", None) not in (None, 1, 1.0)
    return _flag(given, "do_sample") or hot or any(value is not None for value in told)


def _grammar(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    fields = Fields(value, "parameters.grammar", path="parameters.grammar.")
    kind = fields.raw("type")
    if kind not in ("json", "json_schema", "regex"):
        raise InvalidRequest(
            f"parameters.grammar.type must be json or regex, not {shown(kind)}",
            param="parameters.grammar.type",
        )
    return {"guided_regex" if kind == "regex" else "guided_json": fields.raw("value")}


class TgiRendering:
    """Says one answer. ``before`` is put before the text, ``listed`` puts a whole answer in a list.
    In a stream the last piece also brings the whole text, so one piece is always held back."""

    stream_type = EVENT_STREAM

    def __init__(self, before: str, details: bool, listed: bool, seed: int | None) -> None:
        self._before = before
        self._details = details
        self._listed = listed
        self._seed = seed
        self._texts: list[str] = []
        self._held: dict[str, Any] | None = None
        self._count = 0
        self._finish = Heard()
        self._usage = Usage()

    def whole(self, body: dict[str, Any]) -> bytes:
        self._finish = said = heard_in(body)
        self._usage = openai.usage_of(body) or self._usage
        answer: dict[str, Any] = {"generated_text": self._before + said.text}
        if self._details:
            answer["details"] = {**self._known(), "prefill": [], "tokens": []}
        return msgspec.json.encode([answer] if self._listed else answer)

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        self._usage = openai.usage_of(chunk) or self._usage
        said = heard_in(chunk)
        if said.finish is not None:
            self._finish = said
        if not said.text:
            return b""
        out = b"" if self._held is None else _encoded(self._held)
        self._texts.append(said.text)
        self._held = self._piece(said.text, _logprob(chunk))
        return out

    def done(self) -> bytes:
        last = self._held or self._piece("", None)
        text = self._before + "".join(self._texts)
        known = {**self._known(), "input_length": self._usage.prompt_tokens}
        return _encoded({**last, "generated_text": text, "details": known})

    def error(self, error: CloudlmError) -> bytes:
        held = b"" if self._held is None else _encoded(self._held)
        return held + _encoded(error_body(error))

    def _piece(self, text: str, logprob: float | None) -> dict[str, Any]:
        self._count += 1
        token = {"id": None, "text": text, "logprob": logprob, "special": False}
        return {"index": self._count, "token": token, "generated_text": None, "details": None}

    def _known(self) -> dict[str, Any]:
        reason = "length" if self._finish.finish == "length" else "eos_token"
        if self._finish.stop is not None:
            reason = "stop_sequence"
        tokens = self._usage.completion_tokens
        return {"finish_reason": reason, "generated_tokens": tokens, "seed": self._seed}


def _logprob(chunk: dict[str, Any]) -> float | None:
    """The log probability of the tokens in a chunk, together."""
    choices = chunk.get("choices")
    logprobs = choices[0].get("logprobs") if isinstance(choices, list) and choices else None
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    known = [v for v in values or () if isinstance(v, int | float)]
    return float(sum(known)) if known else None


def _encoded(body: dict[str, Any]) -> bytes:
    return event(msgspec.json.encode(body))
