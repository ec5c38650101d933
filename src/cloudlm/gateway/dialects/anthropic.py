"""Anthropic's Messages API: ``/v1/messages``, ``/v1/messages/count_tokens`` and its list of models.

Requests become OpenAI chat requests, answers become messages with content blocks. Written after
Anthropic's public API reference. How a stream is said is in ``anthropic_stream``. Must not do I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec

from cloudlm.core.errors import InvalidRequest, NotSupported
from cloudlm.core.fields import Fields, shown
from cloudlm.core.requests import MAX_TOKENS, decode_body, parse_chat
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.anthropic_stream import MessageRendering, error_body
from cloudlm.gateway.dialects.base import Asker, Dialect, WholeRendering
from cloudlm.gateway.dialects.heard import (
    copied,
    ignore,
    objects,
    part_text,
    refuse,
    renamed,
    rfc3339,
    text_of,
)
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.exchange import GatewayRequest
from cloudlm.gateway.view import ServedModel

VERSIONS = ("2026-10-21", "2023-06-01")
"""The newer one took sampling parameters away; here they work in both."""
DIALECT = Dialect("Anthropic", error_body)
_RENAMED = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "response_format.json_schema.schema": "output_config.format.schema",
    "user": "metadata.user_id",
}
_REFUSED = {
    "container": "there are no code containers here",
    "mcp_servers": "this server calls no tools itself",
    "context_management": "the conversation is used as it is sent",
    "inference_geo": "where a model runs is decided by its deployment",
}
_IGNORED = (
    "cache_control",
    "service_tier",
    "speed",
    "diagnostics",
    "user_profile_id",
    "workspace_id",
)
_PREFILL = (
    "the last message must be the user's: an answer that begins with given words is not supported"
)


def parse_messages(request: GatewayRequest, _: str, asker: Asker) -> Call:
    """A call out of ``POST /v1/messages``. Raises InvalidRequest and NotSupported."""
    _check_version(request.headers)
    fields = Fields(decode_body(request.body), "a message request")
    with renamed(_RENAMED):
        limit = fields.integer("max_tokens", low=1, high=MAX_TOKENS)
        stream = fields.raw("stream", None)
        body = {**_chat(fields), "max_tokens": limit}
        body |= copied(fields, {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k"})
        body |= copied(fields, {"stop_sequences": "stop"})
        user = Fields(fields.raw("metadata", None) or {}, "metadata", path="metadata.")
        body |= copied(user, {"user_id": "user"})
        fields.end()
        if stream is not None:
            body["stream"] = stream
        thinks = _shows_thinking(fields.raw("thinking", None))
        call = openai.parse_body(Operation.CHAT, body, asker.salted, may_lead=asker.may_lead)
    return replace(call, translate=lambda model: MessageRendering(model, thinks))


def parse_count(request: GatewayRequest, _: str, asker: Asker) -> Call:
    """A call out of ``POST /v1/messages/count_tokens``."""
    _check_version(request.headers)
    fields = Fields(decode_body(request.body), "a request to count tokens")
    with renamed(_RENAMED):
        body = _chat(fields)
        fields.end()
        parse_chat(body)
    asked = ("model", "messages", "tools", "tool_choice")
    kept: dict[str, Any] = {name: body[name] for name in asked if name in body}
    call = openai.parse_body(Operation.TOKENIZE, kept, asker.salted)
    say = WholeRendering(lambda said: {"input_tokens": said.get("count")})
    return replace(call, translate=lambda _: say)


def read_models(request: GatewayRequest, _: str, asker: Asker) -> dict[str, Any]:
    """The models, as one page."""
    _check_version(request.headers)
    models = [_model(model) for model in asker.models()]
    return {
        "data": models,
        "has_more": False,
        "first_id": models[0]["id"] if models else None,
        "last_id": models[-1]["id"] if models else None,
    }


def read_model(request: GatewayRequest, name: str, asker: Asker) -> dict[str, Any]:
    """One model."""
    _check_version(request.headers)
    return _model(asker.model(name))


def _model(model: ServedModel) -> dict[str, Any]:
    return {
        "type": "model",
        "id": model.name,
        "display_name": model.name,
        "created_at": rfc3339(model.created_at),
    }


def _check_version(headers: Mapping[str, str]) -> None:
    """A missing version is the newest; one that is not known may mean other things than ours."""
    version = headers.get("anthropic-version", VERSIONS[0])
    if version not in VERSIONS:
        raise InvalidRequest(
            f"anthropic-version must be {' or '.join(VERSIONS)}, not {shown(version)}",
            param="anthropic-version",
        )


def _chat(fields: Fields) -> dict[str, Any]:
    """What messages and their count have in common, as OpenAI's chat body."""
    body: dict[str, Any] = {"model": fields.raw("model", None), "messages": _messages(fields)}
    refuse(fields, _REFUSED)
    ignore(fields, *_IGNORED, "thinking")
    if fields.raw("tools", None):
        body["tools"] = [
            _tool(tool, f"tools[{number}]")
            for number, tool in enumerate(objects(fields.raw("tools"), "tools"))
        ]
    if fields.raw("tool_choice", None) is not None:
        body |= _tool_choice(Fields(fields.raw("tool_choice"), "tool_choice", path="tool_choice."))
    return body | _format(fields)


def _format(fields: Fields) -> dict[str, Any]:
    output = Fields(fields.raw("output_config", None) or {}, "output_config", path="output_config.")
    refuse(
        output, {"effort": "the model's effort cannot be chosen", "task_budget": "use max_tokens"}
    )
    wanted = output.raw("format", None) or fields.raw("output_format", None)
    output.end()
    if wanted is None:
        return {}
    form = Fields(wanted, "output_config.format", path="output_config.format.")
    if form.raw("type") != "json_schema":
        raise InvalidRequest(
            f"output_config.format.type must be json_schema, not {shown(form.raw('type'))}",
            param="output_config.format.type",
        )
    named = {"name": "answer", "schema": form.raw("schema")}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _tool(tool: Mapping[str, Any], param: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise NotSupported(
            f"{param} is of type {shown(tool['type'])}, a tool that the server would run; only "
            "tools with an input_schema, which the client runs, are supported",
            param=f"{param}.type",
        )
    if not isinstance(tool.get("input_schema"), dict):
        where = f"{param}.input_schema"
        raise InvalidRequest(f"{where} must be a JSON schema (an object)", param=where)
    function = {"name": tool.get("name"), "parameters": tool["input_schema"]}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _tool_choice(fields: Fields) -> dict[str, Any]:
    kind = fields.raw("type")
    names = {"auto": "auto", "any": "required", "none": "none"}
    if kind == "tool":
        chosen: Any = {"type": "function", "function": {"name": fields.raw("name")}}
    elif isinstance(kind, str) and kind in names:
        chosen = names[kind]
    else:
        raise InvalidRequest(
            f"tool_choice.type must be auto, any, tool or none, not {shown(kind)}",
            param="tool_choice.type",
        )
    alone = fields.raw("disable_parallel_tool_use", None) is True
    return {"tool_choice": chosen} | ({"parallel_tool_calls": False} if alone else {})


def _shows_thinking(value: Any) -> bool:
    """Whether the client wants to see the reasoning; whether there is any is up to the model."""
    if value is None:
        return False
    fields = Fields(value, "thinking", path="thinking.")
    kind = fields.raw("type")
    if kind not in ("enabled", "disabled", "adaptive", "between_tools"):
        raise InvalidRequest(
            f"thinking.type must be enabled, adaptive or disabled, not {shown(kind)}",
            param="thinking.type",
        )
    return kind != "disabled" and bool(fields.raw("display", None) != "omitted")


def _messages(fields: Fields) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    system = fields.raw("system", None)
    if system:
        messages.append({"role": "system", "content": text_of(system, "system")})
    given = objects(fields.raw("messages"), "messages")
    for number, message in enumerate(given):
        param, role = f"messages[{number}]", message.get("role")
        content = message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        blocks = objects(blocks, f"{param}.content")
        if role == "user":
            messages += _from_user(blocks, f"{param}.content")
        elif role == "assistant":
            messages.append(_from_assistant(blocks, f"{param}.content"))
        elif role == "system":
            messages.append({"role": "system", "content": text_of(blocks, f"{param}.content")})
        else:
            raise InvalidRequest(
                f"{param}.role must be user, assistant or system, not {shown(role)}",
                param=f"{param}.role",
            )
    if given and given[-1]["role"] == "assistant":
        raise NotSupported(_PREFILL, param="messages")
    return messages


def _from_user(blocks: list[dict[str, Any]], param: str) -> list[dict[str, Any]]:
    """A user's turn: first the results of tools, each a message of its own, then what was said."""
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    for number, block in enumerate(blocks):
        where = f"{param}[{number}]"
        if block.get("type") == "tool_result":
            content = text_of(block.get("content") or "", f"{where}.content")
            if block.get("is_error"):
                content = f"Error: {content}"
            known = {"role": "tool", "tool_call_id": block.get("tool_use_id")}
            results.append({**known, "content": content})
        else:
            texts.append(part_text(block, where, ("text",)))
    if texts or not results:
        results.append({"role": "user", "content": "".join(texts)})
    return results


def _from_assistant(blocks: list[dict[str, Any]], param: str) -> dict[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, block in enumerate(blocks):
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "tool_use":
            arguments = msgspec.json.encode(block.get("input") or {}).decode()
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind != "redacted_thinking":  # nobody here can read that
            texts.append(part_text(block, f"{param}[{number}]", ("text",)))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})
