"""A stream that another vLLM goes on with is the one that was not cut."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mock_vllm_text import HEAD, Speech, answer_tokens, tokenise
from vllm_bench import VllmBench

from cloudlm.core.errors import UpstreamFailed
from cloudlm.core.resuming import NOTE, RESUMABLE_HEADER, RESUME_PATH
from cloudlm.gateway.forms import learn
from cloudlm.gateway.progress import Progress
from cloudlm.worker.vllm.exact import exact_stream
from cloudlm.worker.vllm.noted import NotedStream

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USAGE = {"include_usage": True, "continuous_usage_stats": True}
PLAIN = {"model": "mock", "stream": True, "temperature": 0, "stream_options": USAGE}
SAID = {"messages": [{"role": "user", "content": "where is my card"}]}
ASKED = {
    "chat": (CHAT, {**SAID, "max_tokens": 40}),
    "text": (TEXT, {"prompt": "where is my card", "max_tokens": 40, "ignore_eos": True}),
    "tokens": (TEXT, {"prompt": [5, 6, 7], "max_tokens": 30, "ignore_eos": True, "n": None}),
    "unlimited": (CHAT, {**SAID, "seed": 3, "top_p": 0.5}),
    "the usual limit": (TEXT, {"prompt": "a b", "ignore_eos": True}),
    "no usage": (CHAT, {**SAID, "max_tokens": 40, "stream_options": None}),
}


async def noted(bench: VllmBench, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await bench.client.post(path, json={**PLAIN, **body}, headers={RESUMABLE_HEADER: "1"})
    assert answer.status_code == 200, answer.text
    return chunks_of(answer)


def chunks_of(answer: httpx2.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", answer.text
    return [json.loads(line) for line in lines[:-1]]


def copied(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    copies: list[dict[str, Any]] = json.loads(json.dumps(chunks))
    return copies


def shown(chunks: list[dict[str, Any]], cached: int | None = None) -> list[str]:
    """What the client gets of them, in bytes. ``cached`` is what it is told at last, if the gateway
    had to say so before the first replica could."""
    found = copied(chunks)
    for chunk in found:
        chunk.pop(NOTE, None)
        details = (chunk.get("usage") or {}).get("prompt_tokens_details")
        if cached is not None and details is not None:
            details["cached_tokens"] = cached
    return [json.dumps(chunk) for chunk in found]


def text_of(chunks: list[dict[str, Any]]) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(c.get("text", c.get("delta", {}).get("content")) or "" for c in choices)


async def go_on(
    bench: VllmBench, path: str, body: dict[str, Any], had: list[dict[str, Any]], cached: int = 0
) -> list[dict[str, Any]]:
    """As a gateway does that has passed these chunks on."""
    progress = Progress()
    for chunk in copied(had):
        progress.take(chunk)
    assert progress.resumable
    request = progress.request(path, json.dumps({**PLAIN, **body}).encode(), cached)
    answer = await bench.client.post(RESUME_PATH, content=request)
    assert answer.status_code == 200, answer.text
    return chunks_of(answer)


@pytest.mark.parametrize("per_chunk", [1, 3])
@pytest.mark.parametrize("asked", ASKED)
async def test_every_cut_goes_on_to_the_same_stream(
    bench: VllmBench, asked: str, per_chunk: int
) -> None:
    path, body = ASKED[asked]
    bench.mock.per_chunk = per_chunk
    whole = await noted(bench, path, body)
    assert len(whole) > 5
    for cut in range(1, len(whole) + 1):
        bench.mock.per_chunk = per_chunk
        rest = await go_on(bench, path, body, whole[:cut])
        together = whole[:cut] + rest
        if per_chunk == 1:
            assert shown(together, 0) == shown(whole, 0)
        else:  # vLLM puts tokens together as it comes; what they say is the same
            assert text_of(together) == text_of(whole)
            assert together[-1].get("usage", {}).get("total_tokens") == whole[-1].get(
                "usage", {}
            ).get("total_tokens")


@pytest.mark.parametrize("stop", ["7 t", ["zzzz", "\N{EURO SIGN}t"], "t4 ", ["4", "9 "]])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_stop_strings_may_span_the_seam(bench: VllmBench, path: str, stop: Any) -> None:
    body = {"stop": stop, "max_tokens": 60, "ignore_eos": True}
    body |= SAID if path == CHAT else {"prompt": "where is my card"}
    as_now = chunks_of(await bench.client.post(path, json={**PLAIN, **body}))
    whole = await noted(bench, path, body)
    assert text_of(whole) == text_of(as_now)
    assert whole[-1]["usage"] == as_now[-1]["usage"]
    assert whole[-2]["choices"][0]["stop_reason"] == as_now[-2]["choices"][0]["stop_reason"]
    for cut in range(1, len(whole)):
        rest = await go_on(bench, path, body, whole[:cut])
        assert shown(whole[:cut] + rest, 0) == shown(whole, 0)


async def test_a_stream_may_be_cut_again_and_again(bench: VllmBench) -> None:
    path, body = ASKED["text"]
    for per_chunk in (1, 3):
        bench.mock.per_chunk = per_chunk
        whole = await noted(bench, path, body)
        had = whole[:1]
        while len(rest := await go_on(bench, path, body, had)) > 1:
            had += rest[:1]
        assert text_of(had + rest) == text_of(whole)
        tokens = [token for chunk in had for token in chunk.get(NOTE, {}).get("token_ids", ())]
        assert HEAD in tokens
        prompt = tokenise("where is my card")
        assert tokens == answer_tokens(prompt, 40, ignore_eos=True)[: len(tokens)]


async def test_a_client_gets_what_it_got_before(bench: VllmBench) -> None:
    for path, body in ASKED.values():
        as_now = chunks_of(await bench.client.post(path, json={**PLAIN, **body}))
        whole = await noted(bench, path, body)
        assert text_of(whole) == text_of(as_now)
        for chunk in (*whole, *as_now):
            chunk.pop(NOTE, None)
            chunk.pop("system_fingerprint", None)
            (chunk.get("usage") or {}).pop("completion_tokens_details", None)
        silent = [one for one in as_now if one["choices"] and not text_of([one])]
        said = [one for one in as_now if one not in silent or "role" in str(one)]
        assert [one for one in whole if text_of([one]) or not one["choices"]] == [
            one for one in said if text_of([one]) or not one["choices"]
        ]
        assert "token_ids': [" not in str(whole)


async def test_the_cached_tokens_are_those_that_were_told(bench: VllmBench) -> None:
    path, body = ASKED["chat"]
    whole = await noted(bench, path, body)
    assert whole[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    for cut in (3, len(whole) - 1):
        rest = await go_on(bench, path, body, whole[:cut], cached=1)
        assert rest[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
        assert rest[-1]["usage"]["total_tokens"] == whole[-1]["usage"]["total_tokens"]


@pytest.mark.parametrize(
    "hindrance",
    [
        {"temperature": 0.5, "seed": 1},
        {"temperature": None},
        {"n": 2},
        {"logprobs": True},
        {"presence_penalty": 0.1},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a"}},
        {"bad_words": ["a"]},
        {"stop": ["a"], "stop_token_ids": [3]},
        {"stop": ["a"], "include_stop_str_in_output": True},
        {"chat_template": "x"},
        {"what_nobody_knows": 1},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    ],
)
async def test_what_is_not_exact_is_passed_on_unread(
    bench: VllmBench, hindrance: dict[str, Any]
) -> None:
    path, body = CHAT, {**PLAIN, **SAID, **hindrance}
    if "image_url" in str(body):
        assert exact_stream(path, body, parses=False) is None
        return
    chunks = chunks_of(await bench.client.post(path, json=body, headers={RESUMABLE_HEADER: "1"}))
    assert NOTE not in str(chunks)
    assert bench.mock.bodies == [body]
    begun = {"id": "a", "created": 1, "fingerprint": "b", "choices": [{"index": 0}]}
    asked = {"path": path, "request": body, "begun": begun}
    refused = await bench.client.post(RESUME_PATH, json=asked)
    assert refused.status_code == 501
    assert "exactly" in refused.json()["error"]["message"]


@pytest.mark.parametrize("options", [{"reasoning_parser": "x"}, {"tool_call_parser": "x"}])
async def test_what_vllm_parses_is_not_noted(bench: VllmBench) -> None:
    assert NOTE not in str(await noted(bench, *ASKED["chat"]))
    assert NOTE in str(await noted(bench, *ASKED["text"]))


async def test_a_gateway_passes_noted_chunks_on_unread(bench: VllmBench) -> None:
    for asked in ("chat", "text", "tokens"):
        chunk = (await noted(bench, *ASKED[asked]))[2]
        form = learn(msgspec.json.encode(chunk), msgspec.json.encode)
        assert form is not None and form.says_usage


async def test_a_vllm_without_token_ids_is_passed_on_as_it_is(bench: VllmBench) -> None:
    bench.mock.knows_token_ids = False
    for path, body in ASKED.values():
        as_now = await bench.client.post(path, json={**PLAIN, **body})
        assert await noted(bench, path, body) == chunks_of(as_now)
    body = {**SAID, "stop": "7 t", "max_tokens": 60, "ignore_eos": True}
    as_now = await bench.client.post(CHAT, json={**PLAIN, **body})
    chunks = await noted(bench, CHAT, body)
    assert text_of(chunks) == text_of(chunks_of(as_now))
    assert NOTE not in str(chunks)


async def test_another_version_or_another_prompt_is_a_conflict(bench: VllmBench) -> None:
    path, body = ASKED["chat"]
    whole = await noted(bench, path, body)
    first = {**whole[0], "system_fingerprint": "fp_other"}
    other = {**body, "messages": [{"role": "user", "content": "and my other card"}]}
    for had, asked, named in ((first, body, "version"), (whole[0], other, "prompt")):
        progress = Progress()
        progress.take(copied([had])[0])
        request = progress.request(path, json.dumps({**PLAIN, **asked}).encode(), 0)
        answer = await bench.client.post(RESUME_PATH, content=request)
        assert answer.status_code == 409, answer.text
        assert named in answer.json()["error"]["message"]


async def test_a_vllm_that_breaks_off_ends_with_an_error_after_notes(bench: VllmBench) -> None:
    path, body = ASKED["chat"]
    whole = await noted(bench, path, body)
    bench.mock.dies_after = 4
    answer = await bench.client.post(path, json={**PLAIN, **body}, headers={RESUMABLE_HEADER: "1"})
    *had, end = [json.loads(one[6:]) for one in answer.text.splitlines() if one]
    assert "broke off" in end["error"]["message"]
    bench.mock.dies_after = 0
    rest = await go_on(bench, path, body, had)
    assert shown(had + rest, 0) == shown(whole, 0)


async def test_half_a_request_is_refused_clearly(bench: VllmBench) -> None:
    request = {**PLAIN, **SAID}
    for asked in (
        {},
        {"path": CHAT, "request": request},
        {"path": CHAT, "request": request, "begun": {"id": "a", "fingerprint": 1, "choices": []}},
    ):
        answer = await bench.client.post(RESUME_PATH, json=asked)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith("begun")


TEXTS = st.text("ab\N{EURO SIGN} ", min_size=1, max_size=3)


@given(
    prompt=st.lists(st.integers(1, 900), min_size=1, max_size=4),
    stop=st.lists(TEXTS | st.sampled_from(["t", " t1", "3 ", "99"]), max_size=2),
    per_chunk=st.integers(1, 4),
    limit=st.integers(1, 30),
)
def test_what_is_noted_is_what_is_shown(
    prompt: list[int], stop: list[str], per_chunk: int, limit: int
) -> None:
    """Whatever the chunks: the text is vLLM's own, and each token is noted once."""
    tokens = answer_tokens(prompt, limit)
    texts, notes = [], []
    for trick in (False, True):
        body = {"model": "m", "prompt": prompt, "stop": stop, "return_token_ids": trick}
        speech = Speech({**body, "include_stop_str_in_output": trick}, prompt, True, 0)
        stream, chunks = NotedStream("fp", stop), []
        for at in range(0, len(tokens), per_chunk):
            last = at + per_chunk >= len(tokens)
            chunk = speech.chunk(tokens[at : at + per_chunk], last=last)
            chunks += stream.take(chunk) if trick else [chunk]
            if speech.ended:
                break
        texts.append(text_of(chunks))
        notes = [token for chunk in chunks for token in chunk.get(NOTE, {}).get("token_ids", ())]
    assert texts[0] == texts[1]
    assert notes == tokens[: len(notes)]
    assert len(notes) == speech.usage()["usage"]["completion_tokens"]


def test_tokens_that_come_otherwise_are_no_rest() -> None:
    stream = NotedStream("fp", (), goes_on=True, known=(HEAD,))
    speech = Speech({"model": "m", "return_token_ids": True}, [1], True, 0)
    with pytest.raises(UpstreamFailed, match="as the answer began"):
        stream.take(speech.chunk([5], last=False))
