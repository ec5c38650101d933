"""Small parts: interrupting a wait, reading Retry-After, the dialect's shapes, header hygiene."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import msgspec
import pytest

from cloudlm.core.chat import Usage
from cloudlm.core.errors import InvalidRequest, RequestCancelled, Unavailable
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.exchange import header_safe, request_id, unique
from cloudlm.gateway.interrupt import Interrupt
from cloudlm.gateway.upstream import retry_after


async def _wait(interrupt: Interrupt, seconds: float = 30.0) -> str:
    try:
        with interrupt:
            async with asyncio.timeout(seconds):
                await asyncio.sleep(60)
    except Unavailable as error:
        await asyncio.sleep(0)  # the task itself is not cancelled
        return error.message
    return "not cut"


async def test_cut_breaks_off_a_wait_with_its_reason() -> None:
    interrupt = Interrupt()
    task = asyncio.create_task(_wait(interrupt))
    await asyncio.sleep(0)
    interrupt.cut(Unavailable("first"))
    interrupt.cut(Unavailable("second"))
    assert await task == "first"
    assert task.cancelling() == 0
    with pytest.raises(Unavailable, match="first"):  # and no later wait begins
        interrupt.__enter__()


async def test_cut_between_waits_and_after_the_end() -> None:
    interrupt = Interrupt()
    with interrupt:
        await asyncio.sleep(0)
    interrupt.cut(RequestCancelled("gone"))
    await asyncio.sleep(0)
    with pytest.raises(RequestCancelled), interrupt:
        raise AssertionError("must not be reached")


async def test_cancelling_the_task_stays_a_cancellation() -> None:
    task = asyncio.create_task(_wait(Interrupt()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_timeout_inside_stays_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        await _wait(Interrupt(), 0.01)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("5", 5.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("nan", None),
        ("inf", 3600.0),
        ("99999999", 3600.0),
        ("soon", None),
        ("Tue, 14 Nov 2023 22:13:30 GMT", 10.0),
        ("Tue, 14 Nov 2023 22:13:00 GMT", 0.0),
        ("Tue, 99 Nov 2023 22:13:00 GMT", None),
    ],
)
def test_retry_after(text: str | None, seconds: float | None) -> None:
    assert retry_after(text, 1_700_000_000.0) == seconds


def test_request_ids_and_headers() -> None:
    assert request_id({"x-request-id": "a.b_c-1"}) == "a.b_c-1"
    for bad in ("", "a b", "a\r\nset-cookie: x", "x" * 65, "ü"):
        assert request_id({"x-request-id": bad}).startswith("req-")
    assert request_id({}) != request_id({})
    assert header_safe("ok\r\nx: y") == "ok__x:_y"
    assert len(header_safe("x" * 500)) == 200


@pytest.mark.parametrize(
    ("chunk", "content"),
    [
        ({}, False),
        ({"choices": None}, False),
        ({"choices": ["x", None]}, False),
        ({"choices": [{"delta": {"role": "assistant"}}]}, False),
        ({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, False),
        ({"choices": [{"delta": None, "finish_reason": None}]}, False),
        ({"choices": [{"delta": {"content": "a"}}]}, True),
        ({"choices": [{"delta": {"tool_calls": [{}]}}]}, True),
        ({"choices": [{"delta": {}, "finish_reason": "stop"}]}, True),
        ({"choices": [{"text": ""}]}, False),
        ({"choices": [{"text": "a"}]}, True),
        ({"choices": [{"delta": {"reasoning_content": "hm"}}]}, True),
        ({"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}, True),
        ({"choices": [{"delta": {"role": "assistant", "content": "", "tool_calls": []}}]}, False),
    ],
)
def test_what_is_content(chunk: dict[str, Any], content: bool) -> None:
    assert openai.has_content(chunk) is content


@pytest.mark.parametrize(
    ("usage", "wanted"),
    [
        (None, None),
        ("x", None),
        ({}, Usage()),
        ({"prompt_tokens": 3, "completion_tokens": 4}, Usage(3, 4)),
        ({"prompt_tokens": -3, "completion_tokens": True}, Usage()),
        ({"completion_tokens": 2**60, "prompt_tokens": 1.5}, Usage()),
        ({"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 1}}, Usage(1, 0, 1)),
    ],
)
def test_usage_is_read_with_care(usage: Any, wanted: Usage | None) -> None:
    assert openai.usage_of({"usage": usage}) == wanted


def test_chunks_are_shaped_for_the_client() -> None:
    def shaped(chunk: dict[str, Any], **asked: bool) -> Any:
        call = Call(Operation.CHAT, "mine", b"", stream=True, **asked)
        out = openai.shape_chunk(dict(chunk), call)
        return msgspec.json.decode(out.removeprefix(b"data: ")) if out else None

    text = {"choices": [{"delta": {"content": "a"}}], "model": "theirs", "usage": {"x": 1}}
    last = {"choices": [], "model": "theirs", "usage": {"x": 2}}
    assert shaped(text) == {"choices": text["choices"], "model": "mine"}
    assert shaped(last) is None
    assert shaped(text, include_usage=True)["usage"] is None
    assert shaped(last, include_usage=True)["usage"] == {"x": 2}
    both = {"include_usage": True, "continuous_usage": True}
    assert shaped(text, **both)["usage"] == {"x": 1}


def parse(operation: Operation, raw: bytes) -> openai.Call:
    return openai.parse(operation, raw, lambda own: f"salt of {own}")


def test_completion_and_tokenize_bodies() -> None:
    raw = b'{"model":"m","prompt":["a","b"],"stream":true,"best_of":1,"other":1.5}'
    call = parse(Operation.COMPLETION, raw)
    assert (call.path, call.stream, call.include_usage) == ("/v1/completions", True, False)
    sent = msgspec.json.decode(call.body)
    assert (sent["other"], sent["cache_salt"]) == (1.5, "salt of ")
    salted = parse(Operation.COMPLETION, b'{"model":"m","prompt":"a","cache_salt":"mine"}')
    assert msgspec.json.decode(salted.body)["cache_salt"] == "salt of mine"
    with pytest.raises(InvalidRequest, match="cache_salt"):
        parse(Operation.COMPLETION, b'{"model":"m","prompt":"a","cache_salt":7}')
    leading = openai.parse(
        Operation.COMPLETION,
        b'{"model":"m","prompt":"a","priority":-3}',
        str,
        may_lead=lambda _: True,
    )
    assert msgspec.json.decode(leading.body)["priority"] == -3
    with pytest.raises(InvalidRequest) as error:
        parse(Operation.TOKENIZE, b'{"prompt":"x"}')
    assert error.value.param == "model"


def test_floods_of_little_containers_are_refused_before_they_are_decoded() -> None:
    flood = b'{"model":"m","prompt":"x","y":[' + b"[1]," * 40_000 + b"1]}"
    with pytest.raises(InvalidRequest, match="holds more than"):
        parse(Operation.COMPLETION, flood)
    with pytest.raises(InvalidRequest):
        parse(Operation.COMPLETION, b'{"x":"' + b'\\"[' * 500_000)  # never ends
    with pytest.raises(InvalidRequest, match="texts"):
        parse(Operation.COMPLETION, b'{"x":[' + b'"",' * 200_000 + b"1]}")
    text = '["' * 40_000 + "{\\" * 40_000  # in a text they are only characters
    raw = msgspec.json.encode({"model": "m", "prompt": text})
    assert msgspec.json.decode(parse(Operation.COMPLETION, raw).body)["prompt"] == text


def test_no_id_is_given_twice() -> None:
    given = {unique() for _ in range(2000)}
    assert len(given) == 2000
    assert all(len(one) == 24 and int(one, 16) >= 0 for one in given)


def test_a_forked_process_gives_other_ids() -> None:
    unique()  # there are some in stock now
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, unique().encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 24).decode() != unique()
    os.close(read)
    os.close(write)


def test_an_answer_goes_on_as_it_came_unless_it_names_another_model() -> None:
    call = Call(Operation.CHAT, "ours", b"{}")
    same, other, none = b'{"model": "ours", "x": 1.0}', b'{"model":"theirs"}', b'{ "x":2 }'
    for raw, said in ((same, same), (other, b'{"model":"ours"}'), (none, none)):
        assert openai.whole(call, msgspec.json.decode(raw), raw) == said
