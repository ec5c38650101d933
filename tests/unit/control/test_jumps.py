"""A wall clock that jumps is not time that passes: roll-outs keep their time limits."""

from __future__ import annotations

import pytest
from rolling_world import Answers

from cloudlm.control.api.rollouts import resumed
from cloudlm.control.jumps import STEP_S, Jumps, shifted
from cloudlm.control.rollout import Facts, decide
from cloudlm.core.clock import ManualClock
from cloudlm.core.deployment import Deployment, DeploymentSpec
from cloudlm.core.errors import Conflict
from cloudlm.core.rollout import Kind, Outcome, Rollout, Step, Strategy

HOUR = 3600.0
CANARY = Strategy(
    Kind.CANARY, steps=(Step(10.0, 60.0),), bake_s=60.0, start_timeout_s=30.0, min_requests=1
)
jumps = pytest.mark.parametrize("jump_s", [-HOUR, -30.0, 30.0, HOUR])


class JumpyClock(ManualClock):
    """Its wall time can be set; time that passes is not changed by it."""

    def jump(self, seconds):
        self._epoch += seconds


@pytest.fixture
def jumpy(plane):
    plane.clock = JumpyClock()
    plane.restart()
    return plane


async def begin(plane, *, silent=False):
    """A canary on its way; ``silent``: its replica does not come up."""
    answers = Answers(plane)
    for version in (1, 2):
        if silent and version == 2:
            plane.prober.silence("bank-r2-0")
        await plane.ask(model=f"models:/bank/{version}", rollout=CANARY)
        await plane.steps(4)
    return answers


async def stage(plane):
    (rollout,) = await plane.state.list_rollouts()
    return rollout


async def outcome(plane):
    return (await plane.state.list_revisions("bank"))[0].outcome


@jumps
async def test_a_target_that_starts_has_its_whole_time_and_no_more(jumpy, jump_s):
    await begin(jumpy, silent=True)
    await jumpy.steps(20, seconds=1.0)
    jumpy.clock.jump(jump_s)
    await jumpy.steps(5, seconds=1.0)
    assert await outcome(jumpy) is Outcome.PENDING
    await jumpy.steps(10, seconds=1.0)
    assert await outcome(jumpy) is Outcome.ROLLED_BACK


@jumps
async def test_a_step_lasts_as_long_as_asked(jumpy, jump_s):
    answers = await begin(jumpy)
    assert (await stage(jumpy)).since
    for second in range(61):
        if second == 20:
            jumpy.clock.jump(jump_s)
        await answers.give()
        await jumpy.steps(1, seconds=1.0)
        if second < 56:
            assert ((await stage(jumpy)).stage, (await stage(jumpy)).plain) == (0, False)
    assert (await stage(jumpy)).stage == 1 or (await stage(jumpy)).plain


async def test_a_step_of_the_clock_that_was_not_kept_is_not_forgotten(jumpy, monkeypatch):
    await begin(jumpy, silent=True)
    before = await stage(jumpy)
    jumpy.clock.jump(HOUR)

    async def moved(rollout, *, replaces):
        raise Conflict("somebody else moved it at this moment")

    with monkeypatch.context() as patched:
        patched.setattr(jumpy.state, "put_rollout", moved)
        await jumpy.steps(1)
    assert await stage(jumpy) == before
    await jumpy.steps(2)
    assert (await stage(jumpy)).began_at == pytest.approx(before.began_at + HOUR)


async def test_what_began_while_the_clock_was_ahead_has_its_time_from_now_on():
    wish = Deployment(DeploymentSpec("bank", "m", rollout=CANARY), 2, 2)
    ahead = Rollout("bank", 1, 2, began_at=HOUR + 5.0)
    none = Facts(1, {1: 1, 2: 1}, {1: 1, 2: 0})
    first = decide(wish, ahead, none, 5.0)
    assert first.rollout.began_at == 5.0
    assert not decide(wish, first.rollout, none, 34.0).back
    assert decide(wish, first.rollout, none, 35.0).back


def test_a_pause_that_ends_before_it_began_moves_nothing():
    paused = Rollout("bank", 1, 2, began_at=90.0, since=95.0, paused_at=100.0)
    assert resumed(paused, 40.0) == Rollout("bank", 1, 2, began_at=90.0, since=95.0)
    assert resumed(paused, 110.0) == Rollout("bank", 1, 2, began_at=100.0, since=105.0)


async def test_drift_is_no_jump_and_jumps_add_up():
    clock = JumpyClock()
    seen = Jumps(clock)
    rollout = Rollout("bank", 1, 2, began_at=100.0, since=110.0)
    seen.look(["bank"])
    for jump_s, owed_s in ((STEP_S - 0.1, 0.0), (HOUR, HOUR), (0.0, HOUR), (-60.0, HOUR - 60.0)):
        await clock.advance(50.0)
        clock.jump(jump_s)
        seen.look(["bank"])
        assert seen.moved(rollout) == shifted(rollout, owed_s)
    assert seen.moved(None) is None
    seen.settle("bank")
    assert seen.moved(rollout) is rollout


def test_no_date_stays_none_and_a_date_stays_one():
    waits = Rollout("bank", 1, 2, began_at=100.0)
    assert shifted(waits, HOUR) == Rollout("bank", 1, 2, began_at=100.0 + HOUR)
    assert shifted(waits, -HOUR).began_at > 0.0
