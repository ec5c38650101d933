"""The internal dialect over vLLM: a resumed answer is the one that was not cut."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from mock_vllm import answer_tokens, tokenise
from vllm_bench import VllmBench

GREEDY = {"temperature": 0, "max_tokens": 12}
PROMPT = [5, 6, 7]


async def ask(bench: VllmBench, **body: Any) -> httpx2.Response:
    return await bench.client.post("/internal/v1/generate", json=body)


def events(answer: httpx2.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", answer.text
    return [json.loads(line) for line in lines[:-1]]


def tokens_of(steps: list[dict[str, Any]]) -> list[int]:
    return [token for step in steps for token in step["token_ids"]]


async def test_every_cut_resumes_to_the_same_answer(bench: VllmBench) -> None:
    head, *steps = events(await ask(bench, prompt_token_ids=PROMPT, sampling=GREEDY))
    whole = tokens_of(steps)
    assert head["prompt_token_ids"] == PROMPT
    assert whole == answer_tokens(PROMPT, 12)
    assert steps[-1]["finish_reason"] in ("stop", "length")
    assert steps[-1]["usage"]["completion_tokens"] == len(whole)
    for cut in range(1, len(whole)):
        resumed = await ask(
            bench, prompt_token_ids=PROMPT, output_token_ids=whole[:cut], sampling=GREEDY
        )
        assert tokens_of(events(resumed)[1:]) == whole[cut:]


async def test_an_answer_that_was_complete_only_ends(bench: VllmBench) -> None:
    answer = await ask(
        bench,
        prompt_token_ids=PROMPT,
        output_token_ids=[1, 2],
        sampling={"temperature": 0, "max_tokens": 2},
    )
    _, end = events(answer)
    assert (end["token_ids"], end["finish_reason"]) == ([], "length")


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        ({"temperature": 0.7, "seed": 3}, "temperature"),
        ({"temperature": 0, "presence_penalty": 0.5}, "presence_penalty"),
        ({"temperature": 0, "frequency_penalty": 0.5}, "frequency_penalty"),
        ({"temperature": 0, "stop": ["x"]}, "stop strings"),
        ({"temperature": 0, "structured_outputs": {"regex": "a+"}}, "a constraint"),
    ],
)
async def test_what_cannot_be_resumed_exactly_is_refused(
    bench: VllmBench, sampling: dict[str, Any], named: str
) -> None:
    answer = await ask(
        bench, prompt_token_ids=PROMPT, output_token_ids=[4], sampling={**sampling, "max_tokens": 9}
    )
    assert answer.status_code == 501
    assert named in answer.json()["error"]["message"]
    begun = await ask(bench, prompt_token_ids=PROMPT, sampling={**sampling, "max_tokens": 9})
    assert begun.status_code == 200  # only resuming is refused


async def test_messages_and_texts_are_tokenised_by_vllm(bench: VllmBench) -> None:
    messages = [{"role": "user", "content": "where is it"}]
    head, *_ = events(await ask(bench, messages=messages, sampling=GREEDY))
    assert head["prompt_token_ids"] == tokenise("where is it")
    head, *_ = events(await ask(bench, prompt="a bb", sampling=GREEDY))
    assert head["prompt_token_ids"] == [2, 3]


async def test_what_is_asked_reaches_vllm(bench: VllmBench) -> None:
    sampling = {"max_tokens": 5, "seed": 9, "top_p": 0.5, "logprobs": 1, "logit_bias": {"3": 2}}
    steps = events(
        await ask(
            bench, prompt_token_ids=PROMPT, sampling=sampling, index=2, priority=4, cache_salt="s"
        )
    )[1:]
    (body,) = bench.mock.bodies
    assert body["seed"] == 11  # choices are drawn apart
    assert (body["top_p"], body["priority"], body["cache_salt"]) == (0.5, 4, "s")
    assert body["logit_bias"] == {"3": 2.0}
    first = steps[0]
    assert first["logprobs"] == [
        {"token_id": first["token_ids"][0], "logprob": -0.5, "top": [[first["token_ids"][0], -0.5]]}
    ]


async def test_too_long_a_prompt_is_refused_before_vllm_is_asked(bench: VllmBench) -> None:
    answer = await ask(bench, prompt_token_ids=[1] * 600, sampling=GREEDY)
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert bench.mock.bodies == []
