"""Models under a memory budget: requests for one that is not in memory are held as at zero."""

from __future__ import annotations

import asyncio
from typing import Any

from cloudlm.core.deployment import (
    DeploymentPhase,
    DeploymentSpec,
    DeploymentStatus,
    Endpoint,
    Residence,
)

NAME = "crowded"


async def deploy(rig: Any, residence: Residence, **changes: Any) -> None:
    """A deployment with a replica of its own at least, that control judged so."""
    await rig.state.put_deployment(DeploymentSpec(NAME, "models:/m/1", **changes), now=1.0)
    await judge(rig, residence)


async def judge(rig: Any, residence: Residence) -> None:
    status = DeploymentStatus(NAME, DeploymentPhase.IDLE, 1, 0, 0, residence=residence)
    await rig.state.put_status(status)
    await rig.gateway.view.refresh()


async def test_what_is_not_in_memory_is_held_until_it_is(rig: Any, kit: Any) -> None:
    await deploy(rig, Residence.UNLOADED)
    asking = [asyncio.create_task(rig.ask(kit.chat_body(model=NAME))) for _ in range(3)]
    await kit.until(lambda: int(rig.gateway.admission.queued(NAME)) == 3)
    mock = rig.replicas[0]
    await rig.state.put_endpoints(NAME, [Endpoint(NAME, mock.name, mock.url, 1)])
    await judge(rig, Residence.RESIDENT)
    assert [one.status for one in await asyncio.gather(*asking)] == [200] * 3
    rig.assert_nothing_open()


async def test_a_deadline_that_passes_is_503_with_a_time(rig: Any, kit: Any) -> None:
    await deploy(rig, Residence.WAITING)
    headers = {**rig.headers, "x-cloudlm-deadline-ms": "30"}
    result = await rig.ask(kit.chat_body(model=NAME), headers=headers)
    assert result.status == 503
    assert int(result.headers["retry-after"]) > 0
    rig.assert_nothing_open()


async def test_what_no_budget_concerns_is_refused_as_ever(rig: Any, kit: Any) -> None:
    await deploy(rig, Residence.NONE)
    result = await rig.ask(kit.chat_body(model=NAME))
    assert (result.status, result.json["error"]["code"]) == (503, "no_replica")


async def test_what_can_never_be_loaded_is_said_at_once(rig: Any, kit: Any) -> None:
    await deploy(rig, Residence.TOO_LARGE)
    result = await rig.ask(kit.chat_body(model=NAME))
    assert (result.status, result.json["error"]["code"]) == (503, "model_too_large")
    assert "cloudlm status" in result.json["error"]["message"]
    rig.assert_nothing_open()


async def test_what_was_put_to_sleep_wakes_for_nobody(rig: Any, kit: Any) -> None:
    await deploy(rig, Residence.UNLOADED, asleep=True)
    result = await rig.ask(kit.chat_body(model=NAME))
    assert (result.status, result.json["error"]["code"]) == (503, "model_asleep")
