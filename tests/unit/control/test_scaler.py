"""Control's side of scaling: to zero and back, starts measured, paces kept over a restart."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cloudlm.control.autoscale import autoscale
from cloudlm.control.observe import Seen
from cloudlm.control.probe import Sample
from cloudlm.control.scaler import _fleet
from cloudlm.core.deployment import (
    Demand,
    DeploymentPhase,
    GroupObservation,
    GroupSpec,
    Replica,
    ReplicaState,
)
from cloudlm.core.pace import Pace
from cloudlm.core.scaling import Algorithm, Scaling

SOON = Scaling(idle_s=5.0)


async def tell(plane, ongoing, rate=1.0, model="bank"):
    report = Demand(model, "g1", ongoing, ongoing, rate if ongoing else 0.0, plane.clock.now())
    await plane.state.put_demand([report])


async def test_at_zero_it_is_idle_and_says_so(plane):
    await plane.ask(min_replicas=0, scaling=SOON)
    await plane.steps(3)
    status = await plane.state.get_status("bank")
    assert (status.phase, status.wanted_replicas) == (DeploymentPhase.IDLE, 0)
    assert plane.running() == []


@pytest.mark.promise(19)
async def test_a_request_starts_one_and_idleness_ends_it(plane):
    await plane.ask(min_replicas=0, max_replicas=4, scaling=SOON)
    await plane.steps(2)
    await tell(plane, 1)
    await plane.steps(3)
    assert len(plane.running()) == 1
    assert await plane.serving() == ["bank-r1-0"]
    status = await plane.state.get_status("bank")
    assert status.phase is DeploymentPhase.READY
    assert "0 → 1 replicas" in status.message
    for _ in range(40):
        await tell(plane, 0)
        await plane.steps(1)
    assert plane.running() == []
    assert (await plane.state.get_status("bank")).phase is DeploymentPhase.IDLE


async def test_a_number_that_a_person_changed_is_told_as_such(plane):
    await plane.ask()
    await plane.steps(3)
    for asked, words in ((3, "1 → 3 replicas"), (2, "3 → 2 replicas")):
        await plane.ask(min_replicas=asked, max_replicas=asked)
        await tell(plane, 0)
        await plane.steps(4)
        status = await plane.state.get_status("bank")
        assert status.message == f"{words}; a person set the bounds to {asked}:{asked}"


@pytest.mark.promise(29)
async def test_silence_takes_the_last_replica_from_nobody(plane):
    await plane.ask(min_replicas=0, scaling=SOON)
    await plane.steps(2)
    await tell(plane, 1)
    await plane.steps(3)
    await plane.steps(100, seconds=10.0)
    assert len(plane.running()) == 1
    plane.restart()
    await plane.steps(5)
    assert len(plane.running()) == 1


async def test_a_request_while_the_last_replica_leaves_keeps_it(plane):
    await plane.ask(min_replicas=0, scaling=SOON)
    await plane.steps(2)
    await tell(plane, 1)
    await plane.steps(3)
    plane.prober.samples["bank-r1-0"] = Sample(True, ready=True, running=1, steps=1)
    while await plane.serving():
        await tell(plane, 0)
        await plane.steps(1)
    assert len(plane.running()) == 1
    await tell(plane, 1)
    await plane.steps(2)
    assert await plane.serving() == ["bank-r1-0"]


async def test_a_start_is_measured_and_a_restart_of_control_keeps_it(plane):
    plane.prober.default = Sample(True, ready=False)
    await plane.ask()
    await plane.steps(12, seconds=1.0)
    plane.prober.default = Sample(True, ready=True)
    await plane.steps(2)
    (pace,) = await plane.state.list_paces()
    assert (pace.deployment, pace.model) == ("bank", "models:/bank/1")
    assert pace.start_s == pytest.approx(12.0, abs=2.0)
    plane.restart()
    await plane.steps(3)
    assert plane.reconciler._scaler._memory["bank"].pace == pace


async def started_once(plane, **changes):
    """A replica that took 12 s to start and served for a day; returns its start as measured."""
    plane.prober.default = Sample(True, ready=False)
    await plane.ask(**changes)
    await plane.steps(12, seconds=1.0)
    plane.prober.default = Sample(True, ready=True)
    await plane.steps(2)
    await plane.steps(24, seconds=3600.0)
    await plane.steps(2)
    (pace,) = await plane.state.list_paces()
    return pace.start_s


async def test_waking_is_no_start(plane):
    start_s = await started_once(plane)
    await plane.ask(asleep=True)
    await plane.steps(4)
    await plane.steps(4, seconds=3600.0)
    assert plane.turner.asked == [("bank-r1-0", True)]
    await plane.ask(asleep=False)
    await plane.steps(6)
    assert plane.turner.asked[-1] == ("bank-r1-0", False)
    assert await plane.serving() == ["bank-r1-0"]
    (pace,) = await plane.state.list_paces()
    assert pace.start_s == start_s


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_a_silent_patch_is_no_start(plane, is_restarted):
    start_s = await started_once(plane)
    plane.prober.silence("bank-r1-0")
    if is_restarted:
        plane.restart()
    await plane.steps(15, seconds=1.0)  # for a while all silent at once are believed to serve
    assert await plane.serving() == []
    plane.prober.samples.clear()
    await plane.steps(4)
    assert await plane.serving() == ["bank-r1-0"]
    (pace,) = await plane.state.list_paces()
    assert pace.start_s == start_s


async def test_nothing_is_kept_of_what_was_not_measured(plane):
    await plane.ask()
    await plane.steps(1, seconds=0.0)
    assert await plane.state.list_paces() == []


async def test_a_version_never_seen_begins_with_the_pace_of_the_one_before(plane):
    await plane.state.put_pace(Pace("bank", "models:/bank/1", start_s=40.0))
    await plane.ask()
    await plane.steps(3)
    plane.restart()
    await plane.ask(model="models:/bank/2")
    await plane.steps(3)
    pace = plane.reconciler._scaler._memory["bank"].pace
    assert pace.model == "models:/bank/2"
    assert pace.start_s == pytest.approx(40.0, abs=39.9)


async def test_a_version_that_comes_back_has_its_own_pace(plane):
    start_s = await started_once(plane)
    plane.prober.samples["bank-r2-0"] = Sample(True, ready=False)
    await plane.ask(model="models:/bank/2")
    await plane.steps(4, seconds=20.0)
    plane.prober.samples.clear()
    await plane.steps(8)
    paces = {one.model: one.start_s for one in await plane.state.list_paces()}
    assert paces["models:/bank/2"] >= 60.0
    plane.prober.samples["bank-r3-0"] = Sample(True, ready=False)
    await plane.ask(model="models:/bank/1")
    await plane.steps(3)
    assert "bank-r3-0" in plane.running()
    assert {one.model: one.start_s for one in await plane.state.list_paces()} == paces
    pace = plane.reconciler._scaler._memory["bank"].pace
    assert (pace.model, pace.start_s) == ("models:/bank/1", start_s)


async def test_what_was_learnt_of_answers_is_kept_too(plane):
    await plane.ask(scaling=Scaling(Algorithm.TOKENS))
    await plane.steps(2)
    for _ in range(140):
        one = Demand(
            "bank", "g1", 2, 0, 1.0, plane.clock.now(), 100.0, 0.0, 1.0, 50.0, 90.0, 0.1, 0.02
        )
        await plane.state.put_demand([one])
        await plane.steps(1)
    (pace,) = await plane.state.list_paces()
    assert pace.known
    assert pace.output_tokens == pytest.approx(50.0)
    assert pace.prompt_token_s == pytest.approx(0.1 / 90.0)


async def test_a_deleted_deployment_leaves_no_pace(plane):
    await plane.ask()
    await plane.steps(3)
    await plane.state.put_pace(Pace("bank", "models:/bank/1", start_s=1.0))
    await plane.state.mark_deleting("bank", now=0.0)
    await plane.steps(8)
    assert await plane.state.get_deployment("bank") is None
    assert await plane.state.list_paces() == []


async def test_news_of_a_first_request_ends_the_pause_at_once(plane):
    await plane.ask(min_replicas=0)
    await plane.steps(2)
    pause = asyncio.create_task(plane.reconciler._scaler.pause(60.0))
    await asyncio.sleep(0)
    await plane.clock.advance(10.0)
    assert not pause.done()
    await tell(plane, 3)
    await plane.clock.advance(0.06)
    assert pause.done()


async def test_while_requests_wait_for_a_first_replica_passes_follow_quickly(plane):
    plane.prober.default = Sample(True, ready=False)
    await plane.ask(min_replicas=0)
    await plane.steps(2)
    await tell(plane, 3)
    await plane.steps(2)
    pause = asyncio.create_task(plane.reconciler._scaler.pause(0.5))
    await asyncio.sleep(0)
    await plane.clock.advance(0.11)
    assert pause.done()


def test_replicas_that_get_no_requests_are_no_capacity():
    spec = GroupSpec("bank-r1", "bank", 1, "models:/bank/1", 2)
    new = replace(spec, name="bank-r2", revision=2)
    groups = [
        GroupObservation(
            one.name, one, tuple(Replica(f"{one.name}-{n}", ReplicaState.READY) for n in range(2))
        )
        for one in (spec, new)
    ]
    ready = frozenset(r.id for group in groups for r in group.replicas)
    seen = Seen(ready=ready)
    assert _fleet(groups, seen, 2, {}, ()).ready == 4
    assert _fleet(groups, seen, 2, {}, {"bank-r2-0", "bank-r2-1"}).ready == 2


async def test_of_replicas_that_are_gone_nothing_is_remembered(plane):
    plane.prober.default = Sample(True, ready=False)
    await plane.ask(min_replicas=3, max_replicas=3)
    await plane.steps(3)
    assert len(plane.reconciler._scaler._starts._known) == 3
    await plane.ask(min_replicas=1, max_replicas=1)
    await plane.steps(4)
    assert list(plane.reconciler._scaler._starts._known) == ["bank-r1-0"]
    await plane.state.mark_deleting("bank", now=plane.clock.now())
    await plane.steps(4)
    assert plane.reconciler._scaler._starts._known == {}


@pytest.fixture
def watched(plane, monkeypatch):
    """A plane whose autoscaler's facts are kept."""
    plane.fleets = []

    def kept(spec, demand, current, memory, now, fleet):
        plane.fleets.append(fleet)
        return autoscale(spec, demand, current, memory, now, fleet)

    monkeypatch.setattr("cloudlm.control.scaler.autoscale", kept)
    return plane


async def test_what_does_not_come_up_is_neither_starting_nor_capacity(watched):
    await watched.state.put_pace(Pace("bank", "models:/bank/1", start_s=40.0))
    watched.prober.samples["bank-r1-1"] = Sample(True, ready=False)
    await watched.ask(min_replicas=2, max_replicas=4)
    await watched.steps(2)
    for _ in range(8):
        await watched.steps(1, seconds=10.0)
        assert (len(watched.fleets[-1].starting_s), watched.fleets[-1].lost) == (1, 0)
    await watched.steps(6, seconds=10.0)
    assert (watched.fleets[-1].ready, watched.fleets[-1].starting_s) == (1, ())
    assert watched.fleets[-1].lost == 1
    watched.prober.samples.clear()
    await watched.steps(2)
    assert (watched.fleets[-1].ready, watched.fleets[-1].lost) == (2, 0)


async def test_a_crash_loop_is_not_waited_for(watched):
    watched.world.broken["models:/bank/1"] = "no memory"
    await watched.ask(min_replicas=2, max_replicas=4)
    await watched.steps(2)
    assert len(watched.fleets[-1].starting_s) == 2
    await watched.steps(20, seconds=1.0)
    assert (watched.fleets[-1].ready, watched.fleets[-1].starting_s) == (0, ())
    assert watched.fleets[-1].lost == 2
