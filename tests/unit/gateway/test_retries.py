"""Whom a retry goes to: who is left when the wait before it is over."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.clock import Clock
from cloudlm.core.deployment import Endpoint
from cloudlm.core.routing import Policy
from cloudlm.gateway import retry
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.ranking import RANKED_FROM
from cloudlm.gateway.router import choose, may_retry
from cloudlm.gateway.split import choose_side


class HeldClock:
    """A clock whose sleepers all wait until they are let go."""

    def __init__(self, clock: Clock) -> None:
        self.now, self.monotonic = clock.now, clock.monotonic
        self.sleeping = 0
        self.go = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.sleeping += 1
        await self.go.wait()


def held(rig: Any) -> HeldClock:
    """The clock that the rig's handler has from now on."""
    errands = rig.gateway.handler.errands
    clock = HeldClock(errands._rooms.clock)
    errands._rooms = replace(errands._rooms, clock=clock)
    return clock


async def test_who_asks_for_time_during_the_wait_gets_no_retry(kit: Any) -> None:
    async with kit.open_rig(3) as rig:
        clock, loads = held(rig), rig.gateway.loads
        for mock in rig.replicas:
            mock.plans.append(kit.Plan("status", status=500))
        asking = asyncio.create_task(rig.ask(kit.chat_body()))
        await kit.until(lambda: clock.sleeping)
        failed = next(mock for mock in rig.replicas if mock.requests)
        there = rig.gateway.view.snapshot().models[kit.MODEL].endpoints
        now = clock.monotonic()
        first = choose(there, loads, now, tried={failed.name}, retrying=True)
        assert first is not None
        (ill,) = [mock for mock in rig.replicas if mock.name == first.replica]
        (well,) = [mock for mock in rig.replicas if mock not in (failed, ill)]
        well.plans.clear()
        loads.cool(ill.name, now + 3600.0)
        clock.go.set()
        result = await asking
        assert (result.status, result.headers["x-cloudlm-replica"]) == (200, well.name)
        assert not ill.requests
        rig.assert_nothing_open()


async def test_nobody_is_left_when_the_wait_is_over(kit: Any) -> None:
    """The last replica's verdict stands."""
    async with kit.open_rig(2) as rig:
        clock = held(rig)
        for mock in rig.replicas:
            mock.default = kit.Plan("status", status=500)
        asking = asyncio.create_task(rig.ask(kit.chat_body()))
        await kit.until(lambda: clock.sleeping)
        for mock in rig.replicas:
            rig.gateway.loads.cool(mock.name, clock.monotonic() + 3600.0)
        clock.go.set()
        assert (await asking).status == 500
        assert sum(len(mock.requests) for mock in rig.replicas) == 1
        rig.assert_nothing_open()


async def test_requests_that_fail_together_go_to_all_who_are_left(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen before the wait, none of them counts for the others: all would get the same one."""
    monkeypatch.setattr(retry, "BUDGET_SHARE", 1.0)
    async with kit.open_rig(4) as rig:
        clock = held(rig)
        dying, *others = rig.replicas
        dying.default = kit.Plan(gate=asyncio.Event(), body=b"no answer")
        endpoints = [Endpoint(kit.MODEL, mock.name, mock.url, 1) for mock in rig.replicas]
        await rig.state.put_endpoints(kit.MODEL, endpoints[:1])
        await rig.gateway.view.refresh()
        asking = [asyncio.create_task(rig.ask(kit.chat_body())) for _ in range(12)]
        await kit.until(lambda: dying.active == 12)
        await rig.state.put_endpoints(kit.MODEL, endpoints)
        await rig.gateway.view.refresh()
        dying.default.gate.set()
        await kit.until(lambda: clock.sleeping == 12)
        clock.go.set()
        assert [one.status for one in await asyncio.gather(*asking)] == [200] * 12
        assert [len(mock.requests) for mock in others] == [4, 4, 4]
        rig.assert_nothing_open()


FACTS = st.tuples(
    st.sampled_from([0.0, 1.0, 2.0]), st.integers(0, 2), st.integers(1, 3), st.sampled_from("wfcrt")
)


@given(
    st.lists(FACTS, max_size=2 * RANKED_FROM),
    st.sampled_from(Policy),
    st.floats(0.0, 1.0, exclude_max=True),
    st.booleans(),
)
def test_a_look_says_whether_a_choice_finds_somebody(
    facts: list[tuple[float, int, int, str]], policy: Policy, draw: float, split: bool
) -> None:
    loads, tried, endpoints = Loads(), set(), []
    for number, (weight, priority, revision, fate) in enumerate(facts):
        one = Endpoint("m", f"e{number}", "http://127.0.0.1:1", revision, weight, priority=priority)
        endpoints.append(replace(one, share=0.5) if split else one)
        if fate in "fr":
            loads.failed(one.replica, 0.0, unreachable=fate == "r")
        elif fate == "c":
            loads.cool(one.replica, 60.0)
        elif fate == "t":
            tried.add(one.replica)
    among = functools.partial(choose_side, mark=draw) if split else choose
    found = among(
        tuple(endpoints), loads, 0.5, tried=tried, retrying=True, policy=policy, draws=(draw, draw)
    )
    assert may_retry(endpoints, loads, 0.5, tried) == (found is not None)


@pytest.mark.promise(28)
async def test_what_another_gateway_was_told_holds_here(kit: Any) -> None:
    """Of replicas that serve here; of others nothing is kept, whoever speaks of them."""
    async with kit.open_rig(replicas=2) as rig:
        first, second = rig.replicas
        rig.gateway._left_alone(first.name, 60.0)
        rig.gateway._left_alone("no-such-replica", 60.0)
        for _ in range(4):
            assert (await rig.ask(kit.chat_body())).status == 200
        assert (len(first.requests), len(second.requests)) == (0, 4)
        assert "no-such-replica" not in rig.gateway.loads._loads


@pytest.mark.promise(28)
async def test_others_are_told_what_a_replica_asks_for(kit: Any) -> None:
    async with kit.open_rig(replicas=2) as rig:
        told: list[tuple[str, float]] = []
        others = SimpleNamespace(tell=lambda *what: told.append(what))
        rig.gateway._cooling.append(others)
        plan = kit.Plan("status", status=429, headers={"retry-after": "7"})
        for replica in rig.replicas:
            replica.plans.append(plan)
        await rig.ask(kit.chat_body())
        asked = {replica.name for replica in rig.replicas if replica.requests}
        assert {name for name, _ in told} == asked
        assert {wait_s for _, wait_s in told} == {7.0}
