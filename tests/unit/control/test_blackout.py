"""What is missed all at once is not given up at once; what is truly lost comes back in a stated
time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.control.blackout import BELIEVED_AFTER_S, Doubt
from cloudlm.control.observe import Observer
from cloudlm.control.probe import UNREACHABLE, Sample
from cloudlm.core.deployment import Demand, DeploymentPhase
from cloudlm.core.errors import Unavailable
from cloudlm.drivers.base import Ability
from cloudlm.drivers.memory import MemoryDriver

LOOK_S = 0.5
MIB = 2**20
THREE = ["bank-r1-0", "bank-r1-1", "bank-r1-2"]


async def three(plane):
    await plane.ask(min_replicas=3, max_replicas=3)
    await plane.steps(2)
    assert await plane.serving() == THREE


def blind(monkeypatch, names=()):
    """The driver lists no other groups than these."""

    async def groups(self):
        return [name for name in self.world.groups if name in names]

    monkeypatch.setattr(MemoryDriver, "groups", groups)


# The rule -----------------------------------------------------------------------------------------


@given(looks=st.lists(st.tuples(st.integers(0, 8), st.floats(0.0, 4.0)), max_size=40))
def test_no_loss_is_doubted_for_longer_than_is_stated(looks):
    doubt, now, began = Doubt(), 0.0, None
    for lost, later_s in looks:
        now += later_s
        doubt = doubt.next(8, lost, now)
        began = (now if began is None else began) if lost > 4 else None
        assert doubt.since == began
        assert doubt.holds(now) == (began is not None and now - began < BELIEVED_AFTER_S)


def test_half_of_it_is_no_matter_of_doubt_and_more_than_half_is():
    assert Doubt().next(4, 2, 1.0) == Doubt()
    assert Doubt().next(4, 3, 1.0) == Doubt(1.0)
    assert Doubt().next(1, 1, 1.0, fewest=2) == Doubt(), "one alone is its own fault"
    assert Doubt().next(0, 0, 1.0) == Doubt()


# A driver that lists nothing ----------------------------------------------------------------------


async def test_a_driver_that_lists_nothing_all_of_a_sudden_costs_no_endpoint(plane, monkeypatch):
    await three(plane)
    with monkeypatch.context() as patched:
        blind(patched)
        for _ in range(int(BELIEVED_AFTER_S / LOOK_S) - 1):
            await plane.steps(1)
            assert await plane.serving() == THREE
        status = await plane.state.get_status("bank")
        assert "lists 0 of the 3 replicas that it ran a moment ago" in status.message
        assert "bank-r1-0, bank-r1-1, bank-r1-2" in status.message
        assert status.phase is DeploymentPhase.DEGRADED
        assert [one.id for one in status.replicas] == THREE
        assert status.ready_replicas == 3
    await plane.steps(2)
    assert (await plane.state.get_status("bank")).phase is DeploymentPhase.READY
    assert await plane.serving() == THREE == plane.world.started
    assert plane.world.stopped == []


async def test_a_control_that_begins_knows_from_its_endpoints_what_a_driver_should_list(
    plane, monkeypatch
):
    await three(plane)
    with monkeypatch.context() as patched:
        blind(patched)
        plane.restart()
        await plane.steps(5)
        assert await plane.serving() == THREE
    await plane.steps(2)
    assert await plane.serving() == THREE == plane.world.started


async def test_what_only_the_machine_of_the_control_before_saw_is_not_waited_for(
    plane, monkeypatch
):
    """Another machine's driver never lists it, and somebody has to serve."""
    await three(plane)
    abilities = type(plane.drivers.get("process")).abilities | {Ability.ONLY_HERE}
    monkeypatch.setattr(type(plane.drivers.get("process")), "abilities", abilities)
    plane.world.groups.clear()
    plane.restart()
    await plane.steps(2)
    assert plane.running() == THREE


async def test_groups_without_their_replicas_are_doubted_as_well(plane, monkeypatch):
    await three(plane)
    seen = MemoryDriver.observe

    async def empty(self, name):
        found = await seen(self, name)
        return type(found)(found.name, found.spec, found.replicas[:1])

    with monkeypatch.context() as patched:
        patched.setattr(MemoryDriver, "observe", empty)
        await plane.steps(5)
        assert await plane.serving() == THREE
    await plane.steps(2)
    assert plane.world.started == THREE


async def test_what_is_truly_gone_is_back_after_the_stated_time(plane):
    await three(plane)
    plane.world.groups.clear()  # somebody removed it all behind control's back
    await plane.steps(int(BELIEVED_AFTER_S / LOOK_S))
    assert plane.running() == []
    await plane.steps(3)
    assert plane.running() == THREE
    assert await plane.serving() == THREE


async def test_what_control_ended_itself_is_missed_by_nobody(plane):
    await three(plane)
    await plane.ask(min_replicas=1, max_replicas=1)
    await plane.steps(8)
    assert await plane.serving() == ["bank-r1-0"]
    await plane.state.mark_deleting("bank", now=0.0)
    await plane.steps(5)
    assert plane.running() == []
    assert await plane.state.list_deployments() == []


async def test_a_driver_in_doubt_hinders_no_deployment_of_another(plane, monkeypatch):
    await three(plane)
    blind(monkeypatch, names=("other-r1",))
    await plane.ask("other", driver="memory")
    await plane.steps(5)
    assert "other-r1-0" in await plane.serving()
    assert set(THREE) < set(await plane.serving())


# What ends as it was told to ----------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 1])
async def test_what_is_still_listed_while_it_stops_is_not_missed_when_it_ends(plane, left):
    """As the process driver does: a stopped replica is listed as draining for as long as its guard
    lives."""
    await three(plane)
    plane.world.stop_s = 2.0
    if left:
        await plane.ask(min_replicas=left, max_replicas=left)
    else:
        await plane.state.mark_deleting("bank", now=0.0)
    for _ in range(12):
        await plane.steps(1)
        assert plane.reconciler._seen.faults == {}
    assert plane.running() == THREE[:left]
    assert await plane.serving() == THREE[:left]


async def test_a_group_that_is_scaled_to_nothing_and_ends_is_not_missed(plane):
    await plane.ask()
    await plane.steps(2)
    plane.world.stop_s = 2.0
    await plane.drivers.get("process").apply(
        replace(plane.world.groups["bank-r1"].spec, replicas=0)
    )
    seen = [await looked(plane) for _ in range(8)]
    assert all(not one.faults for one in seen)


async def looked(plane):
    await plane.clock.advance(LOOK_S)
    return await plane.reconciler._observer.look(["process"])


async def test_what_stops_is_silent_and_gets_no_endpoint_back(plane):
    await three(plane)
    plane.world.stop_s = 5.0
    await plane.ask(min_replicas=1, max_replicas=1)
    await plane.steps(3)
    assert await plane.serving() == ["bank-r1-0"]
    plane.prober.silence("bank-r1-1")
    plane.prober.silence("bank-r1-2")
    for _ in range(6):
        await plane.steps(1)
        assert await plane.serving() == ["bank-r1-0"]
        assert not {"bank-r1-1", "bank-r1-2"} & plane.reconciler._seen.ready


async def test_what_begins_under_the_name_of_what_stopped_is_given_its_own_time(plane):
    """Drivers may have no other mark of a life than its name: the silence of the one that ended is
    not that of the one that begins."""
    await plane.ask(min_replicas=2, max_replicas=2)
    await plane.steps(2)
    plane.world.stop_s, plane.world.start_s = 19.0, 10.0
    await plane.ask(min_replicas=1, max_replicas=1)
    await plane.steps(4)
    plane.prober.silence("bank-r1-1")
    await plane.ask(min_replicas=2, max_replicas=2)
    while plane.world.started.count("bank-r1-1") < 2:
        await plane.steps(1)
    for _ in range(10):
        await plane.steps(1)
        assert not plane.reconciler._seen.stalled
    plane.prober.samples.clear()
    await plane.steps(2)
    assert await plane.serving() == ["bank-r1-0", "bank-r1-1"]


async def test_what_stops_does_not_stand_in_for_those_that_serve(plane):
    """Two of three that stay are silent: most of them, however many are on the way out."""
    await plane.ask(min_replicas=7, max_replicas=7)
    await plane.steps(2)
    plane.world.stop_s = 30.0
    await plane.ask(min_replicas=3, max_replicas=3)
    await plane.steps(4)
    assert await plane.serving() == THREE
    plane.prober.silence("bank-r1-0")
    plane.prober.silence("bank-r1-1")
    await plane.steps(2)
    assert await plane.serving() == THREE


# A control that reaches nobody --------------------------------------------------------------------


async def test_replicas_that_are_silent_all_at_once_keep_their_endpoints_for_a_while(plane):
    await three(plane)
    plane.prober.default = UNREACHABLE
    for _ in range(int(BELIEVED_AFTER_S / LOOK_S) - 1):
        await plane.steps(1)
        assert await plane.serving() == THREE
    await plane.steps(3)
    assert await plane.serving() == [], "it has lasted: they are gone"
    plane.prober.default = Sample(True, ready=True)
    await plane.steps(1)
    assert await plane.serving() == THREE
    assert plane.world.stopped == []


async def test_one_silent_replica_among_others_loses_its_endpoint_at_once(plane):
    await three(plane)
    plane.prober.silence("bank-r1-1")
    await plane.steps(1)
    assert await plane.serving() == ["bank-r1-0", "bank-r1-2"]


async def test_all_that_hang_are_started_anew_though_they_were_given_the_benefit(plane):
    await three(plane)
    lives = {one: there.restarts for one, there in plane.world.groups["bank-r1"].replicas.items()}
    plane.prober.default = UNREACHABLE
    await plane.steps(44)  # the stall timeout of these tests is 20 s
    now = plane.world.groups["bank-r1"].replicas
    assert all(now[one].restarts > before for one, before in lives.items())


async def test_short_silence_does_not_end_what_may_stall_only_shortly(plane):
    """Also where the stall timeout is shorter than the doubt lasts."""
    await three(plane)
    plane.reconciler._observer._stall_timeout_s = 1.0
    plane.prober.default = UNREACHABLE
    await plane.steps(8)
    plane.prober.default = Sample(True, ready=True)
    await plane.steps(2)
    assert await plane.serving() == THREE
    assert all(one.restarts == 0 for one in plane.world.groups["bank-r1"].replicas.values())


# What is remembered -------------------------------------------------------------------------------


async def test_records_of_what_is_gone_go_while_another_driver_has_a_fault(plane, monkeypatch):
    await three(plane)
    await plane.ask("other", driver="memory")
    await plane.steps(2)
    observer: Observer = plane.reconciler._observer
    assert set(observer._records) >= set(THREE)

    async def away(self):
        raise Unavailable("the driver is away")

    elsewhere = plane.drivers.get("memory")
    monkeypatch.setattr(elsewhere, "groups", away.__get__(elsewhere))
    await plane.ask(min_replicas=1, max_replicas=1)
    await plane.steps(8)
    assert set(observer._records) == {"bank-r1-0"}


async def test_a_drain_goes_on_where_it_was_when_its_driver_was_away(plane, monkeypatch):
    """What a driver cannot tell of now is not forgotten."""
    await three(plane)
    plane.prober.samples["bank-r1-2"] = Sample(True, ready=True, steps=1, running=1)
    await plane.ask(min_replicas=2, max_replicas=2)
    await plane.steps(2)
    began = plane.reconciler._orders.drains._leaving["bank-r1-2"]
    driver = plane.drivers.get("process")

    async def away():
        raise Unavailable("the driver is away")

    with monkeypatch.context() as patched:
        patched.setattr(driver, "groups", away)
        await plane.steps(4)
    await plane.steps(1)
    assert plane.reconciler._orders.drains._leaving["bank-r1-2"] == began


async def test_a_drain_goes_on_where_it_was_when_the_order_to_stop_failed(plane, monkeypatch):
    """The order went out and failed, then the driver was away: what was to stop is still there."""
    await three(plane)
    await plane.ask(min_replicas=1, max_replicas=1)
    driver = plane.drivers.get("process")

    async def away(*args):
        raise Unavailable("the driver is away")

    with monkeypatch.context() as patched:
        patched.setattr(driver, "apply", away)
        await plane.steps(4)
        began = dict(plane.reconciler._orders.drains._leaving)
        assert set(began) == {"bank-r1-1", "bank-r1-2"}
        patched.setattr(driver, "groups", away)
        await plane.steps(2)
    assert plane.reconciler._orders.drains._leaving == began


async def test_nothing_is_scaled_by_what_nobody_sees(plane, monkeypatch):
    """A fleet that seems empty under load would be made larger when its driver is back."""
    await plane.ask(max_replicas=8)
    await plane.steps(2)

    async def away(self):
        raise Unavailable("the driver is away")

    async def wanted_under_load():
        await plane.state.put_demand([Demand("bank", "g1", 24, 0, 9.0, plane.clock.now())])
        await plane.steps(1)
        return (await plane.state.get_status("bank")).wanted_replicas

    with monkeypatch.context() as patched:
        patched.setattr(MemoryDriver, "groups", away)
        assert {await wanted_under_load() for _ in range(30)} == {1}
    assert await wanted_under_load() == 3


async def test_a_second_wave_of_silence_is_doubted_as_the_first(plane):
    await plane.ask(min_replicas=7, max_replicas=7)
    await plane.steps(2)
    for number in range(4):
        plane.prober.silence(f"bank-r1-{number}")
    while len(await plane.serving()) == 7:
        await plane.steps(1)
    assert len(await plane.serving()) == 3, "it was believed in this pass"
    for number in range(4, 7):
        plane.prober.silence(f"bank-r1-{number}")
    await plane.steps(4)
    assert len(await plane.serving()) == 3


async def test_a_doubt_does_not_outlive_a_driver_that_fails_in_between(plane, monkeypatch):
    await three(plane)

    async def away(self):
        raise Unavailable("the driver is away")

    with monkeypatch.context() as patched:
        blind(patched)
        await plane.steps(1)
    with monkeypatch.context() as patched:
        patched.setattr(MemoryDriver, "groups", away)
        await plane.steps(int(BELIEVED_AFTER_S / LOOK_S) + 1)
    with monkeypatch.context() as patched:
        blind(patched)
        await plane.steps(2)
        assert await plane.serving() == THREE


async def test_a_loss_is_believed_though_its_driver_fails_now_and_then(plane, monkeypatch):
    await three(plane)
    looks = 0
    true = MemoryDriver.groups

    async def shaky(self):
        nonlocal looks
        looks += 1
        if looks % 3 == 0:
            raise Unavailable("the driver is away")
        return await true(self)

    monkeypatch.setattr(MemoryDriver, "groups", shaky)
    plane.world.groups.clear()
    await plane.steps(2 * int(BELIEVED_AFTER_S / LOOK_S))
    assert plane.running() == THREE


async def test_a_driver_that_is_no_longer_installed_spoils_no_first_pass(plane):
    await three(plane)
    plane.restart()
    observer = plane.reconciler._observer
    observer.recall(
        (), (), {"nosuch": {"a-r1-0": "a-r1"}, "process": dict.fromkeys(THREE, "bank-r1")}
    )
    assert set(observer._listed) == {"process"}
    assert set((await observer.look(["nosuch"])).faults) == {"nosuch"}


async def test_a_driver_in_doubt_hands_no_memory_to_others(plane, monkeypatch):
    plane.memory.size_bytes = 1000 * MIB
    await plane.ask(memory_mb=800)
    await plane.steps(2)
    loaded_at = plane.reconciler._residents._known["bank"].loaded_at
    assert loaded_at is not None
    with monkeypatch.context() as patched:
        blind(patched)
        await plane.ask("other", memory_mb=800)
        await plane.steps(5)
        assert plane.running() == ["bank-r1-0"]
        status = await plane.state.get_status("bank")
        assert status.memory_bytes == 800 * MIB
    assert plane.reconciler._residents._known["bank"].loaded_at == loaded_at


async def test_a_control_that_begins_in_the_middle_of_a_doubt_still_knows_the_lives(
    plane, monkeypatch
):
    await three(plane)
    with monkeypatch.context() as patched:
        blind(patched)
        await plane.steps(2)
        plane.restart()
        await plane.steps(2)
        status = await plane.state.get_status("bank")
        assert (status.phase, status.ready_replicas) == (DeploymentPhase.DEGRADED, 3)
        plane.restart()
        await plane.steps(1)
        assert set(plane.reconciler._observer._handed) == set(THREE)
