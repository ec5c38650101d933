"""OpenAI's Responses API: ``/v1/responses``, without a memory.

Nothing is stored, so each request brings its whole conversation as input items; what refers to
stored things is refused. Requests become chat requests. Written after OpenAI's public API
reference. How answers are said is in ``responses_stream``. Must not do I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cloudlm.core.errors import InvalidRequest, NotSupported
from cloudlm.core.fields import Fields, shown
from cloudlm.core.requests import decode_body
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.base import Asker
from cloudlm.gateway.dialects.heard import copied, ignore, objects, refuse, renamed, text_of
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.dialects.responses_stream import ResponseRendering
from cloudlm.gateway.exchange import GatewayRequest

_SAME = ("model", "stream", "temperature", "top_p", "user", "parallel_tool_calls")
_RENAMED = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "response_format.json_schema.name": "text.format.name",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format.json_schema.strict": "text.format.strict",
}
_STATELESS = "nothing is stored here; send the whole conversation as input"
_REFUSED = {
    "previous_response_id": _STATELESS,
    "conversation": _STATELESS,
    "prompt": "there are no stored prompts; send instructions and input",
    "background": "answers are given while the client waits",
    "context_management": "the conversation is used as it is sent",
    "moderation": "there is no moderation model",
    "top_logprobs": "use /v1/chat/completions for log probabilities",
}
_IGNORED = (
    "max_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "client_metadata",
)
_TEXT_PARTS = ("input_text", "output_text", "text")
_ECHOED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "user": None,
}


def parse(request: GatewayRequest, _: str, asker: Asker) -> Call:
    """A call out of ``POST /v1/responses``. Raises InvalidRequest and NotSupported."""
    given = decode_body(request.body)
    fields = Fields(given, "a response request")
    with renamed(_RENAMED):
        body = copied(fields, {name: name for name in _SAME})
        body |= copied(fields, {"max_output_tokens": "max_tokens", "priority": "priority"})
        body |= copied(fields, {"cache_salt": "cache_salt"})
        body["messages"] = _messages(fields)
        body |= _tools(fields) | _format(fields)
        _check_rest(fields)
        call = openai.parse_body(Operation.CHAT, body, asker.salted, may_lead=asker.may_lead)
    echoed = {
        name: default if given.get(name) is None else given[name]
        for name, default in _ECHOED.items()
    }
    return replace(call, translate=lambda model: ResponseRendering(model, echoed))


def _check_rest(fields: Fields) -> None:
    refuse(fields, _REFUSED)
    ignore(fields, *_IGNORED)
    fields.mapping("metadata", fields.raw("metadata", None) or {}, max_entries=16)
    if fields.raw("truncation", None) not in (None, "disabled"):
        raise NotSupported("truncation other than disabled is not supported", param="truncation")
    for wanted in fields.items("include", fields.raw("include", None) or ()):
        if wanted != "reasoning.encrypted_content":  # reasoning is shown plainly, if there is any
            raise NotSupported(f"include {shown(wanted)} is not supported", param="include")
    reasoning = Fields(fields.raw("reasoning", None) or {}, "reasoning", path="reasoning.")
    refuse(reasoning, {"effort": "the model's effort cannot be chosen"})
    ignore(reasoning, "summary", "generate_summary")
    fields.end()


def _format(fields: Fields) -> dict[str, Any]:
    text = Fields(fields.raw("text", None) or {}, "text", path="text.")
    refuse(text, {"verbosity": "ask for it in the instructions"})
    form = text.raw("format", None)
    text.end()
    if form is None:
        return {}
    inner = Fields(form, "text.format", path="text.format.")
    kind = inner.raw("type")
    if kind in ("text", "json_object"):
        return {"response_format": {"type": kind}}
    if kind != "json_schema":
        raise InvalidRequest(
            f"text.format.type must be text, json_object or json_schema, not {shown(kind)}",
            param="text.format.type",
        )
    schema = copied(inner, {name: name for name in ("name", "schema", "strict", "description")})
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _tools(fields: Fields) -> dict[str, Any]:
    found: dict[str, Any] = {}
    tools = [
        _tool(tool, f"tools[{number}]")
        for number, tool in enumerate(objects(fields.raw("tools", None) or [], "tools"))
    ]
    if tools:
        found["tools"] = tools
    choice = fields.raw("tool_choice", None)
    if isinstance(choice, dict):
        if choice.get("type") != "function":
            raise NotSupported(
                f"tool_choice of type {shown(choice.get('type'))} is not supported, only function",
                param="tool_choice",
            )
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    return found if choice is None else {**found, "tool_choice": choice}


def _tool(tool: Mapping[str, Any], param: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise NotSupported(
            f"{param} is of type {shown(tool.get('type'))}, a tool that the server would run; only "
            "function is supported, which the client runs",
            param=f"{param}.type",
        )
    names = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in names if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _messages(fields: Fields) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    instructions = fields.raw("instructions", None)
    if instructions is not None:
        content = text_of(instructions, "instructions", _TEXT_PARTS)
        messages.append({"role": "system", "content": content})
    given = fields.raw("input")
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    turns = _Turns(messages)
    for number, item in enumerate(objects(given, "input")):
        turns.add(item, f"input[{number}]")
    return messages


class _Turns:
    """Gathers items into messages: an assistant's reasoning, words and calls are one turn."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self._messages = messages

    def add(self, item: Mapping[str, Any], param: str) -> None:
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind == "message":
            self._say(item, param)
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            self._assistant().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            content = text_of(item.get("output"), f"{param}.output", _TEXT_PARTS)
            answered = {"role": "tool", "tool_call_id": item.get("call_id")}
            self._messages.append({**answered, "content": content})
        elif kind == "reasoning":
            thought = text_of(item.get("content") or [], f"{param}.content", ("reasoning_text",))
            if thought:
                self._assistant()["reasoning_content"] = thought
        elif kind == "item_reference":
            raise NotSupported(f"{param} refers to a stored item: {_STATELESS}", param=param)
        else:
            raise NotSupported(
                f"{param} is of type {shown(kind)}; message, function_call, function_call_output "
                "and reasoning can be read here",
                param=f"{param}.type",
            )

    def _say(self, item: Mapping[str, Any], param: str) -> None:
        content = text_of(item.get("content"), f"{param}.content", _TEXT_PARTS)
        if item.get("role") != "assistant":
            self._messages.append({"role": item.get("role"), "content": content})
            return
        turn = self._assistant()
        turn["content"] += content

    def _assistant(self) -> dict[str, Any]:
        """The assistant's turn at the end of the conversation."""
        if not self._messages or self._messages[-1]["role"] != "assistant":
            self._messages.append({"role": "assistant", "content": ""})
        return self._messages[-1]
