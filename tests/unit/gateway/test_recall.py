"""The cache in the handler: hits, accounts, single flight, conditions, and what is never kept."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudlm.core.access import Grant, Limits, Principal, PrincipalKind, Project, Tenant
from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.tenant import Outcome, Role
from cloudlm.gateway import flight
from cloudlm.gateway.account import Exchange
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.recall import Question
from cloudlm.security.keys import mint

HEADER = "x-cloudlm-cache"


@pytest.fixture
async def cached(kit: Any, tmp_path: Path) -> AsyncIterator[Any]:
    async with kit.open_rig(home=tmp_path, cache_models=kit.MODEL) as one:
        yield one


def _greedy(kit: Any, **more: Any) -> dict[str, Any]:
    return kit.chat_body(temperature=0, **more)


async def _key_of(rig: Any, kit: Any, tenant: str) -> dict[str, str]:
    """The headers of a new key of another tenant."""
    grants = (Grant("user", tenant, "root"),)
    holder = Principal("p", "p", PrincipalKind.SERVICE, tenant, grants=grants)
    for fact in (Tenant(tenant), Project(tenant, "default"), holder):
        await rig.state.put_identity(fact)
    minted = mint("o", Role.USER, kit.PEPPER, 1.0, tenant=tenant, principal="p")
    await rig.state.put_key(minted.record)
    return {**rig.headers, "authorization": f"Bearer {minted.text}"}


async def _rows(rig: Any) -> list[tuple[Any, ...]]:
    return [
        (r.outcome, r.status, r.attempt, r.prompt_tokens, r.completion_tokens, r.cached_tokens)
        for r in await rig.rows()
    ]


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 0.9, "seed": 5}])
async def test_the_second_answer_is_the_first_one(
    cached: Any, kit: Any, fields: dict[str, Any]
) -> None:
    first = await cached.ask(kit.chat_body(**fields))
    second = await cached.ask(kit.chat_body(**fields))
    assert (first.headers[HEADER], second.headers[HEADER]) == ("miss", "hit")
    assert second.status == 200
    assert second.body == first.body
    assert second.headers["content-type"] == first.headers["content-type"]
    assert second.headers["x-cloudlm-model"] == kit.MODEL
    assert "x-cloudlm-replica" not in second.headers
    assert len(cached.replicas[0].requests) == 1
    assert await _rows(cached) == [
        (Outcome.FINISHED, 200, 1, 7, 5, 2),
        (Outcome.CACHED, 200, 1, 7, 5, 7),
    ]
    assert (await cached.rows())[1].request_id == second.headers["x-request-id"]
    assert (await cached.rows())[1].replica == ""
    cached.assert_nothing_open()
    assert b'outcome="cached",status="200"} 1.0' in cached.gateway.meter.exposition()


async def test_a_stream_is_replayed(cached: Any, kit: Any) -> None:
    body = _greedy(kit, stream=True, stream_options={"include_usage": True})
    first = await cached.ask(body)
    second = await cached.ask(body)
    assert second.headers[HEADER] == "hit"
    assert second.body == first.body
    assert second.events[-1] == "[DONE]"
    assert second.headers["content-type"].startswith("text/event-stream")
    without_usage = await cached.ask(_greedy(kit, stream=True))
    assert without_usage.headers[HEADER] == "miss"
    assert (await cached.ask(_greedy(kit))).headers[HEADER] == "miss"
    assert (await _rows(cached))[1] == (Outcome.CACHED, 200, 1, 7, 5, 7)
    cached.assert_nothing_open()


async def test_embeddings_are_deterministic(cached: Any, kit: Any) -> None:
    raw = b'{"data": [{"embedding": [1.0]}], "usage": {"prompt_tokens": 3}}'
    cached.replicas[0].default = kit.Plan(body=raw)
    ask = {"model": kit.MODEL, "input": "hello"}
    first = await cached.ask(ask, path="/v1/embeddings")
    second = await cached.ask(ask, path="/v1/embeddings")
    assert (second.headers[HEADER], second.body) == ("hit", first.body)
    assert (await _rows(cached))[1] == (Outcome.CACHED, 200, 1, 3, 0, 3)


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        ({}, {}),
        ({"temperature": 0.5}, {}),
        ({"temperature": 0}, {"cache-control": "no-store"}),
        ({"temperature": 0}, {"cache-control": "max-age=1, No-Cache"}),
    ],
)
async def test_what_bypasses_the_cache(
    cached: Any, kit: Any, fields: dict[str, Any], more: dict[str, str]
) -> None:
    for _ in range(2):
        result = await cached.ask(kit.chat_body(**fields), headers={**cached.headers, **more})
        assert (result.status, result.headers[HEADER]) == (200, "bypass")
        assert "etag" not in result.headers
    assert len(cached.replicas[0].requests) == 2
    assert cached.gateway.handler.recall.answers.size_bytes == 0


@pytest.mark.parametrize(("names", "on"), [("", False), ("other", False), ("o, ti*", True)])
async def test_models_are_cached_by_name_alone(kit: Any, names: str, on: bool) -> None:
    async with kit.open_rig(cache_models=names) as rig:
        for _ in range(2):
            result = await rig.ask(_greedy(kit))
            assert (HEADER in result.headers) is on
        assert len(rig.replicas[0].requests) == (1 if on else 2)


@pytest.mark.promise(26)
async def test_a_shared_cache_that_is_away_costs_nobody_an_answer(kit: Any) -> None:
    """Nothing listens at port 9 of this machine."""
    pytest.importorskip("redis")
    async with kit.open_rig(cache_models="*", cache_url="redis://127.0.0.1:9/0") as rig:
        began = time.monotonic()
        asked = [rig.ask(_greedy(kit, seed=number)) for number in range(20)]
        assert {one.status for one in await asyncio.gather(*asked)} == {200}
        assert time.monotonic() - began < 20.0  # 0.2 on a quiet machine
        again = await rig.ask(_greedy(kit, seed=3))
        assert again.headers[HEADER] == "hit"
        assert b"cloudlm_gateway_cache_shared_away 1.0" in rig.gateway.meter.exposition()


async def test_an_answer_ages(kit: Any) -> None:
    async with kit.open_rig(cache_models="*", cache_ttl_s=0.05) as rig:
        await rig.ask(_greedy(kit))
        await asyncio.sleep(0.06)
        assert (await rig.ask(_greedy(kit))).headers[HEADER] == "miss"


async def test_what_is_known_is_billed_as_cached(kit: Any) -> None:
    prices = f"{kit.MODEL}=1000/1/5000"
    async with kit.open_rig(cache_models="*", prices=prices) as rig:
        rig.replicas[0].default = kit.Plan(pause_s=0.5)
        await asyncio.gather(rig.ask(_greedy(kit)), rig.ask(_greedy(kit)))
        await rig.ask(_greedy(kit))
        tag = (await rig.ask(_greedy(kit))).headers["etag"]
        await rig.ask(_greedy(kit), headers={**rig.headers, "if-none-match": tag})
        costs = sorted(row.cost for row in await rig.rows())
        computed = 5 * 1_000_000 + 2 * 1_000 + 5 * 5_000_000
        assert costs == [0, 12_000, 12_000, 12_000, computed]


async def test_what_is_known_counts_against_limits(kit: Any) -> None:
    async with kit.open_rig(cache_models="*") as rig:
        record = rig.gateway.view.snapshot().keys[rig.key_id]
        limited = replace(record, limits=Limits(requests_per_minute=2))
        await rig.state.change_key(limited, replaces=record)
        await rig.gateway.view.refresh()
        said = [await rig.ask(_greedy(kit)) for _ in range(3)]
        assert [one.status for one in said] == [200, 200, 429]
        assert said[1].headers[HEADER] == "hit"
        assert said[1].headers["x-ratelimit-remaining-requests"] == "0"


@pytest.mark.parametrize("stream", [False, True])
async def test_dialects_keep_answers_in_their_own_words(
    cached: Any, kit: Any, stream: bool
) -> None:
    openai = {**_greedy(kit, stream=stream), "max_tokens": 9}
    ollama = {**kit.chat_body(stream=stream), "options": {"temperature": 0, "num_predict": 9}}
    asked = {"/v1/chat/completions": openai, "/v1/messages": openai, "/api/chat": ollama}
    first = [await cached.ask(body, path=path) for path, body in asked.items()]
    again = [await cached.ask(body, path=path) for path, body in asked.items()]
    assert [(one.status, one.headers[HEADER]) for one in first] == [(200, "miss")] * 3
    assert len({one.body for one in first}) == 3
    for one, other in zip(first, again, strict=True):
        assert other.headers[HEADER] == "hit"
        assert other.body == one.body
        assert other.headers["content-type"] == one.headers["content-type"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_comes_when_the_view_is_too_old_is_given_and_lets_all_go(
    cached: Any, kit: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Nobody may wait for it any longer, and what it is the answer of is not known."""
    land = Question._land

    def late(self: Question, *told: Any) -> Any:
        monkeypatch.setattr(cached.gateway.view, "_last_good_view_s", -1.0)
        return land(self, *told)

    with monkeypatch.context() as patched:
        patched.setattr(Question, "_land", late)
        first = await cached.ask(_greedy(kit, stream=stream))
    assert first.status == 200
    assert not cached.gateway.handler.recall.flights
    monkeypatch.setattr(cached.gateway.view, "_last_good_view_s", 3600.0)
    second = await cached.ask(_greedy(kit, stream=stream))
    assert (second.status, second.headers[HEADER]) == (200, "miss")


# Conditions -------------------------------------------------------------------------------------


async def test_a_condition_that_holds_gets_no_body(cached: Any, kit: Any) -> None:
    first = await cached.ask(_greedy(kit))
    assert first.headers["cache-control"] == "private, no-cache"
    assert first.headers["vary"] == "authorization, x-api-key"
    tag = first.headers["etag"]
    again = await cached.ask(_greedy(kit), headers={**cached.headers, "if-none-match": tag})
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
    assert again.headers[HEADER] == "hit"
    assert again.headers["vary"] == "authorization, x-api-key"
    other = await cached.ask(_greedy(kit), headers={**cached.headers, "if-none-match": '"x"'})
    assert (other.status, other.body) == (200, first.body)
    assert (await _rows(cached))[1:] == [
        (Outcome.CACHED, 304, 1, 0, 0, 0),
        (Outcome.CACHED, 200, 1, 7, 5, 7),
    ]


async def test_a_condition_on_what_is_not_known_is_answered(cached: Any, kit: Any) -> None:
    headers = {**cached.headers, "if-none-match": '"long-gone"'}
    assert (await cached.ask(_greedy(kit), headers=headers)).status == 200


# Never across tenants or versions ---------------------------------------------------------------


@pytest.mark.promise(7)
@pytest.mark.known_failure("litellm#29955", "wso2#733", "OmniRoute#3740")
async def test_tenants_never_share_an_answer(cached: Any, kit: Any) -> None:
    theirs = await _key_of(cached, kit, "other")
    first = await cached.ask(_greedy(kit))
    second = await cached.ask(_greedy(kit), headers=theirs)
    assert second.headers[HEADER] == "miss"
    assert len(cached.replicas[0].requests) == 2
    tag = {"if-none-match": first.headers["etag"]}
    assert (await cached.ask(_greedy(kit), headers={**theirs, **tag})).status == 200


async def test_a_key_that_lost_its_rights_gets_nothing(cached: Any, kit: Any) -> None:
    await cached.ask(_greedy(kit))
    await cached.state.revoke_key(cached.key_id, now=2.0)
    await cached.gateway.view.refresh()
    refused = await cached.ask(_greedy(kit))
    assert refused.status == 401
    assert HEADER not in refused.headers


async def _serve_revisions(rig: Any, kit: Any, *revisions: int) -> None:
    url, name = rig.replicas[0].url, rig.replicas[0].name
    found = [Endpoint(kit.MODEL, f"{name}-{r}", url, r) for r in revisions]
    await rig.state.put_endpoints(kit.MODEL, found)
    await rig.gateway.view.refresh()


async def test_a_new_revision_answers_anew(cached: Any, kit: Any) -> None:
    await cached.ask(_greedy(kit))
    await _serve_revisions(cached, kit, 2)
    assert (await cached.ask(_greedy(kit))).headers[HEADER] == "miss"
    await _serve_revisions(cached, kit, 2, 3)
    assert (await cached.ask(_greedy(kit))).headers[HEADER] == "bypass"


async def test_a_deployment_made_again_answers_anew(cached: Any, kit: Any) -> None:
    await cached.ask(_greedy(kit))
    await cached.state.mark_deleting(kit.MODEL, now=2.0)
    assert await cached.state.remove_deployment(kit.MODEL, generation=2)
    await cached.state.put_deployment(DeploymentSpec(kit.MODEL, "models:/m/2"), now=1_800_000_000.0)
    await _serve_revisions(cached, kit, 1)
    assert (await cached.ask(_greedy(kit))).headers[HEADER] == "miss"


async def test_an_answer_that_another_revision_gave_is_not_kept(cached: Any, kit: Any) -> None:
    gate = asyncio.Event()
    cached.replicas[0].plans.append(kit.Plan(gate=gate))
    asking = asyncio.create_task(cached.ask(_greedy(kit)))
    await kit.until(lambda: cached.replicas[0].requests)
    await _serve_revisions(cached, kit, 2)
    gate.set()
    assert "etag" not in (await asking).headers
    assert cached.gateway.handler.recall.answers.size_bytes == 0


async def test_an_answer_of_a_revision_that_came_and_went_is_not_kept(
    cached: Any, kit: Any
) -> None:
    """Asked of revision 1, answered by 2 after a retry, and 1 is back before the end."""
    first, second = asyncio.Event(), asyncio.Event()
    plans = [kit.Plan(gate=first, body=b"{}"), kit.Plan(gate=second)]
    cached.replicas[0].plans.extend(plans)
    asking = asyncio.create_task(cached.ask(_greedy(kit)))
    await kit.until(lambda: len(cached.replicas[0].requests) == 1)
    await _serve_revisions(cached, kit, 2)
    first.set()
    await kit.until(lambda: len(cached.replicas[0].requests) == 2)
    await _serve_revisions(cached, kit, 1)
    second.set()
    answer = await asking
    assert (answer.status, answer.headers["x-cloudlm-attempts"]) == (200, "2")
    assert "etag" not in answer.headers
    assert cached.gateway.handler.recall.answers.size_bytes == 0


@pytest.mark.promise(7)
async def test_tenants_have_keys_of_their_own_for_the_very_same_call(cached: Any, kit: Any) -> None:
    """Even where nothing that a replica is sent tells them apart, as its cache salt does."""
    gateway = cached.gateway
    record = gateway.view.snapshot().keys[cached.key_id]
    model = gateway.view.snapshot().models[kit.MODEL]
    request = cached.request(_greedy(kit))
    call = Call(Operation.CHAT, kit.MODEL, request.body)

    def key(tenant: str) -> bytes:
        exchange = Exchange("r", gateway.handler.recall.clock, gateway.meter)
        exchange.key = replace(record, tenant=tenant)
        return gateway.handler.recall.question(exchange, request, call, model)._place.key

    assert key("one") == key("one") != key("other")


_requests = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 1), st.sampled_from(["a", "b"]), st.booleans()),
    min_size=2,
    max_size=8,
)


@pytest.mark.promise(7)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(_requests)
async def test_a_hit_is_always_the_same_tenants_question_to_the_same_version(
    kit: Any, asked: list[tuple[int, int, str, bool]]
) -> None:
    """Every answer tells who asked what of which version, as its replica knew it."""
    async with kit.open_rig(cache_models="*") as rig:
        tenants = [rig.headers, await _key_of(rig, kit, "other")]
        seen: dict[Any, bytes] = {}
        for tenant, revision, text, stream in asked:
            await _serve_revisions(rig, kit, revision)
            rig.replicas[0].default = kit.Plan(tokens=len(seen) + 1)  # no two answers are equal
            body = _greedy(kit, stream=stream, user=text)
            result = await rig.ask(body, headers=tenants[tenant])
            question = (tenant, revision, text, stream)
            assert result.headers[HEADER] == ("hit" if question in seen else "miss")
            assert result.body == seen.setdefault(question, result.body)
        assert len(set(seen.values())) == len(seen) == len(rig.replicas[0].requests)


# What is never kept -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "stream"),
    [
        ({"kind": "status", "status": 400, "error": {"error": {"message": "no"}}}, False),
        ({"kind": "close"}, False),
        ({"body": b'{"choices": [{"index": 0, "finish_reason": "abort"}]}'}, False),
        ({"kind": "close"}, True),
        ({"cut_byte": 700}, True),
        ({"garbage_at": 3}, True),
        ({"done": False}, True),
    ],
)
async def test_no_failure_is_kept(cached: Any, kit: Any, how: dict[str, Any], stream: bool) -> None:
    cached.replicas[0].plans.append(kit.Plan(**how))
    failed = await cached.ask(_greedy(kit, stream=stream))
    assert failed.status != 200 or failed.error is not None
    assert cached.gateway.handler.recall.answers.size_bytes == 0
    assert not cached.gateway.handler.recall.flights


async def test_a_stream_whose_client_left_is_not_kept(cached: Any, kit: Any) -> None:
    cached.replicas[0].plans.append(kit.Plan(pause_s=0.5))
    response = await cached.gateway.handler.handle(cached.request(_greedy(kit, stream=True)))
    await response.body.__anext__()
    await response.body.aclose()
    assert cached.gateway.handler.recall.answers.size_bytes == 0
    assert not cached.gateway.handler.recall.flights
    assert (await cached.ask(_greedy(kit, stream=True))).headers[HEADER] == "miss"
    cached.assert_nothing_open()


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_too_large_is_not_kept(kit: Any, stream: bool) -> None:
    async with kit.open_rig(cache_models="*", cache_mb=1) as rig:
        rig.replicas[0].default = kit.Plan(tokens=50_000 if not stream else 40, pad=4000)
        for _ in range(2):
            result = await rig.ask(_greedy(kit, stream=stream))
            assert result.headers[HEADER] == "miss"
            assert len(result.body) > 128 * 1024
        assert rig.gateway.handler.recall.answers.size_bytes == 0
        assert not rig.gateway.handler.recall.flights


# One question for many --------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_equal_questions_at_once_are_asked_once(cached: Any, kit: Any, stream: bool) -> None:
    cached.replicas[0].default = kit.Plan(pause_s=0.5)
    results = await asyncio.gather(*(cached.ask(_greedy(kit, stream=stream)) for _ in range(5)))
    said = sorted(result.headers[HEADER] for result in results)
    assert said == ["coalesced"] * 4 + ["miss"]
    assert len({result.body for result in results}) == 1
    assert len(cached.replicas[0].requests) == 1
    rows = await _rows(cached)
    assert rows.count((Outcome.CACHED, 200, 1, 7, 5, 7)) == 4
    assert rows.count((Outcome.FINISHED, 200, 1, 7, 5, 2)) == 1
    cached.assert_nothing_open()
    assert not cached.gateway.handler.recall.flights


async def _behind_a_leader(rig: Any, kit: Any, plan: Any) -> tuple[Any, Any, list[Any]]:
    """A leader that got ``plan``, and two who wait for it."""
    rig.replicas[0].plans.append(plan)
    request = rig.request(_greedy(kit))
    leading = asyncio.create_task(rig.gateway.handler.handle(request))
    await kit.until(lambda: rig.replicas[0].requests)
    waiting = [asyncio.create_task(rig.ask(_greedy(kit))) for _ in range(2)]
    await kit.until(lambda: rig.gateway.admission.total == 3)
    return request, leading, waiting


async def test_a_leader_whose_client_leaves_hands_over(cached: Any, kit: Any) -> None:
    request, leading, waiting = await _behind_a_leader(cached, kit, kit.Plan(kind="silence"))
    request.disconnected.set_result(None)
    await leading
    results = await asyncio.gather(*waiting)
    assert sorted(result.headers[HEADER] for result in results) == ["coalesced", "miss"]
    assert {result.status for result in results} == {200}
    assert len(cached.replicas[0].requests) == 2
    cached.assert_nothing_open()


async def test_a_leader_that_is_cancelled_hands_over(cached: Any, kit: Any) -> None:
    _, leading, waiting = await _behind_a_leader(cached, kit, kit.Plan(kind="silence"))
    leading.cancel()
    results = await asyncio.gather(*waiting)
    assert sorted(result.headers[HEADER] for result in results) == ["coalesced", "miss"]
    assert len(cached.replicas[0].requests) == 2
    cached.assert_nothing_open()


async def test_nobody_gets_a_leaders_error(kit: Any) -> None:
    """All go on by themselves at once: waiting for one another would add up their time limits."""
    async with kit.open_rig(cache_models="*", first_token_timeout_s=1.5, max_attempts=1) as rig:
        rig.replicas[0].default = kit.Plan(pause_s=0.05)
        _, leading, waiting = await _behind_a_leader(rig, kit, kit.Plan(kind="silence"))
        results = await asyncio.gather(*waiting)
        assert (await leading).status == 504
        assert [result.status for result in results] == [200, 200]
        assert [result.headers[HEADER] for result in results] == ["miss", "miss"]
        assert len(rig.replicas[0].requests) == 3
        rig.assert_nothing_open()


async def test_who_waits_can_leave(cached: Any, kit: Any) -> None:
    gate = asyncio.Event()
    _, leading, waiting = await _behind_a_leader(cached, kit, kit.Plan(gate=gate))
    request = cached.request(_greedy(kit))
    leaving = asyncio.create_task(cached.gateway.handler.handle(request))
    await kit.until(lambda: cached.gateway.admission.total == 4)
    request.disconnected.set_result(None)
    assert (await leaving).status == 499
    assert cached.gateway.admission.total == 3
    gate.set()
    assert (await leading).status == 200
    assert [r.headers[HEADER] for r in await asyncio.gather(*waiting)] == ["coalesced"] * 2
    cached.assert_nothing_open()


async def test_a_slow_leader_is_not_waited_for_for_ever(
    cached: Any, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight, "LONGEST_WAIT_S", 0.02)
    leader = await cached.gateway.handler.handle(cached.request(_greedy(kit, stream=True)))
    follower = await cached.ask(_greedy(kit, stream=True))  # the leader's client reads nothing
    assert follower.status == 200 and follower.headers[HEADER] == "miss"
    assert (await cached.finish(leader)).body == follower.body
    assert (await cached.ask(_greedy(kit, stream=True))).headers[HEADER] == "hit"


async def test_nothing_of_a_question_outlives_it(cached: Any, kit: Any) -> None:
    for _ in range(3):
        await cached.ask(_greedy(kit))
    gc.collect()
    # By type: isinstance asks each object for its class, and lazy ones warn when touched.
    assert not [one for one in gc.get_objects() if type(one) is flight.Flight]
