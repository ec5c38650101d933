"""Parameters made to hurt, at the gateway: refused before any replica sees them, whatever the
dialect; and what is passed on is what passed the checks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served_gateway import served, talk, wire

from cloudlm.core.requests import MAX_CHOICES, MAX_LOGIT_BIASES, MAX_TOKENS


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def tool(**parameters: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


CHAT: list[tuple[str, Any]] = [
    ("n", 10**9),
    ("n", MAX_CHOICES + 1),
    ("n", -1),
    ("logprobs", 5),
    ("top_logprobs", 10**6),
    ("max_tokens", MAX_TOKENS + 1),
    ("max_tokens", 2**63),
    ("max_completion_tokens", -(2**63)),
    ("stop", ["a"] * 10_000),
    ("stop", "a" * 1_000_000),
    ("stop_token_ids", list(range(100_000))),
    ("logit_bias", {str(n): 1 for n in range(MAX_LOGIT_BIASES + 1)}),
    ("logit_bias", {"1": 1e308}),
    ("temperature", -1e308),
    ("top_p", 10**400),
    ("seed", 2**70),
    ("cache_salt", 7),
    ("cache_salt", ["a"]),
    ("cache_salt", {"a": 1}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a"}}),
    ("response_format", {"type": "grammar"}),
    ("response_format", nested(60)),
    ("tools", tool(**nested(60))),
    ("tools", tool() * 5000),
    ("tools", [{"type": "function", "function": {"name": "f" * 100_000}}]),
    ("tools", [{"type": "function"}]),
    ("tools", "all"),
    ("user", "u" * 1_000_000),
    ("messages", [{"role": "user", "content": "x"}] * 10_000),
    ("messages", [{"role": "user", "content": [{"type": "text", "text": "x"}] * 40_000}]),
]
COMPLETION: list[tuple[str, Any]] = [
    ("best_of", 10**9),
    ("best_of", -1),
    ("logprobs", 10**9),
    ("n", 10**9),
    ("prompt", ["x"] * 100_000),
    ("prompt", [[]] * 100_000),
    ("prompt", [2**80]),
    ("prompt", [-1]),
    ("prompt", [1.5]),
    ("echo", "yes"),
    ("suffix", "x"),
]


@pytest.mark.promise(18)
@pytest.mark.known_failure("CVE-2025-48944", "CVE-2026-105756")
@pytest.mark.parametrize(
    ("path", "field", "value"),
    [("/v1/chat/completions", *row) for row in CHAT]
    + [("/v1/completions", *row) for row in COMPLETION],
    ids=lambda value: str(value)[:30],
)
async def test_refused_before_any_replica_sees_them(
    rig: Any, kit: Any, path: str, field: str, value: Any
) -> None:
    body = {"model": kit.MODEL, "prompt": "x"} if path == "/v1/completions" else kit.chat_body()
    result = await rig.ask({**body, field: value}, path=path)
    assert result.status in (400, 413, 501), result.body[:300]
    assert result.json["error"]["type"] in ("invalid_request_error", "not_supported_error")
    assert len(result.body) < 2_000  # what was sent is not sent back
    assert not rig.replicas[0].requests
    assert (await rig.ask(kit.chat_body())).status == 200


@pytest.mark.promise(18)
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
async def test_what_is_nested_without_end_is_refused(rig: Any, kit: Any, opening: bytes) -> None:
    closing = (b"]" if opening == b"[" else b"}") * 5_000
    raw = b'{"model":"tiny","messages":' + opening * 5_000 + b"1" + closing + b"}"
    assert (await rig.ask(raw=raw)).status == 400
    assert (await rig.ask(kit.chat_body())).status == 200
    assert len(rig.replicas[0].requests) == 1


@pytest.mark.promise(18)
async def test_ten_megabytes_are_413_and_are_not_read_to_their_end(kit: Any) -> None:
    async with served(kit) as rig:
        head = wire(rig, content_length=str(10 * 1024 * 1024))
        status, headers, body = await talk(rig, head)
        assert (status, headers["connection"]) == (413, "close")
        assert json.loads(body)["error"]["code"] == "payload_too_large"
        assert (await talk(rig, wire(rig, kit.chat_body())))[0] == 200
        assert len(rig.replicas[0].requests) == 1


# Any junk in any field of any dialect -------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "hello"}]
SHAPE = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["hello"]}
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": MESSAGES},
    "/v1/completions": {"model": "tiny", "prompt": "hi"},
    "/v1/embeddings": {"model": "tiny", "input": "hi"},
    "/v1/responses": {"model": "tiny", "input": "hi"},
    "/v1/messages": {"model": "tiny", "messages": MESSAGES, "max_tokens": 9},
    "/api/chat": {"model": "tiny", "messages": MESSAGES, "stream": False},
    "/generate": {"inputs": "hello"},
    "/invocations": {"model": "tiny", "prompt": "hello"},
    "/v1/models/tiny:predict": {"instances": ["hello"]},
    "/v2/models/tiny/infer": {"inputs": [SHAPE]},
}
FIELDS = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "input",
        "inputs",
        "instances",
        "n",
        "best_of",
        "logprobs",
        "top_logprobs",
        "max_tokens",
        "stop",
        "logit_bias",
        "response_format",
        "tools",
        "tool_choice",
        "stream",
        "stream_options",
        "seed",
        "cache_salt",
        "user",
        "priority",
        "parameters",
        "options",
        "system",
        "chat_template_kwargs",
        "guided_json",
        "guided_regex",
        "temperature",
        "structured_outputs",
        "reasoning_effort",
        "metadata",
        "store",
        "format",
        "keep_alive",
        "raw",
        "thinking",
    ]
)
JUNK = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=20),
        st.sampled_from(["(a+)+$", "\\p{" * 9, "{{ 7*7 }}", "../../etc/passwd", "\u0000", "clm_"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=8) | FIELDS | st.sampled_from(["type", "role"]), inner),
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def shared() -> Iterator[list[Any]]:
    """One loop and one rig for all examples."""
    kept: list[Any] = []
    yield kept
    if kept:
        loop, _, context = kept
        loop.run_until_complete(context.__aexit__(None, None, None))
        loop.close()


@pytest.mark.promise(18)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(sorted(BASES)),
    changes=st.dictionaries(FIELDS, JUNK, min_size=1, max_size=3),
)
def test_any_junk_gets_an_answer_that_is_not_the_gateways_fault(
    kit: Any, shared: list[Any], path: str, changes: dict[str, Any]
) -> None:
    if not shared:
        loop, context = asyncio.new_event_loop(), kit.open_rig()
        shared.extend([loop, loop.run_until_complete(context.__aenter__()), context])
    loop, rig, _ = shared
    headers = {**rig.headers, "anthropic-version": "2023-06-01"}

    async def ask() -> Any:
        return await rig.ask({**BASES[path], **changes}, path=path, headers=headers)

    result = loop.run_until_complete(ask())
    # 502: an answer that the dialect cannot say, out of a mock that always sends a chat's.
    assert result.status in (200, 400, 404, 405, 413, 422, 429, 501, 502), result.body[:300]
    if result.status == 502:
        assert rig.replicas[0].requests
    rig.assert_nothing_open()
