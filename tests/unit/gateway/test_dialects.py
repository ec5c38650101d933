"""Each dialect: requests as its documentation writes them, answers and streams as it says."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.errors import CloudlmError, InvalidRequest, NotSupported, UpstreamFailed
from cloudlm.gateway.dialects import openai, routes
from cloudlm.gateway.dialects.base import Asker
from cloudlm.gateway.dialects.openai import Call
from cloudlm.gateway.exchange import GatewayRequest
from cloudlm.gateway.sse import SseParser, event
from cloudlm.gateway.view import ServedModel

MODEL = ServedModel("tiny", 1_700_000_000.0)
ASKER = Asker(lambda own: f"salt of {own}", False, lambda: [MODEL], lambda name: MODEL)
USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 3,
    "prompt_tokens_details": {"cached_tokens": 4},
}
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}


def call_of(path: str, body: Any, **headers: str) -> Call:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    names.setdefault("content-type", "application/json")
    request: Any = SimpleNamespace(method="POST", path=path, headers=names, body=raw)
    route, name = routes.find(request)
    route.check(request)
    assert route.parse is not None
    return route.parse(request, name, ASKER)


def sent(path: str, body: Any, **headers: str) -> dict[str, Any]:
    """What a replica is sent, without what every request gets."""
    made = json.loads(call_of(path, body, **headers).body)
    made.pop("cache_salt", None)
    made.pop("stream_options", None)
    return made


def whole(call: Call, message: dict[str, Any], finish: str = "stop", **more: Any) -> Any:
    choice = {"index": 0, "message": message, "finish_reason": finish, **more}
    body = {"choices": [choice], "usage": USAGE, "created": 1_700_000_000, "model": "m"}
    return json.loads(openai.rendering(call).whole(body))


def chunks_of(*deltas: dict[str, Any], finish: str = "stop", **more: Any) -> list[dict[str, Any]]:
    head = {"id": "c", "created": 1_700_000_000, "usage": USAGE}
    said = [{**head, "choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    end = {"index": 0, "delta": {}, "finish_reason": finish, **more}
    return [*said, {**head, "choices": [end]}, {**head, "choices": []}]


def streamed(call: Call, chunks: list[dict[str, Any]]) -> bytes:
    rendering = openai.rendering(call)
    return b"".join([*map(rendering.chunk, chunks), rendering.done()])


def events(raw: bytes) -> list[dict[str, Any]]:
    return [json.loads(data) for data in SseParser().feed(raw)]


def lines(raw: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in raw.splitlines()]


def call_delta(index: int, **function: str) -> dict[str, Any]:
    head = {"id": f"call_{index}", "type": "function"} if "name" in function else {}
    return {"tool_calls": [{"index": index, **head, "function": function}]}


SAID = [{"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}]
CALLS = [
    {"reasoning_content": "hm"},
    {"content": "I look."},
    call_delta(0, name="weather", arguments=""),
    call_delta(0, arguments='{"city":'),
    call_delta(0, arguments='"Rome"}'),
    call_delta(1, name="weather", arguments="{}"),
]


class TestAnthropic:
    BODY = {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}

    def test_the_request(self) -> None:
        tools = [{"name": "weather", "description": "d", "input_schema": WEATHER}]
        used = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}
        result = {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"}
        made = sent(
            "/v1/messages",
            {
                **self.BODY,
                "system": [{"type": "text", "text": "Be kind"}],
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "Ah"}, used]},
                    {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]},
                ],
                "tools": tools,
                "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
                "stop_sequences": ["END"],
                "top_k": 5,
                "metadata": {"user_id": "u"},
            },
            anthropic_version="2026-10-21",
        )
        function = {"name": "weather", "parameters": WEATHER, "description": "d"}
        called = {"name": "weather", "arguments": '{"city":"Rome"}'}
        assert made == {
            "model": "tiny",
            "max_tokens": 9,
            "messages": [
                {"role": "system", "content": "Be kind"},
                {"role": "user", "content": "Weather?"},
                {
                    "role": "assistant",
                    "content": "Ah",
                    "tool_calls": [{"id": "t1", "type": "function", "function": called}],
                },
                {"role": "tool", "tool_call_id": "t1", "content": "sunny"},
                {"role": "user", "content": "Well?"},
            ],
            "tools": [{"type": "function", "function": function}],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "stop": ["END"],
            "top_k": 5,
            "user": "u",
        }

    @pytest.mark.parametrize(
        ("more", "kind", "param"),
        [
            ({"max_tokens": None}, InvalidRequest, "max_tokens"),
            ({"stop_sequences": [""]}, InvalidRequest, "stop_sequences"),
            ({"container": "c"}, NotSupported, "container"),
            ({"tools": [{"type": "web_search_1", "name": "w"}]}, NotSupported, "tools[0].type"),
            ({"thinking": {"type": "maybe"}}, InvalidRequest, "thinking.type"),
            ({"made_up": 1}, InvalidRequest, "made_up"),
            ({"messages": [{"role": "tool", "content": "x"}]}, InvalidRequest, None),
            ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, NotSupported, None),
            ({"messages": [{"role": "assistant", "content": "I"}]}, NotSupported, "messages"),
        ],
    )
    def test_what_it_cannot_do_is_refused(
        self, more: Any, kind: type[CloudlmError], param: str | None
    ) -> None:
        with pytest.raises(kind) as refused:
            call_of("/v1/messages", {**self.BODY, **more})
        assert param in (None, refused.value.param)

    def test_an_unknown_version_is_refused(self) -> None:
        with pytest.raises(InvalidRequest, match="anthropic-version"):
            call_of("/v1/messages", self.BODY, anthropic_version="2031-01-01")

    def test_the_answer(self) -> None:
        made = whole(call_of("/v1/messages", self.BODY), {"content": "Hello"}, stop_reason="END")
        assert made.pop("id").startswith("msg_")
        assert made == {
            "type": "message",
            "role": "assistant",
            "model": "tiny",
            "content": [{"type": "text", "text": "Hello"}],
            "stop_reason": "stop_sequence",
            "stop_sequence": "END",
            "usage": {
                "input_tokens": 6,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 4,
                "output_tokens": 3,
            },
        }

    @pytest.mark.parametrize("thinks", [True, False])
    def test_the_stream(self, thinks: bool) -> None:
        thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}} if thinks else {}
        call = call_of("/v1/messages", {**self.BODY, "stream": True, **thinking})
        raw = streamed(call, chunks_of(*CALLS, finish="tool_calls"))
        made = events(raw)
        names = [line[7:] for line in raw.decode().splitlines() if line.startswith("event: ")]
        assert names == [one["type"] for one in made]
        blocks = [one["content_block"] for one in made if one["type"] == "content_block_start"]
        expected = ["thinking"] * thinks + ["text", "tool_use", "tool_use"]
        assert [block["type"] for block in blocks] == expected
        starts = [one["index"] for one in made if one["type"] == "content_block_start"]
        stops = [one["index"] for one in made if one["type"] == "content_block_stop"]
        assert starts == stops == list(range(len(expected)))
        json_parts = [
            one["delta"]["partial_json"]
            for one in made
            if one.get("delta", {}).get("type") == "input_json_delta"
        ]
        assert "".join(json_parts) == '{"city":"Rome"}{}'
        assert made[0]["message"]["usage"]["input_tokens"] == 6
        assert made[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
        assert made[-2]["usage"]["output_tokens"] == 3
        assert [made[0]["type"], made[-1]["type"]] == ["message_start", "message_stop"]

    def test_counting(self) -> None:
        body = {name: value for name, value in self.BODY.items() if name != "max_tokens"}
        call = call_of("/v1/messages/count_tokens", body)
        assert call.path == "/tokenize"
        assert json.loads(openai.rendering(call).whole({"count": 7})) == {"input_tokens": 7}


class TestResponses:
    BODY = {"model": "tiny", "input": "Hi"}

    def test_the_request(self) -> None:
        made = sent(
            "/v1/responses",
            {
                "model": "tiny",
                "instructions": "Be kind",
                "input": [
                    {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
                    {"type": "reasoning", "summary": [], "content": []},
                    {
                        "type": "function_call",
                        "call_id": "c1",
                        "name": "weather",
                        "arguments": "{}",
                    },
                    {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
                ],
                "tools": [{"type": "function", "name": "weather", "parameters": WEATHER}],
                "tool_choice": {"type": "function", "name": "weather"},
                "text": {"format": {"type": "json_schema", "name": "n", "schema": WEATHER}},
                "max_output_tokens": 20,
                "store": False,
                "include": ["reasoning.encrypted_content"],
            },
        )
        call = {"name": "weather", "arguments": "{}"}
        assert made["messages"] == [
            {"role": "system", "content": "Be kind"},
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "c1", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        ]
        assert made["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
        assert made["response_format"]["json_schema"] == {"name": "n", "schema": WEATHER}
        assert made["max_tokens"] == 20

    @pytest.mark.parametrize(
        ("more", "kind", "param"),
        [
            ({"previous_response_id": "resp_1"}, NotSupported, "previous_response_id"),
            ({"background": True}, NotSupported, "background"),
            ({"tools": [{"type": "web_search"}]}, NotSupported, "tools[0].type"),
            ({"truncation": "auto"}, NotSupported, "truncation"),
            ({"max_output_tokens": 0}, InvalidRequest, "max_output_tokens"),
            ({"input": []}, InvalidRequest, "input"),
            ({"input": [{"type": "item_reference", "id": "x"}]}, NotSupported, "input[0]"),
            ({"made_up": 1}, InvalidRequest, "made_up"),
        ],
    )
    def test_what_it_cannot_do_is_refused(
        self, more: Any, kind: type[CloudlmError], param: str
    ) -> None:
        with pytest.raises(kind) as refused:
            call_of("/v1/responses", {**self.BODY, **more})
        assert refused.value.param == param

    def test_the_answer(self) -> None:
        made = whole(call_of("/v1/responses", self.BODY), {"content": "Hello"}, "length")
        assert made["status"] == "incomplete"
        assert made["incomplete_details"] == {"reason": "max_output_tokens"}
        (item,) = made["output"]
        assert item["content"][0]["text"] == "Hello"
        assert made["usage"]["input_tokens_details"] == {"cached_tokens": 4}
        assert made["usage"]["total_tokens"] == 13

    def test_the_stream(self) -> None:
        call = call_of("/v1/responses", {**self.BODY, "stream": True})
        made = events(streamed(call, chunks_of(*CALLS, finish="tool_calls")))
        assert [one["sequence_number"] for one in made] == list(range(len(made)))
        response = made[-1]["response"]
        assert made[-1]["type"] == "response.completed"
        kinds = ["reasoning", "message", "function_call", "function_call"]
        assert [item["type"] for item in response["output"]] == kinds
        assert response["output"][2]["arguments"] == '{"city":"Rome"}'
        done = [one["item"] for one in made if one["type"] == "response.output_item.done"]
        assert [item["id"] for item in done] == [item["id"] for item in response["output"]]
        text = [one["delta"] for one in made if one["type"] == "response.output_text.delta"]
        assert text == ["I look."]


class TestOllama:
    BODY = {"model": "tiny:latest", "messages": [{"role": "user", "content": "Hi"}]}

    def test_the_request(self) -> None:
        called = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
        made = sent(
            "/api/chat",
            {
                "model": "tiny:latest",
                "messages": [
                    {"role": "user", "content": "Weather?"},
                    {"role": "assistant", "content": "", "tool_calls": [called]},
                    {"role": "tool", "content": "sunny", "tool_name": "weather"},
                ],
                "options": {
                    "num_predict": -1,
                    "temperature": 0,
                    "repeat_penalty": 1.1,
                    "num_ctx": 9,
                },
                "format": WEATHER,
                "keep_alive": "5m",
            },
        )
        assert made["model"] == "tiny"
        assert made["stream"] is True
        assert "max_tokens" not in made
        assert (made["temperature"], made["repetition_penalty"]) == (0, 1.1)
        assert made["messages"][1]["tool_calls"][0]["id"] == made["messages"][2]["tool_call_id"]
        assert made["response_format"]["json_schema"]["schema"] == WEATHER

    @pytest.mark.parametrize(
        ("path", "more", "param"),
        [
            ("/api/chat", {"options": {"temperature": 9}}, "options.temperature"),
            ("/api/chat", {"options": {"mirostat": 1}}, "options.mirostat"),
            ("/api/chat", {"format": "xml"}, "format"),
            ("/api/chat", {"messages": [{"role": "user", "images": ["x"]}]}, "messages[0]"),
            ("/api/generate", {"prompt": "x", "suffix": "y", "messages": None}, "suffix"),
            ("/api/generate", {"prompt": ""}, "prompt"),
        ],
    )
    def test_what_it_cannot_do_is_refused(self, path: str, more: Any, param: str) -> None:
        with pytest.raises(CloudlmError) as refused:
            call_of(path, {**self.BODY, **more})
        assert refused.value.param == param

    def test_the_answer(self) -> None:
        call = call_of("/api/chat", {**self.BODY, "stream": False})
        function = {"name": "weather", "arguments": '{"city":"Rome"}'}
        tool_calls = [{"id": "c", "type": "function", "function": function}]
        made = whole(call, {"content": None, "tool_calls": tool_calls}, "tool_calls")
        shown = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
        message = {"role": "assistant", "content": "", "tool_calls": [shown]}
        assert made.pop("total_duration") > 0
        assert made == {
            "model": "tiny",
            "created_at": "2023-11-14T22:13:20Z",
            "message": message,
            "done": True,
            "done_reason": "stop",
            "load_duration": 0,
            "prompt_eval_count": 10,
            "eval_count": 3,
        }

    def test_the_stream(self) -> None:
        call = call_of("/api/chat", self.BODY)
        made = lines(streamed(call, chunks_of(*CALLS, finish="tool_calls")))
        assert [one["done"] for one in made] == [False, False, True]
        assert made[0]["message"]["content"] == "I look."
        arguments = [c["function"]["arguments"] for c in made[1]["message"]["tool_calls"]]
        assert arguments == [{"city": "Rome"}, {}]
        generate = call_of("/api/generate", {"model": "tiny", "prompt": "x"})
        made = lines(streamed(generate, chunks_of(*SAID, finish="length")))
        assert [one["response"] for one in made] == ["Hel", "lo", ""]
        assert made[-1]["done_reason"] == "length"

    def test_embeddings(self) -> None:
        call = call_of("/api/embed", {"model": "tiny", "input": ["a", "b"]})
        data = [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [1.0]}]
        made = json.loads(openai.rendering(call).whole({"data": data, "usage": USAGE}))
        assert made["embeddings"] == [[1.0], [2.0]]
        older = call_of("/api/embeddings", {"model": "tiny", "prompt": "a"})
        body = {"data": data[1:], "usage": USAGE}
        assert json.loads(openai.rendering(older).whole(body)) == {"embedding": [1.0]}


class TestTgi:
    def test_the_request(self) -> None:
        parameters = {"max_new_tokens": 20, "seed": 3, "stop": ["x"], "do_sample": True}
        made = sent("/generate", {"inputs": "My card", "parameters": parameters})
        assert made == {
            "model": "tiny",
            "prompt": "My card",
            "stream": False,
            "max_tokens": 20,
            "seed": 3,
            "stop": ["x"],
        }
        assert sent("/generate", {"inputs": "x"})["temperature"] == 0
        assert "temperature" not in sent("/generate", {"inputs": "x", "parameters": {"top_p": 0.9}})

    def test_refusals(self) -> None:
        with pytest.raises(NotSupported) as refused:
            call_of("/generate", {"inputs": "x", "parameters": {"watermark": True}})
        assert refused.value.param == "parameters.watermark"
        with pytest.raises(InvalidRequest) as bad:
            call_of("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 0}})
        assert bad.value.param == "parameters.max_new_tokens"

    def test_the_stream(self) -> None:
        body = {"inputs": "Say", "parameters": {"return_full_text": True}}
        call = call_of("/generate_stream", body)
        assert call.stream
        choices = [{"index": 0, "text": t, "logprobs": {"token_logprobs": [-0.5]}} for t in "ab"]
        end = {"index": 0, "text": "", "finish_reason": "length"}
        chunks = [{"choices": [c], "usage": USAGE} for c in [*choices, end]]
        made = events(streamed(call, chunks))
        assert [(one["index"], one["token"]["text"]) for one in made] == [(1, "a"), (2, "b")]
        assert [one["token"]["logprob"] for one in made] == [-0.5, -0.5]
        assert made[0]["generated_text"] is None
        assert made[1]["generated_text"] == "Sayab"
        assert made[1]["details"]["finish_reason"] == "length"
        assert made[1]["details"]["generated_tokens"] == 3

    def test_the_answer(self) -> None:
        call = call_of("/", {"inputs": "x", "parameters": {"details": True}})
        body = {"choices": [{"index": 0, "text": "y", "finish_reason": "stop"}], "usage": USAGE}
        (made,) = json.loads(openai.rendering(call).whole(body))
        assert made["generated_text"] == "y"
        assert made["details"]["finish_reason"] == "eos_token"


def completed(call: Call, *texts: str) -> Any:
    choices = [{"index": n, "text": text, "finish_reason": "stop"} for n, text in enumerate(texts)]
    return json.loads(openai.rendering(call).whole({"choices": choices[::-1], "usage": USAGE}))


class TestPrediction:
    def test_predict(self) -> None:
        path = "/v1/models/tiny:predict"
        body = {"instances": ["a", {"prompt": "b"}], "parameters": {"max_tokens": 4}}
        made = sent(path, body)
        assert (made["model"], made["prompt"], made["max_tokens"]) == ("tiny", ["a", "b"], 4)
        said = completed(call_of(path, body), "x", "y")["predictions"]
        assert [one["generated_text"] for one in said] == ["x", "y"]
        with pytest.raises(UpstreamFailed):
            completed(call_of(path, body), "x")
        talk = {"instances": [{"messages": [{"role": "user", "content": "Hi"}]}]}
        assert call_of(path, talk).path == "/v1/chat/completions"
        embed = call_of(path, {"instances": ["a"], "parameters": {"task": "embed"}})
        data = {"data": [{"index": 0, "embedding": [1.0]}], "usage": USAGE}
        assert json.loads(openai.rendering(embed).whole(data)) == {"predictions": [[1.0]]}

    @pytest.mark.parametrize(
        "body",
        [
            {"instances": []},
            {"instances": [1]},
            {"instances": ["a"], "parameters": {"made_up": 1}},
            {"instances": ["a"], "signature_name": "s"},
            {"instances": [{"messages": []}, "b"]},
            {},
        ],
    )
    def test_predict_refuses(self, body: Any) -> None:
        with pytest.raises(CloudlmError):
            call_of("/v1/models/tiny:predict", body)

    def test_infer(self) -> None:
        tensor = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}
        call = call_of("/v2/models/tiny/infer", {"id": "7", "inputs": [tensor]})
        made = completed(call, "x", "y")
        assert (made["id"], made["model_name"]) == ("7", "tiny")
        output = {"name": "text_output", "datatype": "BYTES", "shape": [2], "data": ["x", "y"]}
        assert made["outputs"][0] == output
        for bad in ({"shape": [3]}, {"datatype": "FP32"}, {"data": [1, 2]}):
            with pytest.raises(InvalidRequest):
                call_of("/v2/models/tiny/infer", {"inputs": [{**tensor, **bad}]})

    def test_torchserve(self) -> None:
        call = call_of("/predictions/tiny", "Grüße".encode(), content_type="text/plain")
        assert json.loads(call.body)["prompt"] == ["Grüße"]
        assert completed(call, "x") == {"text": "x", "finish_reason": "stop"}
        assert sent("/predictions/tiny", {"prompt": "a", "max_tokens": 3})["max_tokens"] == 3
        with pytest.raises(InvalidRequest):
            call_of("/predictions/tiny", b"\xff", content_type="text/plain")

    def test_invocations(self) -> None:
        assert sent("/invocations", {"prompt": "a"}) == {"model": "tiny", "prompt": "a"}
        assert call_of("/invocations", {"input": "a"}).path == "/v1/embeddings"
        assert completed(call_of("/invocations", {"inputs": "a"}), "x") == [{"generated_text": "x"}]
        with pytest.raises(InvalidRequest, match="messages, prompt, input or inputs"):
            call_of("/invocations", {"instances": []})


STREAMS = {
    "/v1/messages": {**TestAnthropic.BODY, "stream": True},
    "/v1/responses": {**TestResponses.BODY, "stream": True},
    "/api/chat": TestOllama.BODY,
    "/generate_stream": {"inputs": "x"},
}
WORDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=6)


@pytest.mark.promise(38)
@given(words=WORDS, cuts=st.lists(st.integers(0, 4000), max_size=12))
@pytest.mark.parametrize("path", STREAMS)
def test_text_survives_every_cut(path: str, words: list[str], cuts: list[int]) -> None:
    """However a replica's bytes are cut, the same text comes out, in well-formed events."""
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": w}, "text": w}], "usage": USAGE}
        for w in words
    ]
    wire = b"".join(event(json.dumps(chunk).encode()) for chunk in chunks)
    places = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    parser = SseParser()
    pieces = [wire[a:b] for a, b in itertools.pairwise(places)]
    read = [json.loads(data) for piece in pieces for data in parser.feed(piece)]
    raw = streamed(call_of(path, STREAMS[path]), read)
    made = lines(raw) if path == "/api/chat" else events(raw)
    texts = {
        "/v1/messages": lambda e: e.get("delta", {}).get("text", ""),
        "/v1/responses": lambda e: e["delta"] if e["type"].endswith("text.delta") else "",
        "/api/chat": lambda e: e["message"]["content"],
        "/generate_stream": lambda e: e["token"]["text"],
    }
    assert "".join(texts[path](one) for one in made) == "".join(words)


NONSENSE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["index", "delta", "message", "content", "tool_calls", "function", "text"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.mark.promise(38)
@given(choices=st.lists(NONSENSE, max_size=3))
@pytest.mark.parametrize("path", STREAMS)
def test_nonsense_of_a_replica_breaks_no_stream(path: str, choices: list[Any]) -> None:
    raw = streamed(call_of(path, STREAMS[path]), [{"choices": choices, "usage": "x"}])
    assert lines(raw) if path == "/api/chat" else events(raw)


def test_a_request_is_needed() -> None:
    request: Any = GatewayRequest("POST", "/v1/messages/batches", {}, b"", None)  # type: ignore[arg-type]
    route, _ = routes.find(request)
    with pytest.raises(NotSupported, match="Anthropic"):
        route.check(request)
