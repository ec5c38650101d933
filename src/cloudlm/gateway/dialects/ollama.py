"""Ollama's API: ``/api/chat``, ``/api/generate``, ``/api/embed`` and what it tells of models.

Requests become OpenAI requests. What loads, unloads or fetches models is refused, because
deployments do that. Written after Ollama's public API description. How answers are said is in
``ollama_stream``. Must not do I/O.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec

from cloudlm import __version__
from cloudlm.core.errors import CloudlmError, InvalidRequest, NotFound, NotSupported
from cloudlm.core.fields import Fields, check_flag, kind_of, shown
from cloudlm.core.requests import decode_body
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.base import Asker, Dialect, WholeRendering
from cloudlm.gateway.dialects.heard import copied, ignore, objects, refuse, renamed, rfc3339
from cloudlm.gateway.dialects.ollama_stream import Clocked, LineRendering, embeddings, error_body
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.exchange import GatewayRequest
from cloudlm.gateway.view import ServedModel

DIALECT = Dialect("Ollama", error_body)
_OPTIONS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_RENAMED = {theirs: f"options.{own}" for own, theirs in _OPTIONS.items()} | {
    "max_tokens": "options.num_predict",
    "response_format": "format",
    "response_format.json_schema.schema": "format",
}
_IGNORED_OPTIONS = (  # how Ollama lays a model out on its machine, which a deployment decides here
    "low_vram",
    "main_gpu",
    "num_batch",
    "num_ctx",
    "num_gpu",
    "num_keep",
    "num_thread",
    "numa",
    "penalize_newline",
    "repeat_last_n",
    "use_mlock",
    "use_mmap",
    "vocab_only",
)
_KNOWN_ELSEWHERE = [
    [name] for name in ("blobs", "copy", "create", "delete", "ps", "pull", "push", "me")
]
_REFUSED = {
    "suffix": "filling in is not supported",
    "template": "the model's own template is used",
    "context": "send the conversation to /api/chat instead",
    "images": "only text is supported",
    "logprobs": "use /v1/chat/completions for log probabilities",
    "top_logprobs": "use /v1/chat/completions for log probabilities",
}


def parse_chat(request: GatewayRequest, _: str, asker: Asker) -> Call:
    """A call out of ``POST /api/chat``. Raises InvalidRequest and NotSupported."""
    fields = Fields(decode_body(request.body), "a chat request")
    refuse(fields, {name: reason for name, reason in _REFUSED.items() if "log" in name})
    messages = _messages(objects(fields.raw("messages"), "messages"))
    body = {"messages": messages, **_common(fields)}
    if fields.raw("tools", None):
        body["tools"] = fields.raw("tools")
    return _call(fields, Operation.CHAT, body, asker, "message")


def parse_generate(request: GatewayRequest, _: str, asker: Asker) -> Call:
    """A call out of ``POST /api/generate``: one prompt, in the model's template or ``raw``."""
    fields = Fields(decode_body(request.body), "a generate request")
    refuse(fields, _REFUSED)
    prompt = fields.text("prompt", "", max_length=2**31)
    if not prompt:
        raise InvalidRequest(
            "prompt must not be empty: models are loaded by their deployments", param="prompt"
        )
    system = fields.optional_text("system", max_length=2**31)
    body = _common(fields)
    if fields.flag("raw", fields.raw("raw", None) or False):
        if system:
            raise InvalidRequest("system cannot be used with raw: true", param="system")
        if "max_tokens" not in body:
            raise InvalidRequest(
                "raw: true needs options.num_predict, or an answer might never end",
                param="options.num_predict",
            )
        return _call(fields, Operation.COMPLETION, {"prompt": prompt, **body}, asker, "response")
    said = [{"role": "system", "content": system}] if system else []
    body["messages"] = [*said, {"role": "user", "content": prompt}]
    return _call(fields, Operation.CHAT, body, asker, "response")


def parse_embed(request: GatewayRequest, _: str, asker: Asker) -> Call:
    """A call out of ``POST /api/embed``, or of the older ``/api/embeddings`` with ``prompt``."""
    fields = Fields(decode_body(request.body), "an embed request")
    ignore(fields, "truncate", "options", "keep_alive")
    older = request.path == "/api/embeddings"
    names = {"model": "model", "prompt" if older else "input": "input"}
    body = copied(fields, names if older else {**names, "dimensions": "dimensions"})
    fields.end()
    with renamed({"input": "prompt"} if older else {}):
        call = openai.parse_body(Operation.EMBEDDING, body, asker.salted)
    clocked = Clocked()

    def say(model: str) -> WholeRendering:
        return WholeRendering(functools.partial(embeddings, model, clocked, older))

    return replace(call, translate=say)


def read_tags(request: GatewayRequest, _: str, asker: Asker) -> dict[str, Any]:
    """The models; their size and digest are the registry's affair and left out."""
    return {"models": [_model(model) for model in asker.models()]}


def read_show(request: GatewayRequest, _: str, asker: Asker) -> dict[str, Any]:
    """One model, named in the body as ``model`` or, by older clients, ``name``."""
    body = decode_body(request.body)
    name = body.get("model") or body.get("name")
    if not isinstance(name, str):
        raise InvalidRequest("model is required: the name of a deployed model", param="model")
    model = asker.model(_untagged(name))
    known = {"modified_at": rfc3339(model.created_at), "capabilities": ["completion"]}
    return {"details": {}, "model_info": {}, **known}


def read_version(request: GatewayRequest, _: str, asker: Asker) -> dict[str, Any]:
    """The server's version, which is cloudlm's."""
    return {"version": __version__}


def refused(path: str) -> CloudlmError:
    """Why the rest of Ollama's API is not here."""
    if path.split("/")[2:3] not in _KNOWN_ELSEWHERE:
        return NotFound(f"there is nothing at {path[:80]!r} in Ollama's API")
    return NotSupported(
        f"{path[:80]} is not offered: /api/chat, /api/generate, /api/embed, /api/embeddings, "
        "/api/tags, /api/show and /api/version are; models come and go with 'cloudlm deploy'"
    )


def _model(model: ServedModel) -> dict[str, Any]:
    known = {"name": model.name, "model": model.name}
    return {**known, "modified_at": rfc3339(model.created_at), "details": {}}


def _untagged(name: Any) -> Any:
    """Clients add ``:latest`` to names without a tag; deployments have no tags."""
    return name.removesuffix(":latest") if isinstance(name, str) else name


def _common(fields: Fields) -> dict[str, Any]:
    """What chat and generate have in common."""
    ignore(fields, "keep_alive", "think")
    options = Fields(fields.raw("options", None) or {}, "options", path="options.")
    ignore(options, *_IGNORED_OPTIONS)
    body = copied(options, _OPTIONS)
    limit = options.raw("num_predict", None)
    if limit is not None and not (type(limit) is int and limit < 0):  # negative: as many as fit
        body["max_tokens"] = limit
    options.end()
    body["stream"] = check_flag(True if (s := fields.raw("stream", None)) is None else s, "stream")
    body["model"] = _untagged(fields.raw("model", None))
    return body | _format(fields.raw("format", None))


def _format(value: Any) -> dict[str, Any]:
    if value in (None, ""):
        return {}
    if value == "json":
        return {"response_format": {"type": "json_object"}}
    if not isinstance(value, dict):
        raise InvalidRequest(f"format must be json or a schema, not {shown(value)}", param="format")
    named = {"name": "answer", "schema": value}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _call(
    fields: Fields, operation: Operation, body: dict[str, Any], asker: Asker, said_in: str
) -> Call:
    thinks = fields.raw("think", None) not in (None, False)
    fields.end()
    with renamed(_RENAMED):
        call = openai.parse_body(operation, body, asker.salted, may_lead=asker.may_lead)
    clocked = Clocked()
    return replace(call, translate=lambda model: LineRendering(model, clocked, said_in, thinks))


def _messages(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ollama's calls have no ids, so they get some; a result answers the oldest open call of its
    tool."""
    open_calls: list[tuple[str, Any]] = []
    made = 0
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(given):
        param = f"messages[{number}]"
        if message.get("images"):
            raise NotSupported(f"{param}.images is not supported: only text is", param=param)
        body: dict[str, Any] = {
            "role": message.get("role"),
            "content": message.get("content") or "",
        }
        if message.get("thinking"):
            body["reasoning_content"] = message["thinking"]
        if message.get("tool_calls"):
            calls = objects(message["tool_calls"], f"{param}.tool_calls")
            body["tool_calls"] = [
                _tool_call(c, f"call_{made + n}", param) for n, c in enumerate(calls)
            ]
            made += len(calls)
            open_calls += [(c["id"], c["function"]["name"]) for c in body["tool_calls"]]
        if message.get("role") == "tool":
            name = message.get("tool_name") or message.get("name")
            match = [call for call in open_calls if name in (None, call[1])] or open_calls
            if match:
                open_calls.remove(match[0])
                body["tool_call_id"] = match[0][0]
        messages.append(body)
    return messages


def _tool_call(call: Mapping[str, Any], call_id: str, param: str) -> dict[str, Any]:
    function = call.get("function")
    where = f"{param}.tool_calls"
    if not isinstance(function, dict):
        raise InvalidRequest(f"{where} must be objects with a function", param=where)
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, dict):
        raise InvalidRequest(
            f"{where} must have arguments as an object, not {kind_of(arguments)}", param=where
        )
    known = {"name": function.get("name"), "arguments": msgspec.json.encode(arguments).decode()}
    return {"id": call_id, "type": "function", "function": known}
