"""The first replica that requests wait for: its readiness begins a pass, no asking many times."""

from __future__ import annotations

import asyncio

import pytest

from cloudlm.control.lookout import AGAIN_S, Lookout
from cloudlm.control.probe import Sample
from cloudlm.core.clock import ManualClock
from cloudlm.core.deployment import Demand
from cloudlm.core.scaling import Scaling

URL = "http://bank-r1-0.memory.invalid"


class ScriptedAsker:
    """Answers when a test says so; until then it is silent, or ``deaf``: says no at once."""

    def __init__(self):
        self.asked = []
        self.deaf = False
        self.is_ready = asyncio.Event()

    async def ready(self, url, within_s):
        self.asked.append(url)
        if not self.deaf:
            await self.is_ready.wait()
        return self.is_ready.is_set()


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def rig():
    asker, clock, calls = ScriptedAsker(), ManualClock(), []
    lookout = Lookout(asker, clock, lambda: calls.append(True))
    yield asker, clock, calls, lookout
    await lookout.close()


async def test_it_calls_when_the_replica_is_ready_and_asks_once(rig):
    asker, clock, calls, lookout = rig
    lookout.mind({URL})
    await settle()
    lookout.mind({URL})
    await clock.advance(10.0)
    assert (asker.asked, calls) == ([URL], [])
    assert lookout.minds(URL)
    asker.is_ready.set()
    await settle()
    assert calls == [True]
    assert not lookout.minds(URL)
    lookout.mind({URL})  # seen already
    await settle()
    assert (asker.asked, calls) == ([URL], [True])


async def test_who_does_not_answer_yet_is_asked_again(rig):
    asker, clock, calls, lookout = rig
    asker.deaf = True
    lookout.mind({URL})
    await settle()
    for _ in range(3):
        await clock.advance(AGAIN_S)
        await settle()
    assert len(asker.asked) == 4
    asker.is_ready.set()
    await clock.advance(AGAIN_S)
    await settle()
    assert calls == [True]


async def test_who_is_minded_no_more_is_let_be(rig):
    asker, _, calls, lookout = rig
    lookout.mind({URL})
    await settle()
    lookout.mind(set())
    asker.is_ready.set()
    await settle()
    assert calls == []
    lookout.mind({URL})
    await settle()
    assert calls == [True]


async def until(check):
    """The loop reads the registry in a thread: real moments, while ``clock`` stands still."""
    for _ in range(5000):
        if await check():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen")


@pytest.mark.promise(19)
async def test_the_loop_goes_on_the_moment_a_first_replica_is_ready(plane):
    plane.asker = asker = ScriptedAsker()
    plane.prober.default = Sample(True, ready=False)
    plane.restart()
    await plane.ask(min_replicas=0, scaling=Scaling(idle_s=60.0))
    await plane.state.put_demand([Demand("bank", "g1", 1, 1, 1.0, plane.clock.now())])
    running = asyncio.create_task(plane.reconciler.run())

    async def looks_out():
        await plane.clock.advance(0.1)
        return asker.asked == [URL]

    async def serves():
        return await plane.serving() == ["bank-r1-0"]

    try:
        await until(looks_out)
        assert not await serves()
        plane.prober.default = Sample(True, ready=True)
        asker.is_ready.set()
        await until(serves)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await plane.reconciler.close()
