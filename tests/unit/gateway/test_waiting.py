"""Requests for a model at zero: held in order, bounded, until a replica is there or it is late."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.errors import RequestCancelled
from cloudlm.core.tenant import Outcome

pytestmark = pytest.mark.promise(19)

COLD = "cold"


async def deploy(rig: Any, **changes: Any) -> None:
    spec = DeploymentSpec(COLD, "models:/m/1", min_replicas=0, **changes)
    await rig.state.put_deployment(spec, now=1.0)
    await rig.gateway.view.refresh()


async def start(rig: Any, number: int = 0) -> None:
    """A replica of the model is ready."""
    mock = rig.replicas[number]
    await rig.state.put_endpoints(COLD, [Endpoint(COLD, mock.name, mock.url, 1)])
    await rig.gateway.view.refresh()


def held(rig: Any) -> int:
    return int(rig.gateway.admission.queued(COLD))


@pytest.mark.promise(19)
async def test_held_until_a_replica_is_there(rig: Any, kit: Any) -> None:
    await deploy(rig)
    asking = [asyncio.create_task(rig.ask(kit.chat_body(model=COLD))) for _ in range(5)]
    await kit.until(lambda: held(rig) == 5)
    assert not rig.replicas[0].requests
    await start(rig)
    results = await asyncio.gather(*asking)
    assert [one.status for one in results] == [200] * 5
    rows = [row for row in await rig.rows() if row.model == COLD]
    assert [row.outcome for row in rows] == [Outcome.FINISHED] * 5
    rig.assert_nothing_open()


async def test_control_is_told_of_the_first_at_once(rig: Any, kit: Any) -> None:
    await deploy(rig)
    before = await rig.state.demand_mark()
    asking = asyncio.create_task(rig.ask(kit.chat_body(model=COLD)))
    await kit.until(lambda: held(rig) == 1)

    async def told() -> list[Any]:
        found = await rig.state.list_demand(since=before)
        return [one for one in found if one.model == COLD and one.ongoing == 1]

    for _ in range(400):
        if await told():
            break
        await asyncio.sleep(0.005)
    assert await told()
    await start(rig)
    assert (await asking).status == 200


@pytest.mark.promise(19)
async def test_let_go_only_so_many_at_once_and_in_order(kit: Any) -> None:
    async with kit.open_rig(1) as rig:
        await deploy(rig, target_ongoing_requests=2.0)
        rig.replicas[0].default = kit.Plan(pause_s=0.005)
        asking = []
        for number in range(12):
            body = kit.chat_body(model=COLD, messages=[{"role": "user", "content": f"n{number}"}])
            asking.append(asyncio.create_task(rig.ask(body)))
            await kit.until(lambda: held(rig) == number + 1)  # noqa: B023 - awaited at once
        most = 0
        await start(rig)
        while not all(one.done() for one in asking):
            most = max(most, rig.gateway.loads.of(rig.replicas[0].name).ongoing)
            await asyncio.sleep(0)
        assert [one.result().status for one in asking] == [200] * 12
        assert 0 < most <= 2
        sent = [one["messages"][0]["content"] for one in rig.replicas[0].requests]
        order = [int(text.removeprefix("n")) for text in sent]
        assert all(abs(place - number) <= 1 for place, number in enumerate(order))
        await kit.until(lambda: not rig.gateway.waiting.models)
        assert rig.gateway.gate._capacities.of(COLD) == rig.gateway.settings.replica_capacity


@pytest.mark.promise(19)
async def test_a_deadline_that_passes_is_503_and_never_502(kit: Any) -> None:
    async with kit.open_rig(1) as rig:
        await deploy(rig)
        headers = {**rig.headers, "x-cloudlm-deadline-ms": "60"}
        result = await rig.ask(kit.chat_body(model=COLD), headers=headers)
        assert result.status == 503
        assert result.headers["retry-after"]
        assert await rig.rows() == []
        rig.assert_nothing_open()
        await kit.until(lambda: not rig.gateway.waiting.models)


@pytest.mark.promise(19)
async def test_the_settings_bound_the_wait_and_the_number(kit: Any) -> None:
    async with kit.open_rig(1, hold_timeout_s=0.2, max_queued_requests=3) as rig:
        await deploy(rig)
        asking = [asyncio.create_task(rig.ask(kit.chat_body(model=COLD))) for _ in range(5)]
        results = await asyncio.gather(*asking)
        assert [one.status for one in results] == [503] * 5
        said = [one.json["error"]["message"] for one in results]
        assert sum("wait already" in text for text in said) == 2
        assert sum("deadline" in text for text in said) == 3
        rig.assert_nothing_open()


@pytest.mark.promise(19)
async def test_who_goes_away_while_held_frees_everything(rig: Any, kit: Any) -> None:
    await deploy(rig)
    asked = rig.request(kit.chat_body(model=COLD))
    asking = asyncio.create_task(rig.gateway.handler.handle(asked))
    await kit.until(lambda: held(rig) == 1)
    asked.disconnected.set_result(None)
    assert (await asking).status == RequestCancelled.status
    assert await rig.rows() == []
    rig.assert_nothing_open()
    await kit.until(lambda: not rig.gateway.waiting.models)


async def test_a_deleted_model_lets_its_requests_go(rig: Any, kit: Any) -> None:
    await deploy(rig)
    headers = {**rig.headers, "x-cloudlm-deadline-ms": "1000"}
    asking = asyncio.create_task(rig.ask(kit.chat_body(model=COLD), headers=headers))
    await kit.until(lambda: held(rig) == 1)
    await rig.state.mark_deleting(COLD, now=2.0)
    await rig.gateway.view.refresh()
    assert (await asking).status in (404, 503)
    rig.assert_nothing_open()


async def test_a_route_with_another_model_does_not_wait(kit: Any) -> None:
    async with kit.open_rig(1, routes=f"any = {COLD} > {kit.MODEL}") as rig:
        await deploy(rig)
        await rig.ask(kit.chat_body())  # the reporter has begun
        result = await rig.ask(kit.chat_body(model="any"))
        assert result.status == 200
        assert result.headers["x-cloudlm-model"] == kit.MODEL
        demand = {row.model: row for row in rig.gateway.demand.measure()}
        assert demand[COLD].requests_per_s > 0  # and yet it is started


async def test_other_models_are_not_held_up(rig: Any, kit: Any) -> None:
    await deploy(rig)
    asking = asyncio.create_task(rig.ask(kit.chat_body(model=COLD)))
    await kit.until(lambda: held(rig) == 1)
    assert (await rig.ask(kit.chat_body())).status == 200
    await start(rig)
    assert (await asking).status == 200


async def test_demand_in_tokens(rig: Any, kit: Any) -> None:
    await rig.ask(kit.chat_body())  # the reporter has begun
    rig.gateway.demand.measure()
    await rig.ask(kit.chat_body(stream=True, stream_options={"include_usage": True}))
    demand = {row.model: row for row in rig.gateway.demand.measure()}[kit.MODEL]
    assert demand.prompt_tokens_per_s > 0
    assert demand.output_tokens_per_s == 5.0  # of one second at least
    assert demand.finished_per_s == 1.0
    assert demand.computed_tokens_per_s == 5.0  # 7, of which 2 were cached
    assert demand.tpot_s >= 0.0
    again = {row.model: row for row in rig.gateway.demand.measure()}[kit.MODEL]
    assert (again.requests_per_s, again.output_tokens_per_s, again.finished_per_s) == (0, 0, 0)


async def test_where_always_somebody_waits_more_go_in_after_a_while(rig: Any, kit: Any) -> None:
    await deploy(rig, target_ongoing_requests=1.0)
    rig.replicas[0].default = kit.Plan("silence")
    asking = [asyncio.create_task(rig.ask(kit.chat_body(model=COLD))) for _ in range(8)]
    await kit.until(lambda: held(rig) == 8)
    await start(rig)
    await kit.until(lambda: held(rig) == 7)
    waiting = rig.gateway.waiting
    waiting._models[COLD].double_at = 0.0  # that much later
    await kit.until(lambda: held(rig) == 6)
    waiting._models[COLD].double_at = 0.0
    await kit.until(lambda: held(rig) == 4)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
