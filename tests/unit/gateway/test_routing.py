"""Policies through the whole gateway, as a deployment asks for them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.routing import Policy, Routing
from cloudlm.core.tenant import Outcome


async def routed(rig: Any, kit: Any, routing: Routing) -> None:
    spec = DeploymentSpec(kit.MODEL, "models:/m/1", routing=routing)
    await rig.state.put_deployment(spec, now=2.0)
    await rig.gateway.view.refresh()


async def who_answered(rig: Any, kit: Any, times: int, **how: Any) -> list[str]:
    results = [await rig.ask(kit.chat_body(), **how) for _ in range(times)]
    assert {one.status for one in results} == {200}
    return [one.headers["x-cloudlm-replica"] for one in results]


async def test_a_deployment_chooses_its_policy_and_changes_it_live(kit: Any) -> None:
    async with kit.open_rig(3) as rig:
        await routed(rig, kit, Routing(Policy.ROUND_ROBIN))
        assert len(set(await who_answered(rig, kit, 3))) == 3
        result = await rig.ask(kit.chat_body())
        assert result.headers["x-cloudlm-route"].startswith("round-robin; ")
        await routed(rig, kit, Routing(Policy.SESSION_AFFINITY))
        mine = {**rig.headers, "x-session-id": "a"}
        assert len(set(await who_answered(rig, kit, 6, headers=mine))) == 1
        rig.assert_nothing_open()


async def test_sessions_by_header_user_and_cache_key(kit: Any) -> None:
    async with kit.open_rig(3) as rig:
        await routed(rig, kit, Routing(Policy.SESSION_AFFINITY, "x-chat"))
        for number in range(5):
            by_header = await rig.ask(
                kit.chat_body(), headers={**rig.headers, "x-chat": f"s{number}"}
            )
            by_user = await rig.ask(kit.chat_body(user=f"s{number}"))
            by_key = await rig.ask(kit.chat_body(prompt_cache_key=f"s{number}", user="other"))
            found = {r.headers["x-cloudlm-replica"] for r in (by_header, by_user, by_key)}
            assert len(found) == 1


async def test_power_of_two_draws(kit: Any) -> None:
    async with kit.open_rig(4) as rig:
        await routed(rig, kit, Routing(Policy.POWER_OF_TWO))
        assert len(set(await who_answered(rig, kit, 60))) == 4  # fails once in 10**7 runs


@pytest.mark.promise(27)
async def test_a_dead_replica_is_tried_by_one_request_at_a_time(kit: Any) -> None:
    """When its distrust is over, one request finds out; the others go elsewhere."""
    async with kit.open_rig(3) as rig:
        await routed(rig, kit, Routing(Policy.ROUND_ROBIN))
        bad = rig.replicas[0]
        bad.plans.append(kit.Plan(kind="status", status=500))
        await who_answered(rig, kit, 3)
        assert len(bad.requests) == 1
        rig.gateway.loads.of(bad.name).suspect_until = 0.0  # its time is over
        gate = asyncio.Event()
        bad.plans.append(kit.Plan(gate=gate))
        probe = asyncio.create_task(rig.ask(kit.chat_body()))
        await kit.until(lambda: len(bad.requests) == 2)
        assert bad.name not in await who_answered(rig, kit, 6)
        gate.set()
        assert (await probe).headers["x-cloudlm-replica"] == bad.name
        assert rig.gateway.loads.of(bad.name).failures == 0
        rig.assert_nothing_open()


@pytest.mark.promise(8, 27)
async def test_all_failing_is_a_panic_and_attempts_stay_few(kit: Any) -> None:
    """Correlated 5xx spread over all replicas, within the retry budget."""
    async with kit.open_rig(4) as rig:
        for one in rig.replicas:
            one.default = kit.Plan(kind="status", status=500)
        results = [await rig.ask(kit.chat_body()) for _ in range(60)]
        assert {one.status for one in results} == {500}
        rows = await rig.rows()
        assert len(rows) <= 1.2 * 60
        assert {row.outcome for row in rows} == {Outcome.FAILED}
        assert min(len(one.requests) for one in rig.replicas) >= 10
        for one in rig.replicas:
            one.default = kit.Plan()
        assert (await rig.ask(kit.chat_body())).status == 200


@pytest.mark.promise(27)
async def test_that_nobody_is_awake_is_said_at_once(rig: Any, kit: Any) -> None:
    await rig.state.put_endpoints(kit.MODEL, [Endpoint(kit.MODEL, "x", "http://h:1", 1, 0.0)])
    await rig.gateway.view.refresh()
    result = await rig.ask(kit.chat_body())
    assert (result.status, result.json["error"]["code"]) == (503, "model_asleep")
    assert "retry-after" not in result.headers  # no request wakes it
