"""Reading constraints and tools: forms, hard caps, and the field that is at fault."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cloudlm.core.chat import Constraint, ConstraintKind, ToolChoice
from cloudlm.core.errors import CloudlmError, InvalidRequest
from cloudlm.core.requests import parse_chat, parse_completion, parse_sampling

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ANY_OBJECT = Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}')


MANY = [{"function": {"name": f"n{i}", "description": "x" * 9999}} for i in range(99)]


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"items": value}
    return value


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "structured_outputs": None}, None),
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": {"type": "object"}},
                }
            },
            ANY_OBJECT,
        ),
        ({"guided_json": '{"type": "object"}'}, ANY_OBJECT),
        ({"structured_outputs": {"json": {"type": "object"}}}, ANY_OBJECT),
        ({"structured_outputs": {"json_object": True}}, ANY_OBJECT),
        ({"guided_regex": "a+"}, Constraint(ConstraintKind.REGEX, "a+")),
        ({"guided_choice": ["a", "é"]}, Constraint(ConstraintKind.CHOICE, '["a", "é"]')),
        ({"guided_grammar": 'start: "a"'}, Constraint(ConstraintKind.GRAMMAR, 'start: "a"')),
    ],
)
def test_every_way_to_ask(fields: dict[str, Any], constraint: Constraint | None) -> None:
    assert parse_chat({**CHAT, **fields}).sampling.constraint == constraint
    completion = parse_completion({"model": "m", "prompt": "x", **fields})
    assert completion.sampling.constraint == constraint
    assert parse_sampling(fields).constraint == constraint


def schema(value: Any, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": value, **more}}}


@pytest.mark.promise(18)
@pytest.mark.known_failure("CVE-2025-48944")
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (schema(None), "response_format.json_schema.schema"),
        (schema([]), "response_format.json_schema.schema"),
        (schema({}, name="a b"), "response_format.json_schema.name"),
        (schema({}, strict="yes"), "response_format.json_schema.strict"),
        (schema(deep(40)), "response_format.json_schema.schema"),
        (schema({"x": "y" * 70_000}), "response_format.json_schema.schema"),
        (schema({"x": "\ud800"}), "response_format.json_schema.schema"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[" * 50_000}, "guided_json"),
        ({"guided_regex": "a" * 70_000}, "guided_regex"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a"] * 2000}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_grammar": 'root ::= "a"'}, "guided_grammar"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"tools": {}}, "tools"),
        ({"tools": [TOOL] * 2}, "tools"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [{"type": "web"}]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "a" * 65}}]}, "tools[0].function.name"),
        (
            {"tools": [{"function": {"name": "a", "parameters": deep(40)}}]},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{"function": {"name": "a", "description": 1}}]},
            "tools[0].function.description",
        ),
        ({"tools": [{"function": {"name": f"n{i}"}} for i in range(129)]}, "tools"),
        ({"tools": MANY}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": [TOOL]}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ],
)
def test_a_bad_form_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(CloudlmError) as caught:
        parse_chat({**CHAT, **fields})
    assert caught.value.status in (400, 501)
    assert caught.value.param == param
    assert len(caught.value.message) < 500


def test_tools_and_their_choice() -> None:
    plain = parse_chat(CHAT).tool_use
    assert (plain.tools, plain.choice) == ((), ToolChoice.NONE)
    other = {"type": "function", "function": {"name": "now", "strict": True}}
    use = parse_chat({**CHAT, "tools": [TOOL, other], "parallel_tool_calls": False}).tool_use
    assert (use.choice, use.parallel) == (ToolChoice.AUTO, False)
    assert [tool.name for tool in use.offered] == ["add", "now"]
    assert use.tools[1].parameters["additionalProperties"] is False
    named = {"type": "function", "function": {"name": "now"}}
    use = parse_chat({**CHAT, "tools": [TOOL, other], "tool_choice": named}).tool_use
    assert use.choice is ToolChoice.REQUIRED
    assert [tool.name for tool in use.offered] == ["now"]


def test_calls_and_results_in_a_conversation() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]
    _, assistant, tool = parse_chat({"model": "m", "messages": messages}).messages
    assert assistant.tool_calls[0].arguments == {"a": [1]}
    assert assistant.reasoning == "hm"
    assert tool.tool_call_id == "c"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "x", "tool_calls": [1]},
        {"role": "assistant", "tool_calls": {}},
        {"role": "assistant", "tool_calls": [{}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "a b"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "f", "arguments": json.dumps({"a": deep(80)})}}],
        },
        {"role": "tool", "content": "x", "tool_call_id": 7},
    ],
)
def test_bad_calls_in_a_conversation(message: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat({"model": "m", "messages": [message]})
    assert (caught.value.param or "").startswith("messages[0].tool_call")
