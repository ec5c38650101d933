"""The wall clock jumps: deadlines, limits and durations are counted by another one."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from cloudlm.core import clock as clock_module
from cloudlm.core.access import Limits
from cloudlm.core.tenant import Outcome, Role
from cloudlm.security.keys import mint

DAY_S = 86_400.0


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Moves the wall clock by so many seconds; the other one goes on."""
    moved = SimpleNamespace(by_s=0.0)

    def move(seconds: float) -> None:
        moved.by_s += seconds

    fake = SimpleNamespace(time=lambda: time.time() + moved.by_s, monotonic=time.monotonic)
    monkeypatch.setattr(clock_module, "time", fake)
    return move


@pytest.mark.promise(41)
@pytest.mark.parametrize("seconds", [400 * DAY_S, -400 * DAY_S])
async def test_a_jump_ends_no_stream_and_no_wait(kit: Any, jump: Any, seconds: float) -> None:
    async with kit.open_rig(replica_capacity=1, queue_timeout_s=60.0) as rig:
        (replica,) = rig.replicas
        replica.plans.append(kit.Plan(tokens=6, pause_s=0.02))
        first = await rig.gateway.handler.handle(rig.request(kit.chat_body(stream=True)))
        waiting = asyncio.create_task(rig.ask(kit.chat_body()))
        await kit.until(lambda: rig.gateway.gate.waiting, 30.0)
        jump(seconds)
        result = await rig.finish(first)
        assert (result.tokens, result.events[-1]) == (6, "[DONE]")
        assert (await waiting).status == 200
        rows = await rig.rows()
        assert [row.outcome for row in rows] == [Outcome.FINISHED] * 2
        assert all(0.0 <= row.duration_s < DAY_S for row in rows)
        assert all(0.0 <= (row.first_token_s or 0.0) < DAY_S for row in rows)
        rig.assert_nothing_open()


@pytest.mark.promise(41, 22)
@pytest.mark.parametrize("seconds", [400 * DAY_S, -400 * DAY_S])
async def test_a_jump_gives_no_limit_back(kit: Any, jump: Any, seconds: float) -> None:
    async with kit.open_rig() as rig:
        limits = Limits(requests_per_minute=1)
        minted = mint("one", Role.USER, kit.PEPPER, 1.0, limits=limits)
        await rig.state.put_key(minted.record)
        await rig.gateway.view.refresh()
        headers = {"authorization": f"Bearer {minted.text}"}
        assert (await rig.ask(kit.chat_body(), headers=headers)).status == 200
        jump(seconds)
        refused = await rig.ask(kit.chat_body(), headers=headers)
        assert refused.status == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 65


@pytest.mark.promise(41, 28)
async def test_a_jump_ends_no_distrust(kit: Any, jump: Any) -> None:
    async with kit.open_rig(replicas=2) as rig:
        bad, good = rig.replicas
        bad.default = kit.Plan("status", status=503, headers={"Retry-After": "60"})
        for _ in range(4):
            assert (await rig.ask(kit.chat_body())).status == 200
        assert len(bad.requests) == 1
        jump(400 * DAY_S)
        for _ in range(4):
            assert (await rig.ask(kit.chat_body())).status == 200
        assert (len(bad.requests), len(good.requests)) == (1, 8)
