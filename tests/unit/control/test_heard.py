"""Gateways' clocks are wrong in every way: what they report counts for as long as it is new."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.control.heard import FRESH_S, GONE_S, Ear, noticed
from cloudlm.core.clock import ManualClock
from cloudlm.core.deployment import Demand
from cloudlm.core.errors import StorageFailed
from cloudlm.core.scaling import Scaling
from cloudlm.state.memory import MemoryState

HOUR = 3600.0
SOON = Scaling(idle_s=5.0)


def report(at, gateway="g1", ongoing=1, model="bank"):
    return Demand(model, gateway, ongoing, ongoing, float(ongoing), at)


class Desk:
    """An ear, and the gateways that it hears; each has a clock that is ``wrong`` by so much."""

    def __init__(self, state=None):
        self.clock = ManualClock()
        self.state = state or MemoryState()
        self.wrong = {}
        self.restart()

    def restart(self):
        self.ear = Ear(self.state, self.clock)

    async def tell(self, gateway, ongoing=1):
        at = self.clock.now() + self.wrong.get(gateway, 0.0)
        await self.state.put_demand([report(at, gateway, ongoing)])

    async def fresh(self):
        return [one.gateway for one in await self.ear.fresh()]


# What counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong_s", [-HOUR, -11.0, 0.0, 11.0, HOUR])
async def test_who_reports_is_heard_by_whatever_clock(wrong_s):
    desk = Desk()
    assert await desk.fresh() == []
    desk.wrong["g1"] = wrong_s
    for _ in range(3):
        await desk.tell("g1")
        assert await desk.fresh() == ["g1"]
        await desk.clock.advance(1.0)


async def test_who_died_with_a_clock_ahead_is_forgotten_as_soon_as_others():
    desk = Desk()
    await desk.fresh()
    desk.wrong["ahead"] = HOUR
    await desk.tell("ahead")
    await desk.tell("right")
    assert await desk.fresh() == ["ahead", "right"]
    await desk.clock.advance(FRESH_S)
    assert await desk.fresh() == ["ahead", "right"]
    await desk.clock.advance(0.1)
    assert await desk.fresh() == []


async def test_a_clock_that_jumps_makes_no_report_older_or_newer():
    desk = Desk()
    await desk.fresh()
    for wrong_s in (0.0, HOUR, -HOUR):
        desk.wrong["g1"] = wrong_s
        await desk.tell("g1")
        assert await desk.fresh() == ["g1"]
        await desk.clock.advance(1.0)


@pytest.mark.parametrize("wrong_s", [-FRESH_S, -3.0, 0.0, FRESH_S])
async def test_a_new_control_believes_a_date_that_is_near(wrong_s):
    desk = Desk()
    desk.wrong["g1"] = wrong_s
    await desk.tell("g1")
    assert await desk.fresh() == ["g1"]
    await desk.clock.advance(FRESH_S + min(wrong_s, 0.0))
    assert await desk.fresh() == ["g1"], "it was as old as it says, or new"
    await desk.clock.advance(0.1)
    assert await desk.fresh() == []


@pytest.mark.parametrize("wrong_s", [-HOUR, -10.1, 10.1, HOUR])
async def test_a_new_control_hears_others_once_they_report_again(wrong_s):
    desk = Desk()
    desk.wrong["g1"] = wrong_s
    await desk.tell("g1")
    for _ in range(3):
        assert await desk.fresh() == []
    await desk.clock.advance(1.0)
    await desk.tell("g1")
    assert await desk.fresh() == ["g1"]
    desk.restart()
    assert await desk.fresh() == []


looks = st.lists(
    st.tuples(st.floats(0.0, 15.0), st.sets(st.sampled_from(["a", "b", "c"]))), max_size=12
)
offsets = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.floats(-1e5, 1e5))


@given(looks, offsets)
def test_after_the_first_look_no_clock_makes_a_difference(looks, offsets):
    def heard(wrong):
        known, rows, now, said = noticed(None, [], 0.0, 1e9), {}, 0.0, []
        for number, (later_s, who) in enumerate(looks):
            now += later_s
            for one in who:  # each report says something else
                rows[one] = report(1e9 + now + wrong.get(one, 0.0), one, ongoing=number)
            known = noticed(known, list(rows.values()), now, 1e9 + now)
            said.append([key for key, one in known.items() if one.fresh(now)])
        return said

    assert heard({}) == heard(offsets)


# Who is gone --------------------------------------------------------------------------------------


async def test_reports_of_gateways_long_gone_are_dropped_by_nobodys_date_but_ones_own_clock():
    desk = Desk()
    desk.wrong["ahead"], desk.wrong["behind"] = HOUR, -HOUR
    for name in ("gone", "ahead", "behind"):
        await desk.tell(name)
    for _ in range(int(GONE_S / 10) + 2):
        await desk.fresh()
        await desk.clock.advance(10.0)
        await desk.tell("ahead")
        await desk.tell("behind")
    stored = await desk.state.list_demand(since=0.0)
    assert [one.gateway for one in stored] == ["ahead", "behind"]


async def test_a_store_that_drops_nothing_now_hinders_nobody():
    class Stuck(MemoryState):
        async def drop_demand(self, demand):
            raise StorageFailed("the disk is full")

    desk = Desk(Stuck())
    await desk.tell("gone")
    await desk.fresh()
    await desk.clock.advance(GONE_S + 1.0)
    await desk.tell("here")
    assert await desk.fresh() == ["here"]


# In control ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong_s", [-HOUR, HOUR])
async def test_a_request_at_a_gateway_with_a_wrong_clock_starts_a_replica(plane, wrong_s):
    await plane.ask(min_replicas=0, scaling=SOON)
    await plane.steps(2)
    for _ in range(3):
        await plane.state.put_demand([report(plane.clock.now() + wrong_s)])
        await plane.steps(1)
    assert len(plane.running()) == 1


async def test_what_a_dead_gateway_with_a_clock_ahead_said_holds_no_replica(plane):
    await plane.ask(min_replicas=0, scaling=SOON)
    await plane.steps(2)
    await plane.state.put_demand([report(plane.clock.now() + HOUR, "dead")])
    for _ in range(150):
        await plane.state.put_demand([report(plane.clock.now(), "well", ongoing=0)])
        await plane.steps(1, seconds=1.0)
    assert plane.running() == []


async def test_after_a_step_back_news_of_a_first_request_ends_the_pause_at_once(plane):
    await plane.ask(min_replicas=0)
    await plane.state.put_demand([report(plane.clock.now() + HOUR, ongoing=0)])
    await plane.steps(2)
    pause = asyncio.create_task(plane.reconciler._scaler.pause(60.0))
    await asyncio.sleep(0)
    await plane.clock.advance(1.0)
    assert not pause.done()
    await plane.state.put_demand([report(plane.clock.now())])
    await plane.clock.advance(1.0)
    assert pause.done()


async def test_a_pace_is_learnt_after_a_step_back_too(plane):
    await plane.ask(scaling=Scaling())
    await plane.steps(2)
    done = replace(report(0.0), finished_per_s=1.0, output_tokens_per_s=50.0)
    done = replace(done, computed_tokens_per_s=90.0, ttft_s=0.1, tpot_s=0.02, queued=0)
    for number in range(4):
        at = plane.clock.now() + (HOUR if number < 2 else 0.0)
        await plane.state.put_demand([replace(done, measured_at=at, tpot_s=0.02 * (number + 1))])
        await plane.steps(1)
    assert plane.reconciler._scaler._memory["bank"].tpot_s == pytest.approx(0.08)
