"""A stream cut after any chunk and taken up by another replica is the stream that was not cut."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from cloudlm.core.chat import FinishReason
from cloudlm.engine.api import GenerateRequest, TokenEvent, TokenLogprob
from cloudlm.engine.tokens import StopChecker
from cloudlm.gateway.progress import Progress
from cloudlm.gateway.sse import SseParser
from cloudlm.worker.dialect import Dialect
from cloudlm.worker.tools import ToolForm

END = 257
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CALL = '<tool_call>{"name": "pay", "arguments": {"sum": 5}}</tool_call>'
TOOL = {"type": "function", "function": {"name": "pay", "parameters": {"type": "object"}}}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "greedy": (CHAT, "Hello, world", {"temperature": 0}),
    "drawn": (CHAT, "Hello, world", {}),
    "usage": (CHAT, "Hello", {"stream_options": {"include_usage": True}}),
    "characters": (CHAT, "a€ \N{SNOWMAN}\N{GRINNING FACE} é", {}),
    "stop": (CHAT, "one two, thrice two, three four", {"stop": [", three", "four"]}),
    "limit": (CHAT, "a€ \N{SNOWMAN}", {"max_tokens": 3}),
    "logprobs": (CHAT, "a€ \N{SNOWMAN}, th", {"logprobs": True, "top_logprobs": 2}),
    "logprobs-stop": (CHAT, "x, y, zz", {"logprobs": True, "stop": [", z"]}),
    "several": (CHAT, "Hello", {"n": 3, "temperature": 0.5}),
    "tools": (CHAT, "I pay. " + CALL, {"tools": [TOOL]}),
    "reasoning": (CHAT, "<think>hm, so</think> yes", {}),
    "text": (TEXT, "Hello, wörld", {"prompt": "hi"}),
    "echo": (TEXT, "Hé", {"prompt": ["hi", "you"], "echo": True, "logprobs": 1, "n": 2}),
}


class Exact:
    """The twin's events as the real engine makes them: text goes through stop strings, and what
    was generated elsewhere goes through first."""

    def __init__(self, bench: Any) -> None:
        self._tokenizer = bench.serving.tokenizer
        self._answer = bench.engine.answer
        self.seeds: list[int | None] = []
        self.computed = 0
        bench.engine._events = self.events

    async def events(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        self.seeds.append(request.sampling.seed)
        tokens = [*self._answer.encode(), END]
        decoder, stops = self._tokenizer.detokenizer(()), StopChecker(request.sampling.stop)
        given = request.output_token_ids
        assert list(given) == tokens[: len(given)]
        stops.push(decoder.push(given))
        for count, token in enumerate(tokens[len(given) :], len(given) + 1):
            self.computed += 1
            wanted = request.sampling.logprobs
            top = tuple((token - n, -0.5 - n) for n in range(wanted or 0))
            logprobs = () if wanted is None else (TokenLogprob(token, -count / 8, top),)
            text, match = ("", None) if token == END else stops.push(decoder.push([token]))
            reason = FinishReason.STOP if token == END or match else None
            if reason is None and request.sampling.max_tokens == count:
                reason = FinishReason.LENGTH
            if reason is not None and match is None:
                text += stops.push(decoder.flush())[0] + stops.flush()
            prompt: tuple[TokenLogprob | None, ...] = ()
            if request.prompt_logprobs and count == 1:
                prompt = (None, *(TokenLogprob(i, -1.0) for i in request.prompt_token_ids[1:]))
            yield TokenEvent(
                (token,), text, logprobs, reason, match, 3 - min(len(given), 3), prompt
            )
            if reason is not None:
                return


def bench_of(make_bench: Any, answer: str, **more: Any) -> tuple[Any, Exact]:
    dialect = Dialect(tools=ToolForm.HERMES, reasons=answer.startswith("<think>"))
    bench = make_bench(dialect=dialect, **more)
    bench.engine.answer = answer
    return bench, Exact(bench)


def body_of(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    own = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {}
    options = {"include_usage": True, "continuous_usage_stats": True}
    return {"model": "echo", **own, **fields, "stream": True, "stream_options": options}


async def chunks_of(bench: Any, path: str, body: Any) -> list[Any]:
    headers = {"x-cloudlm-resumable": "1"}
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await bench.client.post(path, content=raw, headers=headers)
    assert answer.status_code == 200, answer.text
    events = [event.decode() for event in SseParser().feed(answer.content)]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def shown(chunks: list[Any], progress: Progress) -> list[Any]:
    """The chunks as a client gets them."""
    for chunk in chunks:
        if chunk != "[DONE]":
            progress.take(chunk)
    return chunks


@pytest.mark.promise(1)
@pytest.mark.parametrize("case", CASES)
async def test_every_cut(make_bench: Any, case: str) -> None:
    path, answer, fields = CASES[case]
    body = body_of(path, fields)
    first, engine = bench_of(make_bench, answer)
    other, second = bench_of(make_bench, answer)
    made = await chunks_of(first, path, body)
    whole = shown(json.loads(json.dumps(made)), Progress())
    assert not any("cloudlm_resume" in chunk for chunk in whole)
    cached = made[-2]["usage"]["prompt_tokens_details"]["cached_tokens"]
    for cut in range(1, len(made)):
        progress = Progress()
        had = shown(json.loads(json.dumps(made[:cut])), progress)
        assert progress.resumable
        second.seeds.clear()
        request = progress.request(path, json.dumps(body).encode(), cached)
        rest = await chunks_of(other, "/internal/v1/resume", request)
        joined = had + shown(rest, progress)
        assert progress.resumable
        if case == "several" or case == "echo":  # choices interleave as they like
            joined, expected = by_choice(joined), by_choice(whole)
        else:
            expected = whole
        assert without_call_ids(joined) == without_call_ids(expected), cut
        assert set(second.seeds) <= set(engine.seeds)


def by_choice(chunks: list[Any]) -> Any:
    found: dict[Any, list[Any]] = {}
    for chunk in chunks:
        if chunk == "[DONE]" or not chunk["choices"]:
            found.setdefault("end", []).append(chunk)
        else:
            found.setdefault(chunk["choices"][0]["index"], []).append(
                {name: value for name, value in chunk.items() if name != "usage"}
            )
    return found


def without_call_ids(chunks: Any) -> str:
    """Each call's id is drawn when it is sent, once."""
    text = json.dumps(chunks)
    for id_ in {part.split('"')[0] for part in text.split('"id": "call_')[1:]}:
        text = text.replace(f"call_{id_}", "call")
    return text


@pytest.mark.promise(1)
async def test_what_is_given_is_not_computed_again(make_bench: Any) -> None:
    first, _ = bench_of(make_bench, "Hello, world")
    other, second = bench_of(make_bench, "Hello, world")
    body = body_of(CHAT, {})
    made = await chunks_of(first, CHAT, body)
    progress = Progress()
    shown(made[:9], progress)
    await chunks_of(
        other, "/internal/v1/resume", progress.request(CHAT, json.dumps(body).encode(), 0)
    )
    assert second.computed == len("Hello, world") + 1 - 8


async def test_no_notes_without_the_gateways_word(make_bench: Any) -> None:
    bench, _ = bench_of(make_bench, "Hello")
    answer = await bench.client.post(CHAT, json=body_of(CHAT, {}))
    assert b"cloudlm_resume" not in answer.content


BEGUN = {"id": "c", "created": 1, "fingerprint": "?", "seed": 1, "choices": []}


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"path": "/v1/embeddings"}, 400, "path"),
        ({"request": 3}, 400, "objects"),
        (
            {"request": {"model": "echo", "messages": [{"role": "user", "content": "x"}]}},
            400,
            "stream",
        ),
        ({"begun": {**BEGUN, "seed": None}}, 400, "seed"),
        ({"begun": {**BEGUN, "seed": "7"}}, 400, "seed"),
        ({"begun": {**BEGUN, "choices": [1]}}, 400, "choices"),
        ({"begun": {**BEGUN, "choices": [{"index": 0}, {"index": 0}]}}, 400, "twice"),
        ({"begun": {**BEGUN, "choices": [{"index": -1}]}}, 400, "index"),
        ({"begun": {**BEGUN, "choices": [{"index": 5}]}}, 400, "more"),
        ({"begun": {**BEGUN, "choices": [{"index": 0, "token_ids": [999]}]}}, 400, "999"),
        ({"begun": {**BEGUN, "choices": [{"index": 0, "token_ids": ["a"]}]}}, 400, "token id"),
        ({"begun": {**BEGUN, "fingerprint": "fp_other"}}, 409, "same version"),
        ({"begun": {**BEGUN, "id": None}}, 400, "texts"),
    ],
    ids=str,
)
async def test_bad_bodies(make_bench: Any, change: Any, status: int, word: str) -> None:
    bench, _ = bench_of(make_bench, "Hello")
    body = {"path": CHAT, "request": body_of(CHAT, {}), "begun": dict(BEGUN), **change}
    if isinstance(body["begun"], dict) and body["begun"]["fingerprint"] == "?":
        body["begun"]["fingerprint"] = bench.serving.fingerprint
    answer = await bench.post("/internal/v1/resume", body)
    assert answer.status_code == status
    assert word in answer.json()["error"]["message"]


async def test_the_door_is_locked(make_bench: Any) -> None:
    bench, _ = bench_of(make_bench, "Hello", token="secret")
    answer = await bench.client.post(
        "/internal/v1/resume", json={}, headers={"authorization": "Bearer other"}
    )
    assert answer.status_code == 401


@pytest.mark.parametrize(
    ("change", "goes_on"),
    [
        ({}, True),
        ({"kernels": "avx2"}, True),  # unlike machines, where no equal bits were asked for
        ({"weights": "int8"}, False),
        ({"deterministic": True}, False),
    ],
)
async def test_who_goes_on_with_a_stream(make_bench: Any, change: Any, goes_on: bool) -> None:
    bench, _ = bench_of(make_bench, "Hello")
    alike = replace(bench.serving.info, kernels="amx", weights="int8 as stored, bfloat16")
    await check_who_goes_on(bench, alike, replace(alike, **change), goes_on)


@pytest.mark.parametrize(("change", "goes_on"), [({}, True), ({"kernels": "avx2"}, False)])
async def test_who_goes_on_to_the_bit(make_bench: Any, change: Any, goes_on: bool) -> None:
    """Deterministic answers are promised to the last bit, which other instructions cannot keep."""
    bench, _ = bench_of(make_bench, "Hello")
    alike = replace(bench.serving.info, kernels="amx", deterministic=True)
    await check_who_goes_on(bench, alike, replace(alike, **change), goes_on)


async def check_who_goes_on(bench: Any, began: Any, here: Any, goes_on: bool) -> None:
    """Whether a replica of facts ``here`` takes up what one of facts ``began`` has begun."""
    bench.engine.info = began
    begun = {**BEGUN, "fingerprint": bench.serving.fingerprint}
    bench.engine.info = here
    body = {"path": CHAT, "request": body_of(CHAT, {}), "begun": begun}
    answer = await bench.post("/internal/v1/resume", body)
    assert answer.status_code == (200 if goes_on else 409)
