"""Following the state, and what happens when it is away."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cloudlm.core.clock import ManualClock
from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.errors import ModelNotFound, Unavailable
from cloudlm.core.tenant import Role
from cloudlm.gateway.admission import Admission, Ticket
from cloudlm.gateway.demand import DemandReporter
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.meter import Meter
from cloudlm.gateway.view import LOOK_INTERVAL_S, View
from cloudlm.security.keys import mint
from cloudlm.state.memory import MemoryState

KEY = mint("k", Role.USER, b"p" * 32, 1.0).record


class CountingState(MemoryState):
    """Counts full readings; away when told to be."""

    away = False
    readings = 0
    versions_asked = 0

    async def version(self) -> int:
        self.versions_asked += 1
        if self.away:
            raise Unavailable("away")
        return await super().version()

    async def list_keys(self) -> Any:
        self.readings += 1
        return await super().list_keys()


async def test_a_look_again_sees_what_was_just_made_and_is_shared() -> None:
    state, clock = CountingState(), ManualClock()
    view = View(state, clock)
    await view.refresh()
    await clock.advance(1.0)
    minted = mint("k", Role.USER, b"p" * 32, 1.0)
    await state.put_key(minted.record)
    assert minted.record.id not in view.snapshot().keys
    asking = [asyncio.create_task(view.look_again()) for _ in range(50)]
    for _ in range(10):  # until the second look waits for its distance to the first
        await asyncio.sleep(0)
    await clock.advance(1.0)
    for snapshot in await asyncio.gather(*asking):
        assert minted.record.id in snapshot.keys
    assert state.versions_asked == 3  # the first asker's, and one for all that asked meanwhile


async def test_looks_keep_their_distance() -> None:
    state, clock = CountingState(), ManualClock()
    view = View(state, clock)
    await view.refresh()
    waiting = asyncio.create_task(view.look_again())
    await clock.advance(LOOK_INTERVAL_S / 2)
    assert (waiting.done(), state.versions_asked) == (False, 1)
    await clock.advance(LOOK_INTERVAL_S / 2)
    await waiting
    assert state.versions_asked == 2


@pytest.mark.promise(26)
async def test_a_look_again_with_the_state_away_keeps_the_last_picture() -> None:
    state, clock = CountingState(), ManualClock()
    view = View(state, clock)
    await view.refresh()
    await clock.advance(1.0)
    state.away = True
    assert (await view.look_again()) is view.snapshot()


async def test_follows_changes_and_reads_only_then() -> None:
    state, clock = CountingState(), ManualClock()
    view = View(state, clock)
    assert not view.ready
    with pytest.raises(Unavailable):
        view.snapshot()
    seen: list[int] = []
    view.on_change.append(lambda snapshot: seen.append(snapshot.version))
    assert await view.refresh()
    assert await view.refresh()
    assert state.readings == 1
    await state.put_deployment(DeploymentSpec("m", "models:/m/1"), now=5.0)
    await state.put_endpoints("m", [Endpoint("m", "r1", "http://h", 1)])
    minted = mint("k", Role.USER, b"p" * 32, 1.0)
    await state.put_key(minted.record)
    assert await view.refresh()
    assert state.readings == 2
    model = view.snapshot().model("m", minted.record)
    assert (model.created_at, [e.replica for e in model.endpoints]) == (5.0, ["r1"])
    assert view.snapshot().keys[minted.record.id] == minted.record
    assert len(seen) == 2
    await state.mark_deleting("m", now=6.0)
    await view.refresh()
    with pytest.raises(ModelNotFound, match="nothing is deployed"):
        view.snapshot().model("m", minted.record)


@pytest.mark.promise(26)
async def test_last_good_view_serves_for_a_stated_time() -> None:
    state, clock = CountingState(), ManualClock()
    view = View(state, clock, last_good_view_s=100.0)
    await view.refresh()
    state.away = True
    await clock.advance(99.0)
    assert not await view.refresh()
    assert view.ready
    view.snapshot()
    await clock.advance(2.0)
    assert not view.ready
    with pytest.raises(Unavailable, match="100 s"):
        view.snapshot()
    state.away = False
    assert await view.refresh()
    assert view.age_s == 0.0
    view.snapshot()


async def test_unknown_models_are_named_within_bounds() -> None:
    state = MemoryState()
    for number in range(50):
        await state.put_deployment(DeploymentSpec(f"m{number:02d}", "models:/m/1"), now=1.0)
    view = View(state, ManualClock())
    await view.refresh()
    with pytest.raises(ModelNotFound) as error:
        view.snapshot().model("x" * 5000, KEY)
    assert "m00, m01" in error.value.message
    assert len(error.value.message) < 400


async def test_demand() -> None:
    state, clock = MemoryState(), ManualClock()
    await state.put_deployment(DeploymentSpec("m", "models:/m/1"), now=1.0)
    await state.put_endpoints("m", [Endpoint("m", "r1", "http://h", 1)])
    view, admission, loads = View(state, clock), Admission(10, 10), Loads()
    await view.refresh()
    demand = DemandReporter("host:8000", state, view, admission, loads, clock)
    for _ in range(4):
        demand.count("m")
    admission.enter(Ticket("m", "t"), 10, 0.0)
    admission.enter(Ticket("m", "t"), 10, 0.0)
    loads.begin("r1")
    await clock.advance(2.0)
    assert await demand.report()
    (told,) = await state.list_demand(since=0.0)
    assert (told.model, told.gateway) == ("m", "host:8000")
    assert (told.ongoing, told.queued, told.requests_per_s) == (2, 1, 2.0)
    assert told.measured_at == clock.now()
    await clock.advance(1.0)
    await demand.report()
    (told,) = await state.list_demand(since=0.0)
    assert told.requests_per_s == 0.0


def test_meter() -> None:
    from cloudlm.core.tenant import Outcome

    meter = Meter()
    meter.entered("m")
    meter.attempt_ended("m", Outcome.FAILED, 0, 0)
    meter.retried("m")
    meter.attempt_ended("m", Outcome.FINISHED, 7, 5)
    meter.first_token("m", 0.02)
    meter.left("m")
    meter.request_ended("m", Outcome.FINISHED, 200, 0.3)
    meter.watch("cloudlm_gateway_test_age_seconds", "A test.", lambda: 4.0)
    text = meter.exposition().decode()
    for line in (
        'cloudlm_gateway_requests_total{model="m",outcome="finished",status="200"} 1.0',
        'cloudlm_gateway_attempts_total{model="m",outcome="failed"} 1.0',
        'cloudlm_gateway_retries_total{model="m"} 1.0',
        'cloudlm_gateway_tokens_total{kind="completion",model="m"} 5.0',
        'cloudlm_gateway_tokens_total{kind="prompt",model="m"} 7.0',
        'cloudlm_gateway_requests_ongoing{model="m"} 0.0',
        'cloudlm_gateway_time_to_first_token_seconds_count{model="m"} 1.0',
        "cloudlm_gateway_test_age_seconds 4.0",
    ):
        assert line in text
