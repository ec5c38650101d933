"""Whatever is sent, the answer is a clear error in OpenAI's shape, and the worker goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudlm.core.errors import InternalError, InvalidRequest, Overloaded
from cloudlm.worker.template import NoTemplate

MakeBench = Callable[..., Any]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
MESSAGES = [{"role": "user", "content": "hi"}]

BOTH = [
    ("max_tokens", -1),
    ("max_tokens", 0),
    ("max_tokens", 10**30),
    ("max_tokens", "many"),
    ("n", 0),
    ("n", -5),
    ("n", 10**6),
    ("temperature", -0.1),
    ("temperature", 1e9),
    ("top_p", 0),
    ("top_k", -2),
    ("stop", [""]),
    ("stop", ["x"] * 100),
    ("stop", [1]),
    ("stop", "x" * 10_000),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"258": 1}),
    ("logit_bias", {"1": 1e9}),
    ("logit_bias", {str(i): 1 for i in range(5000)}),
    ("seed", 2**80),
    ("stop_token_ids", [999]),
    ("stream", "yes"),
    ("cache_salt", "x" * 1000),
    ("cache_salt", 3),
    ("priority", "high"),
    ("priority", 0.5),
    ("model", 3),
    ("model", ""),
]
CHAT_ONLY = [
    ("logprobs", 5),
    ("top_logprobs", 3),
    ("messages", []),
    ("messages", "hi"),
    ("messages", [{"role": "root", "content": "x"}]),
    ("messages", [{"role": "user", "content": 3}]),
    ("messages", MESSAGES * 5000),
]
COMPLETION_ONLY = [
    ("logprobs", 10**6),
    ("logprobs", -1),
    ("prompt", None),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [258]),
    ("prompt", [-1]),
    ("prompt", [[1], ["a"]]),
    ("prompt", ["a"] * 1000),
]
CASES = [(path, *case) for path in (CHAT, COMPLETIONS) for case in BOTH]
CASES += [(CHAT, *case) for case in CHAT_ONLY] + [(COMPLETIONS, *case) for case in COMPLETION_ONLY]


def body_for(path: str) -> dict[str, Any]:
    given: dict[str, Any] = {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}
    if path == EMBEDDINGS:
        given = {"input": "hi"}
    return {"model": "echo", **given}


def check_error(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) < 1000
    return error


@pytest.mark.parametrize(("path", "field", "value"), CASES)
async def test_a_bad_field(bench: Any, path: str, field: str, value: Any) -> None:
    raw = json.dumps({**body_for(path), field: value}).encode()
    error = check_error(await bench.client.post(path, content=raw), 400)
    assert field.split(".")[0] in (error["param"] or error["message"])
    assert bench.engine.requests == []
    assert (await bench.chat()).status_code == 200


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/internal/v1/generate"])
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'"x"',
        b"\xff\xfe{}",
        b'{"model": "echo", "prompt": "\xff"}',
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"x":' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"model": "echo", "prompt": "a", "n": NaN}',
        b'{"model": "echo", "prompt": "\\ud800"}',
    ],
)
async def test_a_body_that_is_no_json_object(bench: Any, path: str, raw: bytes) -> None:
    check_error(await bench.client.post(path, content=raw), 400)


async def test_an_unknown_model_names_the_one_there_is(bench: Any) -> None:
    for path in (CHAT, COMPLETIONS):
        answer = await bench.post(path, {**body_for(path), "model": "gpt-9"})
        error = check_error(answer, 404)
        assert error["code"] == "model_not_found"
        assert "'echo'" in error["message"]


async def test_a_prompt_longer_than_the_context_names_both_numbers(bench: Any) -> None:
    answer = await bench.complete(prompt="x" * 256, max_tokens=1)
    error = check_error(answer, 400)
    assert error["code"] == "context_length_exceeded"
    assert "256 tokens" in error["message"]
    error = check_error(await bench.complete(prompt="x" * 300, max_tokens=1), 400)
    assert "300 tokens" in error["message"]
    assert "256" in error["message"]
    error = check_error(await bench.chat(messages=[{"role": "user", "content": "x" * 500}]), 400)
    assert error["param"] == "messages"
    huge = [{"role": "user", "content": "x" * 1_000_000}]
    assert "at least" in check_error(await bench.chat(messages=huge), 400)["message"]


async def test_prompt_and_answer_together_must_fit(bench: Any) -> None:
    error = check_error(await bench.complete(prompt="x" * 200, max_tokens=57), 400)
    assert error["param"] == "max_tokens"
    for number in ("200", "57", "257", "256", "56"):
        assert number in error["message"]
    assert (await bench.complete(prompt="x" * 200, max_tokens=56)).status_code == 200


async def test_a_body_too_large_is_refused_before_it_is_read(bench: Any) -> None:
    receive_calls = 0

    async def receive() -> dict[str, Any]:
        nonlocal receive_calls
        receive_calls += 1
        return {"type": "http.request", "body": b"x" * 100_000, "more_body": True}

    status, _ = await ask(bench.app, receive, [(b"content-length", b"10000000")])
    assert (status, receive_calls) == (413, 0)
    status, body = await ask(bench.app, receive, [])
    assert status == 413
    assert receive_calls == 41  # 4 MB and no more
    assert json.loads(body)["error"]["code"] == "payload_too_large"
    assert (await bench.chat()).status_code == 200


async def ask(app: Any, receive: Any, headers: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    """One raw ASGI call of the chat route: status and body."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": headers,
    }
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])


async def test_unsupported_features_say_so(bench: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    error = check_error(await bench.chat(tools=tools), 400)
    assert "tool_parser" in error["message"]
    check_error(await bench.chat(functions=[{"name": "f"}]), 501)
    image = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]
    check_error(await bench.chat(messages=[{"role": "user", "content": image}]), 501)


@pytest.mark.promise(36)
async def test_a_template_of_the_request_is_never_used(bench: Any) -> None:
    payload = "{{ cycler.__init__.__globals__.os.popen('id').read() }}"
    await bench.chat(chat_template=payload, chat_template_kwargs={"x": payload})
    plain = await bench.chat()
    assert plain.status_code == 200
    first, second = bench.engine.requests
    assert first.prompt_token_ids == second.prompt_token_ids


async def test_a_model_without_template(make_bench: MakeBench) -> None:
    bench = make_bench(renderer=NoTemplate())
    assert "/v1/completions" in check_error(await bench.chat(), 400)["message"]
    assert (await bench.complete()).status_code == 200


async def test_errors_of_the_engine_before_the_first_byte(bench: Any) -> None:
    for stream in (False, True):
        bench.engine.refusal = Overloaded("the queue is full", retry_after_s=2.0)
        answer = await bench.chat(stream=stream)
        assert check_error(answer, 503)["code"] == "overloaded"
        assert answer.headers["retry-after"] == "2"
        bench.engine.refusal = None
        bench.engine.failure = InternalError("the engine failed")
        check_error(await bench.chat(stream=stream), 500)
        bench.engine.failure = None
        bench.engine.answer = "fine"
        assert (await bench.chat(stream=stream)).status_code == 200


async def test_when_one_choice_is_refused_none_runs(bench: Any) -> None:
    bench.engine.refusal = Overloaded("the queue is full")
    bench.engine.refuse_from = 2
    check_error(await bench.chat(n=4), 503)
    assert bench.engine.cancelled == [bench.engine.requests[0].request_id]
    assert bench.engine.open == {} or set(bench.engine.cancelled) == {
        request.request_id for request in bench.engine.open.values()
    }


async def test_an_error_inside_a_stream(
    bench: Any, parse_events: Callable[[str], list[Any]]
) -> None:
    bench.engine.failure = InternalError("the engine failed")
    bench.engine.fail_after = 3
    for answer in (await bench.chat(stream=True), await bench.complete(stream=True)):
        assert answer.status_code == 200
        *chunks, error = parse_events(answer.text)
        assert "[DONE]" not in answer.text
        assert len(chunks) >= 3
        assert error == {
            "error": {
                "message": "the engine failed",
                "type": "server_error",
                "param": None,
                "code": "internal_error",
            }
        }
    check_error(await bench.chat(), 500)


async def test_an_unforeseen_error_tells_nothing(bench: Any, caplog: Any) -> None:
    secret = "prompt words that nobody may see"

    async def fail(*_: Any, **__: Any) -> str:
        raise ValueError(secret)

    bench.serving.renderer.render = fail
    error = check_error(await bench.chat(), 500)
    assert error["code"] == "internal_error"
    assert secret not in error["message"]
    assert secret not in caplog.text
    assert all(secret not in repr(record.__dict__) for record in caplog.records)


POSTS = [CHAT, COMPLETIONS, "/internal/v1/generate", "/tokenize"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    (
        *("model", "messages", "prompt", "max_tokens", "n", "stop", "logit_bias", "logprobs"),
        *("stream", "stream_options", "seed", "temperature", "echo", "top_logprobs"),
        *("sampling", "index", "input", "dimensions", "encoding_format"),
    )
)


@pytest.mark.promise(18)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(path=st.sampled_from([*POSTS, EMBEDDINGS]), data=st.data())
def test_fuzzed_fields_never_break_the_worker(fuzz_bench: Any, path: str, data: Any) -> None:
    body = {**body_for(path), **data.draw(st.dictionaries(FIELDS, JSON, max_size=4))}
    status, text = fuzz_bench(path, body)
    assert status in (200, 400, 404, 422, 501), text
    if status != 200:
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}


@pytest.fixture
def fuzz_bench(config: Any, serving_of: Any, echo_engine: Any) -> Any:
    """A synchronous door to one replica, for hypothesis."""
    from starlette.testclient import TestClient

    from cloudlm.core.clock import SystemClock
    from cloudlm.worker.app import build_app
    from cloudlm.worker.replica import Replica

    replica = Replica(config, SystemClock())
    replica.become_ready(serving_of(echo_engine()))
    with TestClient(build_app(replica)) as client:

        def ask(path: str, body: dict[str, Any]) -> tuple[int, str]:
            raw = json.dumps(body).encode("utf-8", "replace")
            answer = client.post(path, content=raw)
            return answer.status_code, answer.text

        yield ask
    replica.offload.close()


async def test_submit_errors_keep_their_status(bench: Any) -> None:
    bench.engine.refusal = InvalidRequest("no", param="prompt")
    check_error(await bench.complete(stream=True), 400)
