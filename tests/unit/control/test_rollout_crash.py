"""A control that is killed after any write or order goes on where it was: same end, nothing started
twice, nobody stopped who is asked, and always enough replicas to answer."""

from __future__ import annotations

import random

import pytest
from rolling_world import STRATEGIES, Answers, Killed, Kills, MortalState, mortal_driver, takes

from cloudlm.core.rollout import Kind, Outcome

pytestmark = pytest.mark.promise(25)

WANTED = 2
PASSES = 70
SCENARIOS = {
    "rolling": (Kind.ROLLING, ""),
    "blue_green": (Kind.BLUE_GREEN, ""),
    "canary": (Kind.CANARY, ""),
    "mirror": (Kind.MIRROR, ""),
    "bad_canary": (Kind.CANARY, "bad"),
    "bad_blue_green": (Kind.BLUE_GREEN, "bad"),
    "slow_mirror": (Kind.MIRROR, "slow"),
    "superseded": (Kind.CANARY, "superseded"),
}


class Story:
    """One roll-out from its wish to its end, with control killed on the way."""

    def __init__(self, plane, scenario, kills):
        self.plane, self.kills = plane, kills
        self.kind, self.fault = SCENARIOS[scenario]
        self.answers = Answers(plane)
        self.whole = False

    async def ask(self, version):
        await self.plane.ask(
            model=f"models:/bank/{version}",
            min_replicas=WANTED,
            max_replicas=WANTED,
            rollout=STRATEGIES[self.kind],
        )

    def begin_control(self):
        plane = self.plane
        outside = plane.state
        plane.state = MortalState(outside, self.kills)
        plane.restart()
        plane.state = outside
        mortal_driver(plane.drivers.get("process"), outside, self.kills)

    async def step(self):
        try:
            await self.plane.reconciler.step()
        except Killed:
            self.begin_control()
        await self.check()
        await self.answers.give()
        await self.plane.clock.advance(0.5)

    async def check(self):
        taking = [one for one in await self.plane.state.list_endpoints() if takes(one)]
        self.whole = self.whole or len(taking) >= WANTED
        assert not self.whole or len(taking) >= WANTED, "too few replicas take requests"

    async def tell(self):
        self.begin_control()
        await self.ask(1)
        for _ in range(6):
            await self.step()
        self.answers.bad = frozenset({2} if self.fault == "bad" else ())
        self.answers.slow = frozenset({2} if self.fault == "slow" else ())
        await self.ask(2)
        for number in range(PASSES):
            if number == 8 and self.fault == "superseded":
                await self.ask(1)  # the same again is a revision of its own
            await self.step()
        return await self.end()

    async def end(self):
        state = self.plane.state
        rollout = await state.get_rollout("bank")
        return {
            "running": self.plane.running(),
            "endpoints": await state.list_endpoints(),
            "groups": sorted(self.plane.world.groups),
            "revision": (await state.get_deployment("bank")).revision,
            "rollout": (rollout.stable, rollout.target, rollout.rejected),
            "outcomes": {one.number: one.outcome for one in await state.list_revisions("bank")},
            "versions": {one.number: one.model for one in await state.list_revisions("bank")},
            "phase": (await state.get_status("bank")).phase,
            "started": sorted(self.plane.world.started),
        }


def expected(scenario):
    fault = SCENARIOS[scenario][1]
    if fault == "superseded":
        return 3, {1: Outcome.PROMOTED, 2: Outcome.SUPERSEDED, 3: Outcome.PROMOTED}
    if fault:
        return 1, {1: Outcome.PROMOTED, 2: Outcome.ROLLED_BACK}
    return 2, {1: Outcome.PROMOTED, 2: Outcome.PROMOTED}


def check_end(end, scenario):
    revision, outcomes = expected(scenario)
    assert end["outcomes"] == outcomes
    assert end["revision"] == revision
    assert end["groups"] == [f"bank-r{revision}"]
    assert end["running"] == [f"bank-r{revision}-{n}" for n in range(WANTED)]
    assert [(one.replica, one.share) for one in end["endpoints"]] == [
        (f"bank-r{revision}-{n}", None) for n in range(WANTED)
    ]
    assert len(set(end["started"])) == len(end["started"]), "a replica was started twice"


@pytest.mark.promise(25)
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_killed_after_every_write_it_ends_the_same(plane_at, scenario):
    story = Story(plane_at("whole"), scenario, Kills())
    reference = await story.tell()
    check_end(reference, scenario)
    assert story.kills.count > 15
    for at in range(1, story.kills.count + 1):
        kills = Kills(at)
        end = await Story(plane_at(f"killed-{at}"), scenario, kills).tell()
        check_end(end, scenario)
        assert end == reference


@pytest.mark.promise(25)
@pytest.mark.parametrize("seed", range(8))
async def test_killed_again_and_again_it_ends_the_same(plane_at, seed):
    draw = random.Random(seed)
    scenario = draw.choice(list(SCENARIOS))
    kills = Kills(draw.randint(1, 6), every=draw.randint(2, 9))
    end = await Story(plane_at(f"seed-{seed}"), scenario, kills).tell()
    check_end(end, scenario)
