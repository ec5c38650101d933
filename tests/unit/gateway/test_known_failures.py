"""What users of other gateways reported, done to ours. The ids are those of their reports."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import Any

import pytest

from cloudlm.core.access import Grant, Principal, PrincipalKind, Project, Tenant
from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.tenant import Outcome, Role
from cloudlm.security.keys import mint

FAULTS: dict[str, dict[str, Any]] = {
    "refused": {"kind": "close"},
    "cut before content": {"cut_byte": 150},
    "stalled": {"stall_at": 0},
    "stalled after the role": {"stall_at": 1},
    "one malformed event": {"garbage_at": 1},
    "a failure inside": {"error": {"error": {"message": "boom", "type": "server_error"}}},
    "an end that says nothing": {"error": {"choices": [], "usage": None}},
    "no stream at all": {"kind": "status", "body": b"null"},
    "an empty answer": {"kind": "status", "body": b""},
}


@pytest.mark.promise(4)
@pytest.mark.known_failure("litellm#40404", "litellm#36768", "litellm#42724")
@pytest.mark.parametrize("fault", FAULTS)
async def test_the_fallback_gets_what_the_first_model_could_not_answer(
    kit: Any, fault: str
) -> None:
    patience = {"first_token_timeout_s": 1.0, "idle_timeout_s": 1.0}
    waits = patience if "stalled" in fault else {}
    async with kit.open_rig(2, routes="chat = small > large", **waits) as rig:
        for name, mock in zip(("small", "large"), rig.replicas, strict=True):
            await rig.state.put_deployment(DeploymentSpec(name, "models:/m/1"), now=3.0)
            await rig.state.put_endpoints(name, [Endpoint(name, mock.name, mock.url, 1)])
        await rig.gateway.view.refresh()
        small, large = rig.replicas
        small.default = kit.Plan(**FAULTS[fault])
        result = await rig.ask(kit.chat_body(model="chat", stream=True))
        assert result.status == 200
        assert (result.tokens, result.events[-1]) == (5, "[DONE]")
        assert len(large.requests) == 1
        assert [row.completion_tokens for row in await rig.rows()] in ([0, 5], [5, 0])
        large.default = small.default
        rig.gateway.loads.answered(small.name)
        nobody = await rig.ask(kit.chat_body(model="chat", stream=True))
        assert nobody.status >= 429  # a true status, not an empty answer that ends in stop
        assert nobody.json["error"]["message"]
        rig.assert_nothing_open()


@pytest.mark.promise(8, 28)
@pytest.mark.known_failure("experientiallabs#946")
async def test_a_replica_that_asks_for_time_costs_the_others_customers_nothing(kit: Any) -> None:
    """One of two replicas answers 429 for a while: nobody hears of it, and it is left alone."""
    async with kit.open_rig(replicas=2) as rig:
        limited, good = rig.replicas
        limited.default = kit.Plan("status", status=429, headers={"Retry-After": "30"})
        told = Counter()
        for _ in range(20):
            results = await asyncio.gather(*(rig.ask(kit.chat_body()) for _ in range(5)))
            told.update(result.status for result in results)
        # In the first moment all five may be on their way before the first refusal is back, and of
        # them the budget lets three be tried again.
        assert told[200] >= 98
        assert set(told) <= {200, 429}
        assert len(limited.requests) <= 5
        assert len(good.requests) == told[200]


@pytest.mark.promise(8)
@pytest.mark.known_failure("experientiallabs#946")
async def test_refusals_of_a_provider_are_not_multiplied(kit: Any) -> None:
    """Every replica answers 429: each request hears it once, and few are sent twice."""
    async with kit.open_rig(replicas=4) as rig:
        for replica in rig.replicas:
            replica.default = kit.Plan("status", status=429, headers={"Retry-After": "1"})
        results = [await rig.ask(kit.chat_body()) for _ in range(105)]
        assert {result.status for result in results} == {429}
        assert all(result.headers["retry-after"] == "1" for result in results)
        attempts = sum(len(replica.requests) for replica in rig.replicas)
        assert attempts <= 1.2 * 105
        assert len(await rig.rows()) == attempts


@pytest.mark.promise(40)
@pytest.mark.known_failure("litellm#6404")
async def test_a_stream_takes_no_threads(rig: Any, kit: Any) -> None:
    rig.replicas[0].default = kit.Plan(tokens=200)
    await rig.ask(kit.chat_body(stream=True))
    before = threading.active_count()
    response = await rig.gateway.handler.handle(rig.request(kit.chat_body(stream=True)))
    most = before
    async for _ in response.body:
        most = max(most, threading.active_count())
    await response.body.aclose()
    assert most == before


@pytest.mark.promise(7, 3)
@pytest.mark.known_failure("PYSEC-2026-4198")
async def test_what_a_caller_names_is_no_key_of_ours(kit: Any) -> None:
    """Two tenants with the same request id, salt, user and session have two questions, two answers
    and two rows."""
    async with kit.open_rig(cache_models="*") as rig:
        holder = Principal(
            "p", "p", PrincipalKind.SERVICE, "acme", grants=(Grant("user", "acme", "root"),)
        )
        for fact in (Tenant("acme"), Project("acme", "default"), holder):
            await rig.state.put_identity(fact)
        other = mint("other", Role.USER, kit.PEPPER, 1.0, tenant="acme", principal="p")
        await rig.state.put_key(other.record)
        await rig.gateway.view.refresh()
        same = {"x-request-id": "same", "x-session-id": "same"}
        body = kit.chat_body(temperature=0, user="same", cache_salt="same", seed=1)
        results = []
        for key in (rig.key, other.text, rig.key):
            headers = {"authorization": f"Bearer {key}", **same}
            results.append(await rig.ask(body, headers=headers))
        assert [result.headers["x-cloudlm-cache"] for result in results] == ["miss", "miss", "hit"]
        asked = rig.replicas[0].requests
        assert len(asked) == 2
        assert asked[0]["cache_salt"] != asked[1]["cache_salt"]
        rows = await rig.rows()
        assert len({row.id for row in rows}) == 3
        assert Counter(row.tenant for row in rows) == {"default": 2, "acme": 1}
        assert Counter(row.outcome for row in rows)[Outcome.CACHED] == 1
