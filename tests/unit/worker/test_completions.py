"""/v1/completions and the internal dialect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Parse = Callable[[str], list[Any]]


async def test_a_whole_answer(bench: Any) -> None:
    body = (await bench.complete(max_tokens=5)).json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "length"}
    ]
    assert body["usage"]["prompt_tokens"] == 2
    assert bench.engine.requests[0].prompt_token_ids == (104, 105)


async def test_the_default_limit_is_sixteen_tokens(bench: Any) -> None:
    await bench.complete()
    assert bench.engine.requests[0].sampling.max_tokens == 16


async def test_prompts_times_n(bench: Any) -> None:
    body = (await bench.complete(prompt=["a", "bc"], n=2, max_tokens=2)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    requests = bench.engine.requests
    assert [request.prompt_token_ids for request in requests] == [(97,)] * 2 + [(98, 99)] * 2
    assert [request.index for request in requests] == [0, 1, 0, 1]
    assert requests[0].sampling.seed != requests[2].sampling.seed
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 8
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 6


async def test_token_ids_as_prompt(bench: Any) -> None:
    await bench.complete(prompt=[1, 2, 3])
    await bench.complete(prompt=[[4], [5, 6]])
    prompts = [request.prompt_token_ids for request in bench.engine.requests]
    assert prompts == [(1, 2, 3), (4,), (5, 6)]


async def test_echo_with_logprobs(bench: Any) -> None:
    body = (await bench.complete(echo=True, logprobs=1, max_tokens=2)).json()
    choice = body["choices"][0]
    assert choice["text"] == "hiHe"
    assert choice["logprobs"] == {
        "tokens": ["h", "i", "H", "e"],
        "token_logprobs": [None, -1.0, -0.5, -0.5],
        "top_logprobs": [None, {"i": -1.0}, {"H": -0.5}, {"e": -0.5}],
        "text_offset": [0, 1, 2, 3],
    }
    assert bench.engine.requests[0].prompt_logprobs


async def test_echo_of_token_ids(bench: Any) -> None:
    body = (await bench.complete(prompt=[104, 105], echo=True, max_tokens=1)).json()
    assert body["choices"][0]["text"] == "hiH"
    assert not bench.engine.requests[0].prompt_logprobs


async def test_a_stream(bench: Any, parse_events: Parse) -> None:
    bench.engine.answer = "Hé"
    options = {"include_usage": True}
    answer = await bench.complete(stream=True, echo=True, logprobs=0, stream_options=options)
    *chunks, last, done = parse_events(answer.text)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == "hiHé"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    offsets = [o for choice in choices for o in choice["logprobs"]["text_offset"]]
    assert offsets == sorted(offsets)
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_too_many_choices(bench: Any) -> None:
    answer = await bench.complete(prompt=["a"] * 64, n=16)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "n"
    assert bench.engine.requests == []


# The internal dialect ---------------------------------------------------------------------------


async def internal(bench: Any, **body: Any) -> Any:
    return await bench.post("/internal/v1/generate", body)


async def test_ids_in_and_out(bench: Any, parse_events: Parse) -> None:
    answer = await internal(
        bench,
        prompt_token_ids=[1, 2],
        sampling={"max_tokens": 2, "logprobs": 1, "seed": 5},
        index=3,
        cache_salt="s",
    )
    head, first, second, done = parse_events(answer.text)
    assert head == {"prompt_token_ids": [1, 2], "seed": 5}
    assert first == {
        "token_ids": [72],
        "text": "H",
        "finish_reason": None,
        "logprobs": [{"token_id": 72, "logprob": -0.5, "top": [[72, -0.5]]}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 1,
            "total_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }
    assert (second["text"], second["finish_reason"], done) == ("e", "length", "[DONE]")
    (request,) = bench.engine.requests
    assert (request.index, request.cache_salt) == (3, "s")


async def test_a_resumed_answer_is_the_rest_of_the_whole(bench: Any, parse_events: Parse) -> None:
    prompt = {"prompt": "hi", "sampling": {"seed": 1, "max_tokens": 8}}
    whole = parse_events((await internal(bench, **prompt)).text)
    for cut in range(len(whole) - 2):
        sent = [i for event in whole[1 : 1 + cut] for i in event["token_ids"]]
        rest = parse_events((await internal(bench, **prompt, output_token_ids=sent)).text)
        assert [e["text"] for e in rest[1:-1]] == [e["text"] for e in whole[1 + cut : -1]]
        assert bench.engine.requests[-1].sampling.max_tokens == 8


async def test_messages_are_rendered_and_said_back(bench: Any, parse_events: Parse) -> None:
    answer = await internal(bench, messages=[{"role": "user", "content": "hi"}])
    head = parse_events(answer.text)[0]
    assert len(head["prompt_token_ids"]) == 20
    assert isinstance(head["seed"], int)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt_token_ids": [300]}, "prompt"),
        ({"prompt_token_ids": "x"}, "prompt_token_ids"),
        ({"prompt": "a", "output_token_ids": [300], "sampling": {"seed": 1}}, "output_token_ids"),
        ({"prompt": "a", "output_token_ids": [3]}, "sampling.seed"),
        (
            {"prompt": "a", "output_token_ids": [3, 4], "sampling": {"seed": 1, "max_tokens": 1}},
            "output_token_ids",
        ),
        ({"prompt": "a", "sampling": 3}, "sampling"),
        ({"prompt": "a", "sampling": {"temperature": 9}}, "temperature"),
        ({"prompt": "a", "index": -1}, "index"),
        ({"prompt": "a", "cache_salt": 3}, "cache_salt"),
        ({"prompt": "a", "request_id": "x"}, "request_id"),
        ({"prompt": "a", "chat_template": "x"}, "chat_template"),
    ],
)
async def test_bad_internal_requests(bench: Any, body: dict[str, Any], param: str) -> None:
    answer = await internal(bench, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert bench.engine.requests == []
