"""The handler: the straight path, its refusals, its retries and its accounts."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.tenant import Outcome, Role
from cloudlm.security.keys import cache_salt, mint, tenant_mark


async def test_whole_answer(rig: Any, kit: Any) -> None:
    result = await rig.ask(kit.chat_body())
    assert result.status == 200
    assert result.json["choices"][0]["message"]["content"] == "t0 t1 t2 t3 t4"
    assert result.json["model"] == kit.MODEL
    assert result.headers["x-cloudlm-model"] == kit.MODEL
    assert result.headers["x-cloudlm-replica"] == rig.replicas[0].name
    assert result.headers["x-cloudlm-attempts"] == "1"
    (row,) = await rig.rows()
    assert (row.outcome, row.status, row.attempt) == (Outcome.FINISHED, 200, 1)
    assert (row.prompt_tokens, row.completion_tokens, row.cached_tokens) == (7, 5, 2)
    assert (row.key_id, row.model) == (rig.key_id, kit.MODEL)
    assert row.request_id == result.headers["x-request-id"]
    rig.assert_nothing_open()


@pytest.mark.promise(39)
async def test_what_the_replica_gets(rig: Any, kit: Any) -> None:
    body = kit.chat_body(stream=True, seed=3, made_up_field={"kept": [1, 2]})
    headers = {**rig.headers, "x-request-id": "abc-1", "cookie": "secret"}
    result = await rig.ask(body, headers=headers)
    sent = rig.replicas[0].requests[0]
    wanted = {"include_usage": True, "continuous_usage_stats": True}
    salt = cache_salt("default", kit.PEPPER)
    assert sent == {**body, "stream_options": wanted, "cache_salt": salt}
    head = rig.replicas[0].heads[0].lower()
    assert "authorization: bearer worker-token-for-tests" in head
    assert "x-request-id: abc-1" in head
    assert f"x-cloudlm-tenant: {tenant_mark('default', kit.PEPPER)}" in head
    assert "x-cloudlm-weight: 1\r\n" in head
    assert "cookie" not in head
    assert rig.key not in head
    assert result.headers["x-request-id"] == "abc-1"


@pytest.mark.promise(9)
@pytest.mark.parametrize(("asked", "sent"), [(-5, 0), (5, 5), (10**9, 100)])
async def test_a_user_may_let_others_go_first_but_not_push_ahead(
    rig: Any, kit: Any, asked: int, sent: int
) -> None:
    await rig.ask(kit.chat_body(priority=asked))
    assert rig.replicas[0].requests[0]["priority"] == sent


async def test_stream_without_usage_asked(rig: Any, kit: Any) -> None:
    result = await rig.ask(kit.chat_body(stream=True))
    assert result.status == 200
    assert result.headers["content-type"].startswith("text/event-stream")
    assert result.events[-1] == "[DONE]"
    chunks = result.events[:-1]
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
    assert all(chunk["model"] == kit.MODEL for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert result.tokens == 5
    (row,) = await rig.rows()
    assert (row.outcome, row.completion_tokens, row.prompt_tokens) == (Outcome.FINISHED, 5, 7)
    assert row.first_token_s is not None
    rig.assert_nothing_open()


async def test_stream_with_usage_asked(rig: Any, kit: Any) -> None:
    result = await rig.ask(kit.chat_body(stream=True, stream_options={"include_usage": True}))
    *chunks, last, done = result.events
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5


async def test_stream_with_continuous_usage_asked(rig: Any, kit: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    result = await rig.ask(kit.chat_body(stream=True, stream_options=options))
    counts = [e["usage"]["completion_tokens"] for e in result.events[:-1]]
    assert counts == [0, 1, 2, 3, 4, 5, 5, 5]


async def test_connection_is_reused_after_a_stream(rig: Any, kit: Any) -> None:
    for _ in range(3):
        await rig.ask(kit.chat_body(stream=True))
    assert len(rig.replicas[0]._tasks) == 1


@pytest.mark.promise(6)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": "Bearer nonsense"},
        {"authorization": "Basic dXNlcjpwYXNz"},
        {"authorization": "Bearer clm_live_' OR 1=1 --"},
        {"authorization": "Bearer " + "x" * 100_000},
        {"x-api-key": "clm_live_000000000000_00000000000000000000000000000000_00000000"},
        {"authorization": "Bearer \xff\xfe\x00"},
    ],
)
async def test_bad_key(rig: Any, kit: Any, headers: dict[str, str]) -> None:
    unknown = await rig.ask(
        kit.chat_body(),
        headers={"authorization": f"Bearer {mint('x', Role.ADMIN, kit.PEPPER, 1.0).text}"},
    )
    result = await rig.ask(kit.chat_body(), headers=headers)
    assert result.status == unknown.status == 401
    assert result.body == unknown.body  # nothing tells an unknown key from a malformed one
    assert result.headers["www-authenticate"] == "Bearer"
    assert not rig.replicas[0].requests
    assert await rig.rows() == []


async def test_admin_key_and_api_key_header_may_infer(rig: Any, kit: Any) -> None:
    admin = mint("admin", Role.ADMIN, kit.PEPPER, 1.0)
    await rig.state.put_key(admin.record)
    await rig.gateway.view.refresh()
    result = await rig.ask(kit.chat_body(), headers={"x-api-key": admin.text})
    assert result.status == 200


async def test_a_key_and_a_model_made_a_moment_ago_are_known(rig: Any, kit: Any) -> None:
    minted = mint("new", Role.USER, kit.PEPPER, 1.0)
    await rig.state.put_key(minted.record)
    await rig.state.put_deployment(DeploymentSpec("fresh", "models:/m/1"), now=1.0)
    url = rig.replicas[0].url
    await rig.state.put_endpoints("fresh", [Endpoint("fresh", rig.replicas[0].name, url, 1)])
    headers = {"authorization": f"Bearer {minted.text}"}
    assert (await rig.ask(kit.chat_body(model="fresh"), headers=headers)).status == 200


@pytest.mark.promise(33)
async def test_revoked_key(rig: Any, kit: Any) -> None:
    assert (await rig.ask(kit.chat_body())).status == 200
    await rig.state.revoke_key(rig.key_id, now=5.0)
    began = time.monotonic()
    while (await rig.ask(kit.chat_body())).status != 401:
        assert time.monotonic() - began < 30.0  # the promised second is a benchmark's
        await asyncio.sleep(0.02)


@pytest.mark.promise(33)
async def test_revoked_key_cuts_its_stream(rig: Any, kit: Any) -> None:
    rig.replicas[0].default = kit.Plan(tokens=3, stall_at=3)
    response = await rig.gateway.handler.handle(rig.request(kit.chat_body(stream=True)))
    reading = asyncio.create_task(rig.finish(response))
    await asyncio.sleep(0.02)
    await rig.state.revoke_key(rig.key_id, now=5.0)
    await rig.gateway.view.refresh()
    result = await asyncio.wait_for(reading, 60.0)
    assert result.error["code"] == "invalid_api_key"
    assert "[DONE]" not in result.events
    (row,) = await rig.rows()
    assert (row.outcome, row.status, row.completion_tokens) == (Outcome.REFUSED, 401, 2)
    rig.assert_nothing_open()


async def test_unknown_model_names_those_that_exist(rig: Any, kit: Any) -> None:
    result = await rig.ask(kit.chat_body(model="nope\r\nx: y"))
    assert result.status == 404
    assert result.json["error"]["code"] == "model_not_found"
    assert kit.MODEL in result.json["error"]["message"]
    assert "x-cloudlm-model" not in result.headers


@pytest.mark.parametrize("wish", [None, True, False])
async def test_a_model_asleep_is_refused_without_asking_a_replica(
    rig: Any, kit: Any, wish: bool | None
) -> None:
    """A time to come back is named only where it wakes up already: no request wakes it."""
    await rig.state.put_deployment(DeploymentSpec("nap", "models:/m/1", asleep=wish), now=1.0)
    sleeping = Endpoint("nap", "nap-r1-0", "http://127.0.0.1:9", 1, weight=0.0)
    await rig.state.put_endpoints("nap", [sleeping])
    await rig.gateway.view.refresh()
    for result in (
        await rig.ask(kit.chat_body(model="nap")),
        await rig.ask(method="GET", path="/v2/models/nap/ready"),
    ):
        assert result.status == 503
        assert "x-cloudlm-replica" not in result.headers
        if wish is False:
            assert "waking up" in result.body.decode()
            assert int(result.headers["retry-after"]) >= 1
        else:
            assert "'cloudlm wake nap' does" in result.body.decode()
            assert "retry-after" not in result.headers
    asked = await rig.ask(kit.chat_body(model="nap"))
    assert asked.json["error"]["code"] == ("no_replica" if wish is False else "model_asleep")
    shown = (await rig.ask(method="GET", path="/v1/models/nap")).json
    assert (shown["ready"], shown["model_version_status"]) == (False, [])


async def test_no_ready_replica(rig: Any, kit: Any) -> None:
    await rig.state.put_deployment(DeploymentSpec("cold", "models:/m/1"), now=1.0)
    await rig.gateway.view.refresh()
    result = await rig.ask(kit.chat_body(model="cold"))
    assert result.status == 503
    assert result.json["error"]["code"] == "no_replica"
    assert "starting" in result.json["error"]["message"]
    assert int(result.headers["retry-after"]) >= 1
    demand = {row.model: row for row in rig.gateway.demand.measure()}
    assert demand["cold"].requests_per_s > 0  # asked for, so control may start it


async def test_overload_is_refused_at_once(kit: Any) -> None:
    async with kit.open_rig(max_ongoing_requests=1) as rig:
        gate = asyncio.Event()
        rig.replicas[0].plans.append(kit.Plan(gate=gate))
        first = asyncio.create_task(rig.ask(kit.chat_body()))
        await kit.until(lambda: rig.gateway.admission.total)
        second = await rig.ask(kit.chat_body())
        assert not first.done()
        gate.set()
        assert second.status == 503
        assert second.json["error"]["code"] == "overloaded"
        assert second.headers["retry-after"] == "1"
        assert (await first).status == 200
        assert (await rig.ask(kit.chat_body())).status == 200
        rig.assert_nothing_open()


async def test_models(rig: Any, kit: Any) -> None:
    listed = await rig.ask(method="GET", path="/v1/models")
    model = {"id": kit.MODEL, "object": "model", "created": 1_700_000_000, "owned_by": "cloudlm"}
    assert listed.json == {"object": "list", "data": [model]}
    one = (await rig.ask(method="GET", path=f"/v1/models/{kit.MODEL}")).json
    assert one.items() >= model.items()
    assert (await rig.ask(method="GET", path="/v1/models/none")).status == 404
    assert (await rig.ask(method="GET", path="/v1/models", headers={})).status == 401


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("POST", "/v1/images/generations", 501),
        ("GET", "/v1/files/file-1/content", 501),
        ("POST", "/v1/nothing", 404),
        ("GET", "/etc/passwd", 404),
    ],
)
async def test_other_paths(rig: Any, method: str, path: str, status: int) -> None:
    result = await rig.ask({}, method=method, path=path)
    assert result.status == status
    assert set(result.json["error"]) == {"message", "type", "param", "code"}


async def test_tokenize_is_passed_through(rig: Any, kit: Any) -> None:
    rig.replicas[0].default = kit.Plan(body=b'{"tokens":[1,2],"count":2}')
    body = {"model": kit.MODEL, "prompt": "x"}
    result = await rig.ask(body, path="/tokenize")
    assert (result.status, result.json) == (200, {"tokens": [1, 2], "count": 2})
    assert "POST /tokenize HTTP/1.1" in rig.replicas[0].heads[0]
    (row,) = await rig.rows()
    assert (row.prompt_tokens, row.completion_tokens) == (0, 0)


async def test_embeddings_are_passed_through_and_accounted(rig: Any, kit: Any) -> None:
    answer = (
        b'{"object":"list","model":"x","data":[{"object":"embedding","index":0,"embedding":[1.0]}],'
        b'"usage":{"prompt_tokens":7,"total_tokens":7,"prompt_tokens_details":{"cached_tokens":4}}}'
    )
    rig.replicas[0].default = kit.Plan(body=answer)
    body = {"model": kit.MODEL, "input": ["a", "b"], "dimensions": 1, "cache_salt": "own"}
    result = await rig.ask(body, path="/v1/embeddings")
    assert (result.status, result.json["model"]) == (200, kit.MODEL)
    assert result.json["data"][0]["embedding"] == [1.0]
    assert "POST /v1/embeddings HTTP/1.1" in rig.replicas[0].heads[0]
    sent = rig.replicas[0].requests[0]
    assert (sent["input"], sent["dimensions"]) == (["a", "b"], 1)
    assert sent["cache_salt"] not in ("", "own")
    (row,) = await rig.rows()
    assert (row.prompt_tokens, row.completion_tokens, row.cached_tokens) == (7, 0, 4)


async def test_bad_embeddings(rig: Any, kit: Any) -> None:
    for fields in ({"input": []}, {"encoding_format": "x"}, {"cache_salt": 1}, {"dimensions": 0}):
        body = {"model": kit.MODEL, "input": "a", **fields}
        result = await rig.ask(body, path="/v1/embeddings")
        assert (result.status, result.json["error"]["param"]) == (400, next(iter(fields)))
    rig.replicas[0].default = kit.Plan(body=b'{"choices":[]}')
    result = await rig.ask({"model": kit.MODEL, "input": "a"}, path="/v1/embeddings")
    assert result.status == 502
    assert len(rig.replicas[0].heads) == 1


@pytest.mark.promise(18)
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe{}",
        b"[]",
        b'{"model":',
        b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"user":"\\ud800"}',
        b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"max_tokens":-1}',
        b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"n":1e99}',
        b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"seed":' + b"9" * 5000 + b"}",
        b'{"model":"tiny","messages":[{"role":"user","content":"'
        + b"x" * 3_000_000
        + b'"}],"n":0}',
    ],
)
async def test_hostile_bodies(rig: Any, raw: bytes) -> None:
    began = time.perf_counter()
    result = await rig.ask(raw=raw)
    assert time.perf_counter() - began < 20.0  # 0.05 on a machine of its own
    assert result.status in (400, 413), result.body
    assert result.json["error"]["type"] == "invalid_request_error"
    assert not rig.replicas[0].requests


@pytest.mark.promise(24)
async def test_a_large_body_holds_up_nobody_else(rig: Any, kit: Any) -> None:
    raw = b'{"model":"tiny","prompt":[' + b"1," * 999_999 + b"1.5]}"
    large = asyncio.create_task(rig.ask(raw=raw, path="/v1/completions"))
    await asyncio.sleep(0)
    small = await rig.ask(kit.chat_body())
    assert small.status == 200
    assert not large.done()  # the small one overtook it
    assert (await large).status == 400


async def test_upstream_4xx_passes_with_its_status(rig: Any, kit: Any) -> None:
    error = {"message": "13 > 8 tokens", "type": "t", "param": "messages", "code": "its_own"}
    rig.replicas[0].default = kit.Plan("status", status=422, error={"error": error})
    result = await rig.ask(kit.chat_body())
    assert (result.status, result.json) == (422, {"error": error})
    (row,) = await rig.rows()
    assert (row.outcome, row.status) == (Outcome.REFUSED, 422)


@pytest.mark.promise(15)
@pytest.mark.parametrize("status", [401, 403, 302, 101 + 100])
async def test_replica_faults_are_not_the_clients(rig: Any, kit: Any, status: int) -> None:
    rig.replicas[0].default = kit.Plan("status", status=status)
    result = await rig.ask(kit.chat_body())
    assert result.status == 502
    assert result.json["error"]["code"] == "upstream_failed"


@pytest.mark.promise(8, 28)
async def test_retry_after_is_passed_on_and_honoured(kit: Any) -> None:
    async with kit.open_rig(replicas=2) as rig:
        busy, good = rig.replicas
        busy.default = kit.Plan("status", status=503, headers={"Retry-After": "30"})
        for _ in range(6):
            result = await rig.ask(kit.chat_body())
            assert result.status == 200
        assert len(busy.requests) == 1  # asked for time and got it
        good.default = busy.default
        result = await rig.ask(kit.chat_body())
        assert result.status == 503
        assert result.headers["retry-after"] == "30"
        assert result.headers["x-cloudlm-attempts"] == "1"
        rig.assert_nothing_open()


FAULTS: dict[str, dict[str, Any]] = {
    "close": {"kind": "close"},
    "500": {"kind": "status", "status": 500},
    "429": {"kind": "status", "status": 429},
    "503": {"kind": "status", "status": 503},
    "role-then-cut": {"cut_byte": 200},
    "cut-in-head-of-body": {"cut_byte": 3},
    "garbage": {"garbage_at": 0},
    "error-event": {"error": {"error": {"message": "oom", "type": "x", "code": 500}}},
    "no-content": {"error": {"choices": []}},
    "html": {"kind": "status", "body": b"<html>"},
}


@pytest.mark.promise(4)
@pytest.mark.known_failure("litellm#36768", "litellm#42724")
@pytest.mark.parametrize("fault", FAULTS)
async def test_failover_before_content(kit: Any, fault: str) -> None:
    async with kit.open_rig(replicas=2) as rig:
        rig.replicas[0].default = kit.Plan(**FAULTS[fault])
        result = await rig.ask(kit.chat_body(stream=True))
        assert result.status == 200
        assert result.tokens == 5
        assert result.events[-1] == "[DONE]"
        assert result.headers["x-cloudlm-attempts"] == "2"
        rows = await rig.rows()
        assert [row.attempt for row in rows] == [1, 2]
        assert rows[0].outcome in (Outcome.FAILED, Outcome.REFUSED)
        assert [row.completion_tokens for row in rows] == [0, 5]
        rig.assert_nothing_open()


@pytest.mark.promise(4)
@pytest.mark.known_failure("litellm#36768", "litellm#42724")
@pytest.mark.parametrize("fault", FAULTS)
async def test_all_replicas_fail(kit: Any, fault: str) -> None:
    async with kit.open_rig(replicas=2) as rig:
        for replica in rig.replicas:
            replica.default = kit.Plan(**FAULTS[fault])
        result = await rig.ask(kit.chat_body(stream=True))
        assert 429 <= result.status <= 504
        assert result.json["error"]["message"]
        assert len(await rig.rows()) == 2
        rig.assert_nothing_open()


@pytest.mark.promise(4)
async def test_silent_replica_is_left_for_another(kit: Any) -> None:
    async with kit.open_rig(replicas=2, first_token_timeout_s=1.0) as rig:
        rig.replicas[0].default = kit.Plan("silence")
        result = await rig.ask(kit.chat_body(stream=True))
        assert result.tokens == 5
        rows = await rig.rows()
        assert [(row.outcome, row.status) for row in rows] == [
            (Outcome.FAILED, 504),
            (Outcome.FINISHED, 200),
        ]
        await kit.until(lambda: rig.replicas[0].active == 0)


@pytest.mark.promise(4)
@pytest.mark.known_failure("ray#47008")
async def test_unreachable_replica(rig: Any, kit: Any) -> None:
    good = rig.replicas[0]
    dead = Endpoint(kit.MODEL, "dead", "http://127.0.0.1:1", 1)
    alive = Endpoint(kit.MODEL, good.name, good.url, 1)
    await rig.state.put_endpoints(kit.MODEL, [dead, alive])
    await rig.gateway.view.refresh()
    statuses = [(await rig.ask(kit.chat_body())).status for _ in range(10)]
    assert statuses == [200] * 10
    dead_rows = [row for row in await rig.rows() if row.replica == "dead"]
    assert len(dead_rows) == 1  # a dead replica draws nothing to it


@pytest.mark.promise(1, 3)
async def test_break_after_content_is_told(rig: Any, kit: Any) -> None:
    rig.replicas[0].default = kit.Plan(tokens=9, cut_byte=1500)
    result = await rig.ask(kit.chat_body(stream=True))
    assert result.status == 200
    assert 0 < result.tokens < 9
    assert result.error["code"] == "upstream_failed"
    assert "error" in result.events[-1]
    assert b"[DONE]" not in result.body
    assert b'"stop"' not in result.body
    (row,) = await rig.rows()
    assert (row.outcome, row.status) == (Outcome.FAILED, 502)
    assert row.completion_tokens == result.tokens == rig.replicas[0].tokens_sent


@pytest.mark.promise(1)
async def test_end_without_done_is_a_break(rig: Any, kit: Any) -> None:
    rig.replicas[0].default = kit.Plan(done=False)
    result = await rig.ask(kit.chat_body(stream=True))
    assert result.error["code"] == "upstream_failed"
    assert b"[DONE]" not in result.body


@pytest.mark.promise(10)
@pytest.mark.known_failure("gonka#1798", "octos#29", "fusion-code#134")
async def test_stall_after_content(kit: Any) -> None:
    async with kit.open_rig(idle_timeout_s=1.0) as rig:
        rig.replicas[0].default = kit.Plan(stall_at=3)
        result = await rig.ask(kit.chat_body(stream=True))
        assert result.tokens == 2
        assert result.error["code"] == "upstream_timeout"
        (row,) = await rig.rows()
        assert (row.status, row.completion_tokens) == (504, 2)
        await kit.until(lambda: rig.replicas[0].active == 0)


@pytest.mark.promise(10)
@pytest.mark.known_failure("dcc-mcp-core#423")
async def test_slow_stream_is_not_idle(kit: Any) -> None:
    async with kit.open_rig(idle_timeout_s=1.0) as rig:
        rig.replicas[0].default = kit.Plan(tokens=8, pause_s=0.2)  # longer than the limit in all
        result = await rig.ask(kit.chat_body(stream=True))
        assert result.tokens == 8
        assert result.events[-1] == "[DONE]"


async def test_replica_without_usage_is_counted_by_chunks(rig: Any, kit: Any) -> None:
    rig.replicas[0].default = kit.Plan(say_usage=False, cut_byte=900)
    result = await rig.ask(kit.chat_body(stream=True))
    (row,) = await rig.rows()
    assert row.completion_tokens == result.tokens > 0


@pytest.mark.promise(2)
@pytest.mark.parametrize("stream", [True, False])
async def test_disconnect_before_the_answer(rig: Any, kit: Any, stream: bool) -> None:
    replica = rig.replicas[0]
    replica.default = kit.Plan("silence")
    request = rig.request(kit.chat_body(stream=stream))
    asking = asyncio.create_task(rig.gateway.handler.handle(request))
    await kit.until(lambda: replica.active)
    began = time.monotonic()
    request.disconnected.set_result(None)
    assert (await asking).status == 499
    await kit.until(lambda: replica.active == 0)
    assert replica.dropped_at[0] - began < 5.0
    (row,) = await rig.rows()
    assert (row.outcome, row.status, row.completion_tokens) == (Outcome.CANCELLED, 499, 0)
    rig.assert_nothing_open()


@pytest.mark.promise(2)
@pytest.mark.known_failure("litellm#33736", "litellm#37734")
async def test_disconnect_in_the_stream(rig: Any, kit: Any) -> None:
    replica = rig.replicas[0]
    replica.default = kit.Plan(stall_at=3)
    request = rig.request(kit.chat_body(stream=True))
    response = await rig.gateway.handler.handle(request)
    reading = asyncio.create_task(rig.finish(response))
    await asyncio.sleep(0.03)
    request.disconnected.set_result(None)
    result = await asyncio.wait_for(reading, 60.0)
    assert result.error is None
    await kit.until(lambda: replica.active == 0)
    (row,) = await rig.rows()
    assert (row.outcome, row.completion_tokens) == (Outcome.CANCELLED, result.tokens)
    rig.assert_nothing_open()


@pytest.mark.promise(2)
@pytest.mark.known_failure("litellm#27955")
async def test_body_that_is_never_read(rig: Any, kit: Any) -> None:
    rig.replicas[0].default = kit.Plan(stall_at=3)
    response = await rig.gateway.handler.handle(rig.request(kit.chat_body(stream=True)))
    await response.body.aclose()
    (row,) = await rig.rows()
    assert (row.outcome, row.completion_tokens) == (Outcome.CANCELLED, 0)
    await kit.until(lambda: rig.replicas[0].active == 0)
    rig.assert_nothing_open()


@pytest.mark.promise(2)
async def test_cancelled_task(rig: Any, kit: Any) -> None:
    rig.replicas[0].default = kit.Plan("silence")
    task = asyncio.create_task(rig.ask(kit.chat_body()))
    await kit.until(lambda: rig.replicas[0].active)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (row,) = await rig.rows()
    assert row.outcome is Outcome.CANCELLED
    rig.assert_nothing_open()


@pytest.mark.promise(8)
async def test_retry_storm_is_bounded(kit: Any) -> None:
    async with kit.open_rig(replicas=4) as rig:
        for replica in rig.replicas:
            replica.default = kit.Plan("status", status=503)
        for _ in range(8):
            await asyncio.gather(*(rig.ask(kit.chat_body()) for _ in range(10)))
        attempts = sum(len(replica.requests) for replica in rig.replicas)
        assert 80 < attempts <= 1.2 * 80
        assert len(await rig.rows()) == attempts


@pytest.mark.promise(26)
async def test_state_down_serves_on(rig: Any, kit: Any, monkeypatch: Any) -> None:
    from cloudlm.core.errors import Unavailable

    async def down(*_: Any, **__: Any) -> Any:
        raise Unavailable("the database is away")

    for name in ("version", "list_keys", "append_ledger", "put_demand", "list_endpoints"):
        monkeypatch.setattr(rig.state, name, down)
    assert await rig.gateway.view.refresh() is False
    assert (await rig.ask(kit.chat_body())).status == 200
    assert (await rig.ask(method="GET", path="/v1/models")).status == 200
    assert await rig.gateway.ledger.flush() is False
    monkeypatch.undo()
    await rig.gateway.ledger.flush()
    assert len(await rig.state.list_ledger()) == 1


@pytest.mark.promise(32)
async def test_no_secret_or_prompt_in_logs_and_metrics(
    rig: Any, kit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    canary = "canary-prompt-4711"
    rig.replicas[0].plans.extend([kit.Plan("close"), kit.Plan(cut_byte=900), kit.Plan()])
    for stream in (True, True, False):
        body = kit.chat_body(stream=stream)
        body["messages"][0]["content"] = canary
        await rig.ask(body)
    secret = rig.key.split("_")[3]
    journal = b"".join(p.read_bytes() for p in rig.gateway.ledger._journal._folder.iterdir())
    said = caplog.text + rig.gateway.meter.exposition().decode() + journal.decode()
    said += repr([vars(record) for record in caplog.records])
    assert canary not in said
    assert secret not in said


PLANS = st.one_of(
    st.just({}),
    st.just({"kind": "close"}),
    st.just({"kind": "silence"}),
    st.builds(lambda s: {"kind": "status", "status": s}, st.sampled_from([400, 429, 500, 503])),
    st.builds(lambda k: {"cut_byte": k}, st.integers(0, 2200)),
    st.builds(lambda n: {"stall_at": n}, st.integers(0, 7)),
    st.builds(lambda n: {"garbage_at": n}, st.integers(0, 7)),
    st.just({"pause_s": 0.002}),
    st.just({"done": False}),
)


@pytest.mark.promise(3)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    plans=st.lists(PLANS, min_size=1, max_size=4),
    stream=st.booleans(),
    drop_after_bytes=st.one_of(st.none(), st.integers(0, 2000)),
    poured_at_once=st.integers(0, 3),
)
def test_accounts_are_right_on_every_path(
    kit: Any,
    plans: list[dict[str, Any]],
    stream: bool,
    drop_after_bytes: int | None,
    poured_at_once: int,
) -> None:
    """One row per attempt; tokens of all rows = tokens that replicas sent = tokens relayed."""
    asyncio.run(_accounts(kit, plans, stream, drop_after_bytes, poured_at_once))


async def _accounts(
    kit: Any,
    plans: list[dict[str, Any]],
    stream: bool,
    drop_after_bytes: int | None,
    poured_at_once: int,
) -> None:
    # Only a silent replica makes the gateway wait for a timeout. Where none is silent, no timeout
    # may end an attempt, however slow the machine: what was sent and not yet read would be lost.
    silent = any(plan.get("kind") == "silence" or "stall_at" in plan for plan in plans)
    patience_s = 0.12 if silent else 60.0
    limits = {"idle_timeout_s": patience_s, "first_token_timeout_s": patience_s}
    async with kit.open_rig(replicas=2, **limits) as rig:
        for number, plan in enumerate(plans):
            rig.replicas[number % 2].plans.append(kit.Plan(**plan))
        request = rig.request(kit.chat_body(stream=stream))
        response = await rig.gateway.handler.handle(request)
        got = b""
        if isinstance(response.body, bytes):
            got = response.body
        else:
            async for piece in response.body:
                got += piece
                if poured_at_once:
                    poured: list[bytes] = []

                    def pour(piece: bytes, poured: list[bytes] = poured) -> bool:
                        poured.append(piece)
                        return len(poured) < poured_at_once

                    await response.body.pump(pour)
                    got += b"".join(poured)
                if drop_after_bytes is not None and len(got) >= drop_after_bytes:
                    request.disconnected.set_result(None)
                    break
            await response.body.aclose()
        rows = await rig.rows()
        attempts = sum(len(replica.requests) for replica in rig.replicas)
        assert len(rows) == attempts
        assert sorted(row.attempt for row in rows) == list(range(1, attempts + 1))
        assert sum(row.outcome is Outcome.FINISHED for row in rows) <= 1
        counted = sum(row.completion_tokens for row in rows)
        if response.status != 200:
            assert counted == 0
            assert json.loads(got)["error"]
        elif not stream:
            assert counted == json.loads(got)["usage"]["completion_tokens"]
        else:
            result = kit.Result(200, {}, got)
            assert counted == result.tokens
            ended = result.events[-1:] == ["[DONE]"]
            assert not (ended and result.error)
            if not request.disconnected.done():
                assert ended or result.error
                sent = sum(replica.tokens_sent for replica in rig.replicas)
                assert counted <= sent if silent else counted == sent
        rig.assert_nothing_open()


@pytest.mark.promise(6)
@pytest.mark.known_failure("CVE-2026-42208")
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    header=st.one_of(
        st.text(st.characters(max_codepoint=255), max_size=80),
        st.from_regex(r"[Bb]earer clm_[a-z]{2,8}_[0-9a-z]{12}_[0-9a-z]{32}_[0-9a-f]{8}"),
        st.just("Bearer " + mint("x", Role.ADMIN, b"q" * 32, 1.0).text),
    ),
    name=st.sampled_from(["authorization", "x-api-key"]),
)
def test_any_header_that_is_no_key_gets_the_same_401(kit: Any, header: str, name: str) -> None:
    async def ask() -> Any:
        request = shared.request(kit.chat_body(), headers={name: header})
        return await shared.finish(await shared.gateway.handler.handle(request))

    loop, shared = _shared(kit)
    result = loop.run_until_complete(ask())
    assert result.status == 401
    assert result.json["error"]["code"] == "invalid_api_key"
    assert "SQL" not in result.body.decode()


_kept: list[Any] = []


def _shared(kit: Any) -> tuple[asyncio.AbstractEventLoop, Any]:
    """One rig for many examples."""
    if not _kept:
        loop = asyncio.new_event_loop()
        context = kit.open_rig()
        _kept.extend([loop, loop.run_until_complete(context.__aenter__()), context])
    return _kept[0], _kept[1]


@pytest.fixture(scope="module", autouse=True)
def _close_shared() -> Any:
    yield
    if _kept:
        loop, _, context = _kept
        loop.run_until_complete(context.__aexit__(None, None, None))
        loop.close()
        _kept.clear()


async def test_what_is_said_of_a_stream_carries_its_own_request_id(
    rig: Any, kit: Any, monkeypatch: Any
) -> None:
    """Events arrive on a connection that an earlier request opened."""
    from cloudlm.telemetry.logs import request_id_var

    said: list[str | None] = []
    ended = rig.gateway.meter.request_ended

    def noted(*about: Any) -> None:
        said.append(request_id_var.get())
        ended(*about)

    monkeypatch.setattr(rig.gateway.meter, "request_ended", noted)
    for name in ("first", "second"):
        headers = {**rig.headers, "x-request-id": name}
        asking = asyncio.create_task(rig.ask(kit.chat_body(stream=True), headers=headers))
        assert (await asking).status == 200
    assert said == ["first", "second"]
