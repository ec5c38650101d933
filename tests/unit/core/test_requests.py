"""Reading requests: every hard cap, and that nothing but InvalidRequest ever comes out."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.errors import CloudlmError, InvalidRequest, NotSupported
from cloudlm.core.requests import decode_body, parse_chat, parse_completion

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
COMPLETION = {"model": "m", "prompt": "hello"}


def test_a_plain_chat() -> None:
    request = parse_chat({**CHAT, "max_tokens": 5, "stop": "x", "temperature": 0, "seed": 1})
    assert request.messages[0].content == "hello"
    assert request.sampling.max_tokens == 5
    assert request.sampling.stop == ("x",)
    assert request.sampling.temperature == 0
    assert request.n == 1


def test_null_is_absent() -> None:
    nothing = dict.fromkeys(("temperature", "stop", "n", "logprobs", "logit_bias", "seed"))
    assert parse_chat({**CHAT, **nothing}) == parse_chat(CHAT)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse_chat({"model": "m", "messages": [{"role": "user", "content": parts}]})
    assert request.messages[0].content == "ab"


def test_max_completion_tokens_wins() -> None:
    request = parse_chat({**CHAT, "max_tokens": 5, "max_completion_tokens": 7})
    assert request.sampling.max_tokens == 7


def test_top_k_minus_one_means_all() -> None:
    assert parse_chat({**CHAT, "top_k": -1}).sampling.top_k == 0


BAD_FIELDS: list[tuple[str, Any]] = [
    ("max_tokens", -1),
    ("max_tokens", 0),
    ("max_tokens", 10**30),
    ("max_tokens", True),
    ("max_tokens", "5"),
    ("n", 0),
    ("n", 10**9),
    ("n", 1.5),
    ("temperature", -0.1),
    ("temperature", 1e400),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("min_p", 2),
    ("presence_penalty", 3),
    ("repetition_penalty", 0),
    ("seed", 2**64),
    ("seed", 1.5),
    ("stop", [""]),
    ("stop", ["x"] * 100),
    ("stop", ["x" * 10_000]),
    ("stop", [1]),
    ("stop", {"a": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"99999999999": 1}),
    ("logit_bias", {"1": 1000}),
    ("logit_bias", {str(i): 0 for i in range(5000)}),
    ("logit_bias", [1]),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("user", "u" * 10_000),
    ("user", 7),
    ("model", ""),
    ("model", None),
    ("model", ["m"]),
]


@pytest.mark.promise(18)
@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_a_bad_field_is_named(name: str, value: Any) -> None:
    for parse, body in ((parse_chat, CHAT), (parse_completion, COMPLETION)):
        with pytest.raises(InvalidRequest) as caught:
            parse({**body, name: value})
        assert caught.value.param == name
        assert name in caught.value.message
        assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hello",
        [1],
        [{"role": "robot", "content": "x"}],
        [{"content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": "x", "name": 1}],
        [{"role": "user", "content": "x"}] * 5000,
    ],
)
def test_bad_messages(messages: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat({"model": "m", "messages": messages})
    assert (caught.value.param or "").startswith("messages")


@pytest.mark.parametrize("prompt", [None, [], [[-1]], [1, "a"], {"a": 1}, 5, ["a"] * 100, [2**40]])
def test_bad_prompts(prompt: Any) -> None:
    with pytest.raises(InvalidRequest):
        parse_completion({"model": "m", "prompt": prompt})


def test_logprobs_in_both_forms() -> None:
    assert parse_chat({**CHAT, "logprobs": True}).sampling.logprobs == 0
    assert parse_chat({**CHAT, "logprobs": True, "top_logprobs": 3}).sampling.logprobs == 3
    assert parse_completion({**COMPLETION, "logprobs": 2}).sampling.logprobs == 2
    for bad in ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 999}, {"logprobs": 5}):
        with pytest.raises(InvalidRequest):
            parse_chat({**CHAT, **bad})


def test_what_is_not_built_yet_is_refused_plainly() -> None:
    with pytest.raises(NotSupported, match="use tools"):
        parse_chat({**CHAT, "functions": [{"name": "f"}]})
    with pytest.raises(NotSupported, match="image_url"):
        content = [{"type": "image_url", "image_url": {"url": "http://x"}}]
        parse_chat({"model": "m", "messages": [{"role": "user", "content": content}]})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"a": "\xff"}',
        b'{"a": NaN}',
        b'{"a":' * 100_000,
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"a": 1} trailing',
    ],
)
def test_a_bad_body_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode_body(raw)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = [
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "seed",
    "stream",
    "stream_options",
    "user",
    "echo",
    "best_of",
    "suffix",
    "tools",
    "response_format",
    "stop_token_ids",
    "ignore_eos",
    "presence_penalty",
    "max_completion_tokens",
]
field_names = st.sampled_from(FIELDS)


@pytest.mark.promise(18)
@given(st.dictionaries(field_names, json_values, max_size=6))
def test_any_json_is_read_or_refused(fields: dict[str, Any]) -> None:
    for parse, body in ((parse_chat, CHAT), (parse_completion, COMPLETION)):
        try:
            parse({**body, **fields})
        except CloudlmError as error:
            json.dumps(error.body())


@pytest.mark.promise(18)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        decode_body(raw)
