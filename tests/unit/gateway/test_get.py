"""Deterministic requests by GET: the same as their POST, for every HTTP cache between."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.errors import CloudlmError
from cloudlm.gateway.dialects.openai_get import MAX_CHARACTERS, unfold
from cloudlm.gateway.exchange import GatewayRequest

HEADER = "x-cloudlm-cache"


def _text(body: Any) -> str:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


async def _get(rig: Any, body: Any, path: str = "/v1/chat/completions", **headers: str) -> Any:
    request = rig.request(raw=b"", method="GET", path=path, headers={**rig.headers, **headers})
    request.query = body if isinstance(body, str) else "request=" + _text(body)
    return await rig.finish(await rig.gateway.handler.handle(request))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_get_is_the_post_of_its_body(kit: Any, stream: bool) -> None:
    body = kit.chat_body(temperature=0, stream=stream)
    async with kit.open_rig(cache_models="*") as rig:
        posted = await rig.ask(body)
        first = await _get(rig, body)
        assert (first.status, first.headers[HEADER]) == (200, "hit")
        assert first.body == posted.body
        assert first.headers["cache-control"] == "public, no-cache"
        assert first.headers["vary"] == "authorization, x-api-key"
        again = await _get(rig, body, **{"if-none-match": first.headers["etag"]})
        assert (again.status, again.body) == (304, b"")
        assert again.headers["cache-control"] == "public, no-cache"
        assert len(rig.replicas[0].requests) == 1
        rig.assert_nothing_open()


async def test_a_stream_that_may_break_is_not_for_caches(kit: Any) -> None:
    async with kit.open_rig(cache_models="*", cache_max_age_s=90.0) as rig:
        body = kit.chat_body(seed=4, stream=True)
        first = await _get(rig, body)
        assert (first.status, first.headers[HEADER]) == (200, "miss")
        assert first.headers["cache-control"] == "no-store"
        again = await _get(rig, body)
        assert again.headers["cache-control"] == "public, max-age=90, must-revalidate"


async def test_other_paths_and_the_first_answer(kit: Any) -> None:
    async with kit.open_rig(cache_models="*", cache_max_age_s=90.0) as rig:
        fresh = await _get(rig, kit.chat_body(seed=4))
        assert (fresh.status, fresh.headers[HEADER]) == (200, "miss")
        assert fresh.headers["cache-control"] == "public, max-age=90, must-revalidate"
        assert fresh.headers["etag"]
        raw = b'{"data": [{"embedding": [1.0]}], "usage": {"prompt_tokens": 3}}'
        rig.replicas[0].default = kit.Plan(body=raw)
        vector = await _get(rig, {"model": kit.MODEL, "input": "x"}, "/v1/embeddings")
        assert (vector.status, vector.headers[HEADER]) == (200, "miss")
        posted = await rig.ask(kit.chat_body(seed=4))
        assert posted.headers["cache-control"] == "private, no-cache"


async def test_without_our_cache_nobody_keeps_it(kit: Any) -> None:
    async with kit.open_rig() as rig:
        answer = await _get(rig, kit.chat_body(temperature=0))
        assert (answer.status, answer.headers["cache-control"]) == (200, "no-store")
        assert HEADER not in answer.headers


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("request=" + _text({"model": "tiny", "messages": []}), "same answer each time"),
        ("request=" + _text({"model": "tiny", "messages": [], "temperature": 1}), "same answer"),
        ("request=" + _text({"model": "tiny", "messages": [], "temperature": 0}), "messages"),
        ("request=" + _text(b"not json"), "not valid JSON"),
        ("request=" + _text([1]), "JSON object"),
        ("request=%7B%7D", "base64url"),
        ("request=ab+c", "base64url"),
        ("request=", "one parameter"),
        ("body=" + _text({}), "one parameter"),
        ("request=e30&request=e30", "one parameter"),
        ("request=" + "A" * (MAX_CHARACTERS + 4), "ask by POST"),
    ],
)
async def test_what_is_refused_says_why(rig: Any, query: str, says: str) -> None:
    answer = await _get(rig, query)
    assert answer.status in (400, 431)
    assert says in answer.json["error"]["message"]
    assert answer.headers["cache-control"] == "no-store"
    assert not rig.replicas[0].requests


async def test_a_get_is_authorised_and_without_parameters_none(rig: Any, kit: Any) -> None:
    query = "request=" + _text(kit.chat_body(temperature=0))
    assert (await _get(rig, query, authorization="Bearer no")).status == 401
    assert (await _get(rig, "")).status == 405
    assert (await _get(rig, query, "/v1/messages")).status == 405


async def test_a_body_besides_is_refused(rig: Any, kit: Any) -> None:
    request = rig.request({}, method="GET")
    request.query = "request=" + _text(kit.chat_body(temperature=0))
    assert (await rig.gateway.handler.handle(request)).status == 400


async def test_a_revoked_key_gets_no_304(kit: Any) -> None:
    body = kit.chat_body(temperature=0)
    async with kit.open_rig(cache_models="*") as rig:
        tag = (await _get(rig, body)).headers["etag"]
        await rig.state.revoke_key(rig.key_id, now=2.0)
        await rig.gateway.view.refresh()
        assert (await _get(rig, body, **{"if-none-match": tag})).status == 401


@given(st.text(max_size=200) | st.binary(max_size=200).map(_text).map("request=".__add__))
def test_any_query_is_a_body_or_a_refusal(query: str) -> None:
    request = GatewayRequest("GET", "/v1/completions", {}, b"", None, query)  # type: ignore[arg-type]
    try:
        made = unfold(request)
    except CloudlmError as error:
        assert error.status in (400, 431)
    else:
        assert _text(made.body) == query.removeprefix("request=").rstrip("=")
        assert made.query == ""
