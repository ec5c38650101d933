"""/v1/embeddings: shapes, encodings, dimensions, limits, and the official client."""

from __future__ import annotations

import asyncio
import base64
import math
from array import array
from typing import Any

import httpx2
import openai
import pytest

from cloudlm.core.errors import Overloaded
from cloudlm.worker import embed


async def ask(bench: Any, **fields: Any) -> Any:
    return await bench.post("/v1/embeddings", {"model": "echo", "input": "hi", **fields})


async def test_one_text(bench: Any) -> None:
    body = (await ask(bench, cache_salt="s")).json()
    assert body["object"] == "list"
    assert body["model"] == "echo"
    assert body["data"] == [{"object": "embedding", "index": 0, "embedding": [0.5, 0.5, 0.5, 0.5]}]
    assert body["usage"] == {
        "prompt_tokens": 2,
        "total_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    (request,) = bench.engine.embedded
    assert (request.prompt_token_ids, request.cache_salt) == ((104, 105), "s")


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        (["a", "bc"], [(97,), (98, 99)]),
        ([1, 2, 3], [(1, 2, 3)]),
        ([[4], [5, 6]], [(4,), (5, 6)]),
    ],
)
async def test_every_kind_of_input(bench: Any, given: Any, prompts: Any) -> None:
    body = (await ask(bench, input=given)).json()
    assert [one.prompt_token_ids for one in bench.engine.embedded] == prompts
    assert [one["index"] for one in body["data"]] == list(range(len(prompts)))
    assert [one["embedding"][0] for one in body["data"]] == [
        -0.5 if len(prompt) % 2 else 0.5 for prompt in prompts
    ]
    assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))


async def test_dimensions_are_cut_to_length_one(bench: Any) -> None:
    for dimensions in (1, 2, 3, 4):
        body = (await ask(bench, dimensions=dimensions)).json()
        vector = body["data"][0]["embedding"]
        assert vector == pytest.approx([dimensions**-0.5] * dimensions)
        assert math.hypot(*vector) == pytest.approx(1.0)


async def test_base64_holds_the_same_numbers(bench: Any) -> None:
    body = (await ask(bench, input="hey", encoding_format="base64", dimensions=2)).json()
    raw = base64.b64decode(body["data"][0]["embedding"])
    assert array("f", raw).tolist() == pytest.approx([-(0.5**0.5)] * 2)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [""]}, "input"),
        ({"input": ["x", 3]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": {}}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": "x" * 300}, "input"),
        ({"dimensions": 5}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": "4"}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"encoding_format": 1}, "encoding_format"),
        ({"cache_salt": 1}, "cache_salt"),
    ],
)
async def test_bad_fields_are_named(bench: Any, fields: dict[str, Any], param: str) -> None:
    answer = await ask(bench, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert not bench.engine.embedded


async def test_other_refusals_keep_their_status(bench: Any) -> None:
    assert (await ask(bench, model="other")).status_code == 404
    bench.engine.refusal = Overloaded("full", retry_after_s=1.0)
    answer = await ask(bench)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


async def test_an_answer_that_is_too_large_is_refused(bench: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(embed, "MAX_NUMBERS_AS_TEXT", 7)
    assert (await ask(bench, input=["a", "b"])).json()["error"]["param"] == "input"
    assert (await ask(bench, input=["a", "b"], dimensions=3)).status_code == 200
    assert (await ask(bench, input=["a", "b"], encoding_format="base64")).status_code == 200


async def test_a_request_counts_once(bench: Any) -> None:
    await ask(bench, input=["a", "bc"])
    text = (await bench.client.get("/metrics")).text
    assert 'vllm:prompt_tokens_total{model_name="echo"} 3.0' in text
    assert 'finished_reason="stop",model_name="echo"} 1.0' in text


async def test_a_client_that_goes_away_ends_the_work(bench: Any) -> None:
    bench.engine.gate.clear()
    task = asyncio.create_task(ask(bench))
    while not bench.engine.embedded:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert bench.replica.end_running() == 0


async def test_the_openai_package(bench: Any) -> None:
    transport = httpx2.ASGITransport(bench.app)
    http = openai.DefaultAsyncHttpxClient(transport=transport)
    async with openai.AsyncOpenAI(
        base_url="http://worker/v1", api_key="x", http_client=http
    ) as client:
        for encoding in ("base64", "float"):
            found: Any = await client.embeddings.create(
                model="echo", input=["hi", "hey"], dimensions=2, encoding_format=encoding
            )
            if encoding == "float":
                assert found.data[0].embedding == pytest.approx([0.5**0.5] * 2)
        plain = await client.embeddings.create(model="echo", input=["hi", "hey"])
    assert [one.index for one in plain.data] == [0, 1]
    assert plain.data[1].embedding == [-0.5] * 4
    assert plain.usage.total_tokens == 5
