"""A control that begins goes on judging replicas where the one before it stopped."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.control.handover import first_record, handed_over
from cloudlm.control.probe import START_TIMEOUT_S, UNREACHABLE, Sample, Verdict, judge
from cloudlm.core.deployment import (
    DeploymentPhase,
    DeploymentStatus,
    Endpoint,
    Replica,
    ReplicaState,
)
from cloudlm.core.errors import Unavailable

STALL_S = 20.0
ONE = Replica("bank-r1-0", ReplicaState.STARTING, "http://one", pid=7, started_at=1000.0)
ENDPOINT = Endpoint("bank", "bank-r1-0", "http://one", 1)


def status(*replicas):
    return DeploymentStatus("bank", DeploymentPhase.READY, 1, 1, 1, replicas=replicas)


def silent_until_stalled(replica, handed, wall_now):
    """Seconds after which a replica that answers nothing counts as stalled."""
    record = first_record(replica, handed, 0.0, wall_now)
    for now in range(0, 2 * int(START_TIMEOUT_S)):
        record = judge(record, UNREACHABLE, float(now), STALL_S)
        if record.verdict is Verdict.STALLED:
            return now
    raise AssertionError("it was waited for without end")


# The rule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [ReplicaState.READY, ReplicaState.SLEEPING])
def test_what_answered_before_is_given_the_time_of_a_stall(state):
    handed = handed_over([status(replace(ONE, state=state))], [])
    assert silent_until_stalled(ONE, handed, 1001.0) == STALL_S + 1


def test_an_endpoint_says_so_too_where_the_status_was_not_written_any_more():
    assert silent_until_stalled(ONE, handed_over([status(ONE)], [ENDPOINT]), 1001.0) == STALL_S + 1


@pytest.mark.parametrize(
    "changed", [{"pid": 8}, {"restarts": 1}, {"url": "http://two"}], ids=["pid", "restarts", "url"]
)
def test_a_new_life_may_take_the_time_of_a_start_whatever_the_one_before_did(changed):
    handed = handed_over([status(replace(ONE, state=ReplicaState.READY))], [ENDPOINT])
    reborn = replace(ONE, **changed, started_at=2000.0)
    assert silent_until_stalled(reborn, handed, 2000.0) == START_TIMEOUT_S + 1


def test_the_time_of_a_start_is_counted_from_the_start():
    assert silent_until_stalled(ONE, {}, 1600.0) == START_TIMEOUT_S - 600.0 + 1
    assert silent_until_stalled(ONE, {}, 10_000.0) == STALL_S + 1


def test_what_tells_no_start_has_the_whole_time():
    unknown = replace(ONE, started_at=0.0)
    assert silent_until_stalled(unknown, {}, 1e9) == START_TIMEOUT_S + 1


@given(
    started_at=st.floats(0.0, 2e9),
    wall_now=st.floats(0.0, 2e9),
    state=st.sampled_from(ReplicaState),
    serves=st.booleans(),
)
def test_no_clock_gives_less_than_a_stall_or_more_than_a_start(started_at, wall_now, state, serves):
    seen = replace(ONE, started_at=started_at)
    handed = handed_over([status(replace(seen, state=state))], [ENDPOINT] if serves else [])
    record = first_record(seen, handed, 0.0, wall_now)
    assert judge(record, UNREACHABLE, STALL_S, STALL_S).verdict is not Verdict.STALLED
    late = START_TIMEOUT_S + 1.0
    assert judge(record, UNREACHABLE, late, STALL_S).verdict is Verdict.STALLED


# In the loop --------------------------------------------------------------------------------------


async def served_for_long(plane, **changes):
    await plane.ask(min_replicas=2, max_replicas=2, **changes)
    await plane.steps(2)
    await plane.clock.advance(7200.0)
    await plane.steps(2)
    assert await plane.serving() == ["bank-r1-0", "bank-r1-1"]


@pytest.mark.promise(11)
@pytest.mark.parametrize("old_s", [0.0, 7200.0], ids=["young", "old"])
async def test_who_served_and_hangs_is_found_by_the_next_control(plane, old_s):
    await plane.ask(min_replicas=2, max_replicas=2)
    await plane.steps(2)
    await plane.clock.advance(old_s)
    await plane.steps(1)
    plane.prober.silence("bank-r1-1")
    plane.restart()
    await plane.steps(1)
    assert await plane.serving() == ["bank-r1-0"]
    await plane.steps(22, seconds=1.0)
    del plane.prober.samples["bank-r1-1"]
    await plane.steps(3)
    assert plane.world.groups["bank-r1"].replicas["bank-r1-1"].restarts == 1
    assert await plane.serving() == ["bank-r1-0", "bank-r1-1"]


async def test_a_control_that_begins_again_and_again_waits_no_longer(plane):
    """Each begins to count anew, as what it saw is lost; the age of the process is not."""
    plane.prober.silence("bank-r1-0")
    await plane.ask()
    for _ in range(int(START_TIMEOUT_S / 10.0) + 1):
        plane.restart()
        await plane.steps(1, seconds=10.0)
    assert plane.world.groups["bank-r1"].replicas["bank-r1-0"].restarts == 0
    await plane.steps(22, seconds=1.0)
    assert plane.world.groups["bank-r1"].replicas["bank-r1-0"].restarts == 1


async def test_who_starts_while_control_begins_anew_is_left_in_peace(plane):
    plane.prober.silence("bank-r1-0")
    await plane.ask()
    await plane.steps(2)
    plane.restart()
    await plane.steps(100, seconds=5.0)
    assert plane.world.groups["bank-r1"].replicas["bank-r1-0"].restarts == 0


async def test_one_lost_look_of_a_new_control_takes_no_endpoint_away(plane):
    await served_for_long(plane)
    plane.restart()
    plane.prober.misses_once("bank-r1-0")
    await plane.steps(1)
    assert await plane.serving() == ["bank-r1-0", "bank-r1-1"]


async def test_what_a_driver_could_not_tell_for_a_moment_is_not_forgotten(plane, monkeypatch):
    await served_for_long(plane)
    driver = plane.drivers.get("process")
    plane.prober.silence("bank-r1-1")
    await plane.steps(4, seconds=1.0)

    async def away():
        raise Unavailable("the driver is away")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "groups", away)
        await plane.steps(2, seconds=1.0)
    await plane.steps(18, seconds=1.0)
    plane.prober.samples["bank-r1-1"] = Sample(True, ready=True)
    await plane.steps(3)
    assert plane.world.groups["bank-r1"].replicas["bank-r1-1"].restarts == 1
