"""Taking an answer apart: reasoning and tool calls, the same however the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.worker.speech import PlainReader, Reader, ReasoningReader, Speech, delta_of
from cloudlm.worker.tools import ToolForm, make_reader

NAMES = {"weather", "add"}
HERMES, LLAMA3, MISTRAL = ToolForm.HERMES, ToolForm.LLAMA3, ToolForm.MISTRAL
ONE = '{"name": "weather", "arguments": {"city": "Köln <tool_call> ]}", "n": [1, {"a": "\\""}]}}'
TWO = '{"arguments": {"a": 1},\n "name": "add"}'
ARGS_ONE = {"city": "Köln <tool_call> ]}", "n": [1, {"a": '"'}]}
CALLS = [("weather", ARGS_ONE), ("add", {"a": 1})]

# form, text, content, calls
WHOLE: list[tuple[ToolForm, str, str | None, list[tuple[str, Any]]]] = [
    (HERMES, "Hello <tool> there \n", "Hello <tool> there \n", []),
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", None, CALLS[:1]),
    (
        HERMES,
        f"Let me see.\n<tool_call>{ONE}</tool_call>\n<tool_call>\n{TWO}</tool_call>\n",
        "Let me see.",
        CALLS,
    ),
    (HERMES, f"<tool_call>{ONE}", None, CALLS[:1]),
    (HERMES, f"<tool_call>{ONE}</tool_call> and then\n", " and then", CALLS[:1]),
    (HERMES, "<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
    (
        HERMES,
        '<tool_call>{"name": "add"}</tool_call>',
        '<tool_call>{"name": "add"}</tool_call>',
        [],
    ),
    (HERMES, '<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
    (HERMES, "the end <tool_", "the end <tool_", []),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}", "id": 7}</tool_call>',
        None,
        [("add", {"a": 1})],
    ),
    (HERMES, '<tool_call>{"name":"add","arguments":null}</tool_call>', None, [("add", {})]),
    (LLAMA3, ONE, None, CALLS[:1]),
    (LLAMA3, f"<|python_tag|>{ONE}; {TWO}", None, CALLS),
    (LLAMA3, '{"name": "add", "parameters": {"a": 1}}', None, [("add", {"a": 1})]),
    (LLAMA3, '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    (
        LLAMA3,
        '{"name": "unknown", "parameters": {}} x',
        '{"name": "unknown", "parameters": {}} x',
        [],
    ),
    (LLAMA3, "<|python_tag|>print(1)", "print(1)", []),
    (LLAMA3, " Hi {", " Hi {", []),
    (LLAMA3, "<|pyth", "<|pyth", []),
    (MISTRAL, f"[TOOL_CALLS] [{ONE}, {TWO}]", None, CALLS),
    (MISTRAL, f"[TOOL_CALLS]{ONE}[TOOL_CALLS]{TWO}", None, CALLS),
    (MISTRAL, 'Ok.[TOOL_CALLS]add[ARGS]{"a": 1}', "Ok.", [("add", {"a": 1})]),
    (
        MISTRAL,
        '[TOOL_CALLS]add{"a": 1}[TOOL_CALLS]weather[CALL_ID]abc[ARGS]{}',
        None,
        [("add", {"a": 1}), ("weather", {})],
    ),
    (MISTRAL, "[TOOL_CALLS]!", "[TOOL_CALLS]!", []),
    (MISTRAL, "[TOOL_CALLS]add[AR", "[TOOL_CALLS]add[AR", []),
    (MISTRAL, "a [1] b", "a [1] b", []),
]


def read(reader: Reader, pieces: list[str]) -> Speech:
    speech = Speech()
    for piece in pieces:
        speech.add(reader.push(piece))
    speech.add(reader.finish())
    return speech


def said(message: dict[str, Any]) -> tuple[Any, Any, Any]:
    calls = [
        (call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls", [])
    ]
    return message["content"], message.get("reasoning_content"), calls


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted(place % (len(text) + 1) for place in places)
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@pytest.mark.parametrize(("form", "text", "content", "calls"), WHOLE)
def test_every_form_cut_at_every_place(
    form: ToolForm, text: str, content: str | None, calls: list[tuple[str, Any]]
) -> None:
    for place in range(len(text) + 1):
        reader = make_reader(form, NAMES, parallel=True)
        message = read(reader, [text[:place], text[place:]]).message()
        found, _, found_calls = said(message)
        assert found == content
        assert [(name, json.loads(arguments)) for name, arguments in found_calls] == calls
    one_by_one = read(make_reader(form, NAMES, parallel=True), list(text)).message()
    assert said(one_by_one) == said(message)


ALPHABET = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
        "<think>",
        "</think>",
        ONE,
        TWO,
        '{"name": "add", "arguments": ',
        "{",
        "}",
        "[",
        "]",
        "null",
        "add",
        '"',
        ":",
        ",",
        ";",
        " ",
        "\n",
        "x",
        "\\",
        "é",
    ]
)


@pytest.mark.promise(38)
@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(ALPHABET, max_size=12),
    places=st.lists(st.integers(0, 500), max_size=8),
    form=st.sampled_from([*ToolForm, None]),
    thinks=st.sampled_from([None, False, True]),
)
def test_no_text_depends_on_its_cutting(
    parts: list[str], places: list[int], form: ToolForm | None, thinks: bool | None
) -> None:
    def make() -> Reader:
        reader: Reader = PlainReader() if form is None else make_reader(form, NAMES, parallel=True)
        return reader if thinks is None else ReasoningReader(reader, begun=thinks)

    text = "".join(parts)
    whole = said(read(make(), [text]).message())
    assert said(read(make(), cut(text, places)).message()) == whole
    assert said(read(make(), list(text)).message()) == whole


@pytest.mark.parametrize(
    ("text", "begun", "content", "reasoning"),
    [
        ("<think>\nhm, 1 < 2\n</think>\n\nYes.", False, "Yes.", "hm, 1 < 2"),
        ("hm </think>Yes.\n", True, "Yes.\n", "hm"),
        ("Yes <think>no</think>", False, "Yes <think>no</think>", None),
        ("<think>never ends", False, "", "never ends"),
        ("<think></think>x", False, "x", None),
        ("<thin", False, "<thin", None),
        ("  x", False, "  x", None),
        ("a</thin", True, "", "a</thin"),
    ],
)
def test_reasoning(text: str, begun: bool, content: str, reasoning: str | None) -> None:
    for pieces in ([text], list(text), [text[:9], text[9:]]):
        message = read(ReasoningReader(PlainReader(), begun=begun), pieces).message()
        assert said(message) == (content, reasoning, [])


def test_arguments_are_streamed_as_they_come() -> None:
    reader = make_reader(HERMES, NAMES, parallel=True)
    deltas = [delta_of(reader.push(piece)) for piece in [f"<tool_call>{ONE[:50]}", ONE[50:70]]]
    first, second = (delta["tool_calls"][0] for delta in deltas)
    assert first["function"]["name"] == "weather"
    assert first["id"].startswith("call_")
    assert first["type"] == "function"
    assert first["function"]["arguments"] + second["function"]["arguments"] in ONE
    assert second == {"index": 0, "function": {"arguments": ONE[50:70]}}


def test_one_call_where_more_are_not_wanted() -> None:
    text = f"<tool_call>{ONE}</tool_call><tool_call>{TWO}</tool_call>"
    message = read(make_reader(HERMES, NAMES, parallel=False), [text]).message()
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather"]


def test_mistral_ids_have_the_length_that_its_templates_demand() -> None:
    message = read(make_reader(MISTRAL, NAMES, parallel=True), [f"[TOOL_CALLS][{ONE}]"]).message()
    (call,) = message["tool_calls"]
    assert len(call["id"]) == 9
    assert call["id"].isalnum()
