"""Tools, reasoning and constraints on a worker's routes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tiny_chat_model import TEMPLATE, save_tiny_chat_model

from cloudlm.core.chat import Constraint, ConstraintKind, Message, ToolCall
from cloudlm.core.clock import SystemClock
from cloudlm.core.errors import InvalidRequest
from cloudlm.worker.app import build_app
from cloudlm.worker.config import WorkerConfig
from cloudlm.worker.dialect import Dialect, find_dialect
from cloudlm.worker.loading import load_model
from cloudlm.worker.replica import Replica
from cloudlm.worker.template import TemplateProcess
from cloudlm.worker.tokenise import control_pattern, defuse, restore
from cloudlm.worker.tools import ToolForm

Parse = Callable[[str], list[Any]]
HERMES = Dialect(ToolForm.HERMES)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "adds", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


async def test_a_call_in_a_whole_answer(make_bench: Any) -> None:
    bench = make_bench(dialect=HERMES)
    bench.engine.answer = f"Let me add.\n{CALL}"
    (choice,) = (await bench.chat(tools=TOOLS)).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": "Let me add.", "refusal": None}
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


async def test_a_call_in_a_stream(make_bench: Any, parse_events: Parse) -> None:
    bench = make_bench(dialect=HERMES)
    bench.engine.answer = f"Ok. {CALL}\n{CALL}"
    answer = await bench.chat(tools=TOOLS, stream=True, n=2)
    *chunks, _ = parse_events(answer.text)
    for number in range(2):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == number]
        assert "".join(one["delta"].get("content", "") for one in own) == "Ok."
        deltas = [call for one in own for call in one["delta"].get("tool_calls", [])]
        for index in range(2):
            of_call = [delta for delta in deltas if delta["index"] == index]
            assert of_call[0]["function"]["name"] == "add"
            assert all("name" not in delta["function"] for delta in of_call[1:])
            written = "".join(delta["function"]["arguments"] for delta in of_call)
            assert json.loads(written) == {"a": 1}
        assert len({delta["id"] for delta in deltas if "id" in delta}) == 2
        assert own[-1]["finish_reason"] == "tool_calls"


async def test_an_answer_cut_short_says_so(make_bench: Any) -> None:
    bench = make_bench(dialect=HERMES)
    bench.engine.answer = CALL
    (choice,) = (await bench.chat(tools=TOOLS, max_tokens=50)).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"a"')


async def test_tools_that_must_not_be_called(make_bench: Any) -> None:
    for dialect in (HERMES, Dialect()):
        bench = make_bench(dialect=dialect)
        bench.engine.answer = CALL
        (choice,) = (await bench.chat(tools=TOOLS, tool_choice="none")).json()["choices"]
        assert choice["message"]["content"] == CALL
        assert choice["finish_reason"] == "stop"
        assert bench.engine.constraints == []


@pytest.mark.parametrize(
    ("fields", "found", "missing"),
    [
        ({"tool_choice": "required"}, ["add", "now", "call (", "{0,15}"], ["think"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ["calls: call\n"], ["{0,15}"]),
        ({"tool_choice": NOW}, ["now"], ['\\"add\\"']),
        ({"response_format": {"type": "json_object"}}, ["answer | calls", "add"], []),
    ],
)
async def test_a_choice_becomes_a_grammar(
    make_bench: Any, fields: dict[str, Any], found: list[str], missing: list[str]
) -> None:
    bench = make_bench(dialect=HERMES)
    await bench.chat(tools=TOOLS, **fields)
    (constraint,) = bench.engine.constraints
    assert constraint.kind is ConstraintKind.GRAMMAR
    assert all(part in constraint.text for part in found)
    assert not any(part in constraint.text for part in missing)
    assert bench.engine.requests[0].guide is not None


async def test_an_automatic_choice_leaves_the_answer_free(make_bench: Any) -> None:
    bench = make_bench(dialect=HERMES)
    await bench.chat(tools=TOOLS)
    assert bench.engine.constraints == []


async def test_constraints_reach_the_engine(bench: Any) -> None:
    await bench.chat(response_format={"type": "json_object"}, n=2)
    await bench.complete(guided_regex="a+")
    await bench.post(
        "/internal/v1/generate",
        {"prompt": "x", "sampling": {"structured_outputs": {"choice": ["a"]}, "temperature": 0}},
    )
    by_object = Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}')
    by_regex = Constraint(ConstraintKind.REGEX, "a+")
    by_choice = Constraint(ConstraintKind.CHOICE, '["a"]')
    assert bench.engine.constraints == [by_object, by_object, by_regex, by_choice]


async def test_a_constraint_that_cannot_be_followed_is_a_400(bench: Any) -> None:
    bench.engine.refusal = InvalidRequest("the regex cannot be followed: no")
    answer = await bench.chat(structured_outputs={"regex": "("}, stream=True)
    assert answer.status_code == 400
    assert "cannot be followed" in answer.json()["error"]["message"]


async def test_reasoning_whole_and_streamed(make_bench: Any, parse_events: Parse) -> None:
    bench = make_bench(dialect=Dialect(reasons=True))
    bench.engine.answer = "<think>\nhm\n</think>\n\nYes"
    (choice,) = (await bench.chat()).json()["choices"]
    assert choice["message"]["reasoning_content"] == "hm"
    assert choice["message"]["content"] == "Yes"
    *chunks, _ = parse_events((await bench.chat(stream=True)).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes"


async def test_a_constraint_lets_the_model_think_first(make_bench: Any) -> None:
    bench = make_bench(dialect=Dialect(reasons=True))
    await bench.chat(response_format={"type": "json_object"})
    (constraint,) = bench.engine.constraints
    assert "</think>" in constraint.text


@pytest.mark.parametrize(
    ("template", "form", "reasons"),
    [
        (None, None, False),
        ("{{ messages }}", None, False),
        ("{% if tools %}<tool_call></tool_call>{% endif %}</think>", ToolForm.HERMES, True),
        ("{% if tools %}<tool_call><function=x>{% endif %}", None, False),
        ("{% if tools %}<|python_tag|>{% endif %}", ToolForm.LLAMA3, False),
        ("{{ tools }}[TOOL_CALLS]", ToolForm.MISTRAL, False),
    ],
)
def test_the_template_tells_the_form(
    template: str | None, form: ToolForm | None, reasons: bool
) -> None:
    found = find_dialect(template, "auto", "auto", lambda text: None)
    assert (found.tools, found.reasons) == (form, reasons)
    assert find_dialect(template, "llama3", "none", lambda text: None).tools is ToolForm.LLAMA3
    assert find_dialect(template, "none", "think", lambda text: None) == Dialect(
        reasons=True, named_arguments=False
    )


async def test_the_template_gets_tools_calls_and_results() -> None:
    template = (
        "{{ tools | tojson }}{% for m in messages %}|{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.id }}={{ c.function.arguments.a }}{% endfor %}"
        "{{ m.tool_call_id }}{{ m.reasoning_content }}{% endfor %}"
    )
    renderer = TemplateProcess(template, {})
    messages = [
        Message("assistant", "", tool_calls=(ToolCall("c1", "add", {"a": 5}),), reasoning="hm"),
        Message("tool", "6", tool_call_id="c1"),
    ]
    try:
        text = await renderer.render(messages, add_generation_prompt=True, tools=[{"t": "é"}])
    finally:
        await renderer.close()
    assert text == '[{"t": "é"}]|assistant:c1=5hm|tool:6c1'


def test_control_tokens_in_tools_and_calls_stay_text() -> None:
    control = control_pattern(["<|end|>"])
    call = ToolCall("i<|end|>", "f", {"k<|end|>": ["<|end|>", 1]})
    message = Message("assistant", "", tool_calls=(call,), reasoning="<|end|>")
    made = defuse([message], control, [{"function": {"description": "x<|end|>"}}])
    written = repr((made.messages, made.tools))
    assert "<|end|>" not in written
    assert written.count("ue001") == 5
    assert restore(made.messages[0].tool_calls[0].id, made.marks) == "i<|end|>"


# The real engine behind the real app


@pytest.fixture
async def served(config: WorkerConfig, tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    folder = save_tiny_chat_model(tmp_path / "tiny", context=1024)
    options = {"kv_cache_mb": 4, "threads": 1, "dtype": "float32"}
    replica = Replica(replace(config, model=str(folder), options=options), SystemClock())
    replica.become_ready(await load_model(replica.config, lambda share, what: None))
    transport = httpx2.ASGITransport(build_app(replica), raise_app_exceptions=True)
    async with httpx2.AsyncClient(transport=transport, base_url="http://worker") as client:
        yield client
    await replica.close()


async def test_a_real_engine_calls_what_it_must(
    served: httpx2.AsyncClient, parse_events: Parse
) -> None:
    assert "<tool_call>" in TEMPLATE
    history = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    body = {
        "model": "echo",
        "messages": history,
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "parallel_tool_calls": False,
        "seed": 5,
        "max_tokens": 300,
    }
    whole = (await served.post("/v1/chat/completions", json=body)).json()
    (choice,) = whole["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"])["a"] in range(10)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    streamed = await served.post("/v1/chat/completions", json={**body, "stream": True})
    *chunks, _ = parse_events(streamed.text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [one for delta in deltas for one in delta.get("tool_calls", [])]
    written = "".join(one["function"]["arguments"] for one in calls)
    assert written == call["function"]["arguments"]
    bad = {**body, "tool_choice": "none", "structured_outputs": {"regex": "("}}
    answer = await served.post("/v1/chat/completions", json=bad)
    assert answer.status_code == 400
    assert "cannot be followed" in answer.json()["error"]["message"]
