"""Reads tools: those that a request offers, which of them must be called, and the calls and results
in its conversation.

Every name, size and number has a hard cap. What a schema means is the engine's affair.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from cloudlm.core.chat import Tool, ToolCall, ToolChoice, ToolUse
from cloudlm.core.errors import InvalidRequest, NotSupported
from cloudlm.core.fields import check_flag, check_text, kind_of, shown
from cloudlm.core.request_format import check_depth, schema_text

MAX_TOOLS = 128
MAX_TOOLS_CHARACTERS = 262_144
MAX_CALLS = 128
MAX_CALL_ID_CHARACTERS = 256
MAX_ARGUMENTS_CHARACTERS = 1_000_000
MAX_ARGUMENTS_DEPTH = 64
MAX_REASONING_CHARACTERS = 4_000_000
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def parse_tool_use(body: Mapping[str, Any]) -> ToolUse:
    """``tools``, ``tool_choice`` and ``parallel_tool_calls``. Raises InvalidRequest."""
    parallel = True
    if body.get("parallel_tool_calls") is not None:
        parallel = check_flag(body["parallel_tool_calls"], "parallel_tool_calls")
    tools = _tools(body.get("tools"))
    choice, named = _choice(body.get("tool_choice"), tools)
    return ToolUse(tools, choice, named, parallel)


def message_extras(item: Mapping[str, Any], role: str, param: str) -> dict[str, Any]:
    """The fields of a message that have to do with tools and reasoning, named as in ``Message``.

    Raises InvalidRequest.
    """
    extras: dict[str, Any] = {}
    if item.get("tool_calls") not in (None, []):
        if role != "assistant":
            raise InvalidRequest(
                f"{param}.tool_calls belongs to the role assistant, not to {role}",
                param=f"{param}.tool_calls",
            )
        extras["tool_calls"] = _calls(item["tool_calls"], f"{param}.tool_calls")
    for name, field, longest in (
        ("tool_call_id", "tool_call_id", MAX_CALL_ID_CHARACTERS),
        ("reasoning_content", "reasoning", MAX_REASONING_CHARACTERS),
    ):
        if item.get(name) is not None:
            extras[field] = check_text(item[name], f"{param}.{name}", max_length=longest)
    return extras


def _tools(value: Any) -> tuple[Tool, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise InvalidRequest(f"tools must be a list of at most {MAX_TOOLS} tools", param="tools")
    tools = tuple(_tool(item, f"tools[{number}]") for number, item in enumerate(value))
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"tools holds two functions named {twice!r}", param="tools")
    try:
        size = len(json.dumps(value, ensure_ascii=False).encode())
    except (UnicodeEncodeError, ValueError):
        raise InvalidRequest("tools is not valid Unicode text", param="tools") from None
    if size > MAX_TOOLS_CHARACTERS:
        raise InvalidRequest(
            f"tools has {size} bytes; at most {MAX_TOOLS_CHARACTERS} are allowed", param="tools"
        )
    return tools


def _tool(item: Any, param: str) -> Tool:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{param} must be an object, not {kind_of(item)}", param=param)
    if item.get("type", "function") != "function":
        raise NotSupported(
            f"{param} is of type {shown(item.get('type'))}; only function is supported", param=param
        )
    function = item.get("function")
    if not isinstance(function, dict):
        raise InvalidRequest(
            f"{param}.function must be an object with a name", param=f"{param}.function"
        )
    name = _name(function.get("name"), f"{param}.function.name")
    description = function.get("description")
    if description is not None:
        where = f"{param}.function.description"
        check_text(description, where, max_length=MAX_TOOLS_CHARACTERS)
    if function.get("strict") is not None:
        check_flag(function["strict"], f"{param}.function.strict")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = _NO_PARAMETERS
    schema_text(parameters, f"{param}.function.parameters")
    if not isinstance(parameters, dict):
        raise InvalidRequest(
            f"{param}.function.parameters must be an object", param=f"{param}.function.parameters"
        )
    return Tool(name, parameters, {**item, "type": "function"})


def _name(value: Any, param: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidRequest(
            f"{param} must be 1 to 64 letters, digits, _ or -, not {shown(value)}", param=param
        )
    return value


def _choice(value: Any, tools: tuple[Tool, ...]) -> tuple[ToolChoice, str | None]:
    if value is None:
        return (ToolChoice.AUTO if tools else ToolChoice.NONE), None
    if isinstance(value, dict):
        return ToolChoice.REQUIRED, _named(value, tools)
    if value not in list(ToolChoice):
        raise InvalidRequest(
            "tool_choice must be none, auto, required or "
            f'{{"type": "function", "function": {{"name": …}}}}, not {shown(value)}',
            param="tool_choice",
        )
    choice = ToolChoice(value)
    if choice is ToolChoice.REQUIRED and not tools:
        raise InvalidRequest("tool_choice required needs tools to choose from", param="tool_choice")
    return (choice if tools else ToolChoice.NONE), None


def _named(value: Mapping[str, Any], tools: tuple[Tool, ...]) -> str:
    kind, function = value.get("type"), value.get("function")
    if kind != "function" or not isinstance(function, dict):
        raise InvalidRequest(
            'tool_choice must be {"type": "function", "function": {"name": …}}', param="tool_choice"
        )
    name = _name(function.get("name"), "tool_choice.function.name")
    if name not in {tool.name for tool in tools}:
        raise InvalidRequest(
            f"tool_choice names {name!r}, which is not among tools", param="tool_choice"
        )
    return name


def _calls(value: Any, param: str) -> tuple[ToolCall, ...]:
    if not isinstance(value, list) or len(value) > MAX_CALLS:
        raise InvalidRequest(f"{param} must be a list of at most {MAX_CALLS} calls", param=param)
    return tuple(_call(item, f"{param}[{number}]") for number, item in enumerate(value))


def _call(item: Any, param: str) -> ToolCall:
    function = item.get("function") if isinstance(item, dict) else None
    if not isinstance(function, dict):
        raise InvalidRequest(f"{param} must be an object with id and function", param=param)
    given = item.get("id")
    call_id = check_text(
        "" if given is None else given, f"{param}.id", max_length=MAX_CALL_ID_CHARACTERS
    )
    name = _name(function.get("name"), f"{param}.function.name")
    return ToolCall(
        call_id, name, _arguments(function.get("arguments"), f"{param}.function.arguments")
    )


def _arguments(value: Any, param: str) -> Mapping[str, Any]:
    """The decoded arguments: templates show them as the model wrote them, an object."""
    if value in (None, ""):
        return {}
    text = check_text(value, param, max_length=MAX_ARGUMENTS_CHARACTERS)
    try:
        decoded = msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError):
        decoded = None
    if not isinstance(decoded, dict):
        raise InvalidRequest(f"{param} must be a JSON object written as a text", param=param)
    check_depth(decoded, param, MAX_ARGUMENTS_DEPTH)
    return decoded
