"""Sleep is a wish like any other: asked once, kept over restarts, shown, and no fault."""

from __future__ import annotations

from dataclasses import replace

from cloudlm.control.probe import ProbeRecord, Sample, Verdict, judge, sample_from_body
from cloudlm.core.deployment import Deployment, DeploymentPhase, DeploymentSpec, ReplicaState
from cloudlm.core.errors import NotSupported

ASLEEP = Sample(True, ready=False, sleeping=True)


async def phase(plane):
    return (await plane.state.get_status("bank")).phase


async def weights(plane):
    return [endpoint.weight for endpoint in await plane.state.list_endpoints()]


async def up(plane, **changes):
    await plane.ask(min_replicas=2, max_replicas=2, **changes)
    await plane.steps(4)
    assert await weights(plane) == [1.0, 1.0]


def test_a_sleeping_replica_never_counts_as_stalled():
    body = {"ready": False, "healthy": True, "phase": "sleeping", "steps": 5, "running": 0}
    sample = sample_from_body(body)
    assert sample == Sample(True, sleeping=True, steps=5)
    record = ProbeRecord(progress_at=0.0, steps=5, answered=True)
    for now in range(1, 1000, 10):
        record = judge(record, sample, float(now), 20.0)
        assert record.verdict is Verdict.SLEEPING
    assert judge(record, replace(sample, alive=False), 1000.0, 20.0).verdict is Verdict.STALLED


def test_sleep_starts_no_revision():
    first = Deployment(DeploymentSpec("bank", "models:/bank/1"))
    second = first.changed(replace(first.spec, asleep=True), 1.0)
    assert (second.generation, second.revision) == (2, 1)


async def test_put_to_sleep_by_hand_it_is_neither_routed_to_nor_restarted_nor_woken(plane):
    await up(plane)
    before = plane.running()
    plane.prober.samples["bank-r1-0"] = ASLEEP
    await plane.steps(100)
    assert plane.running() == before
    assert await weights(plane) == [0.0, 1.0]
    plane.prober.samples["bank-r1-1"] = ASLEEP
    await plane.steps(2)
    assert await weights(plane) == [0.0, 0.0]
    status = await plane.state.get_status("bank")
    assert status.phase is DeploymentPhase.SLEEPING
    assert {one.state for one in status.replicas} == {ReplicaState.SLEEPING}
    assert plane.turner.asked == []


async def test_sleep_withdraws_first_and_wake_brings_back(plane):
    await up(plane)
    await up_to_sleep(plane)
    assert await phase(plane) is DeploymentPhase.SLEEPING
    plane.restart()
    await plane.steps(3)
    assert await phase(plane) is DeploymentPhase.SLEEPING
    assert len(plane.turner.asked) == 2

    await plane.ask(min_replicas=2, max_replicas=2, asleep=False)
    await plane.steps(1)
    assert await phase(plane) is DeploymentPhase.UPDATING
    await plane.steps(3)
    assert await phase(plane) is DeploymentPhase.READY
    assert await weights(plane) == [1.0, 1.0]
    assert plane.turner.asked[2:] == [("bank-r1-0", False), ("bank-r1-1", False)]


async def up_to_sleep(plane):
    await plane.ask(min_replicas=2, max_replicas=2, asleep=True)
    await plane.steps(1)
    assert await weights(plane) == [0.0, 0.0]
    assert plane.turner.asked == []  # gateways may not know yet
    assert await phase(plane) is DeploymentPhase.UPDATING
    await plane.steps(4)
    assert plane.turner.asked == [("bank-r1-0", True), ("bank-r1-1", True)]


async def test_a_replica_started_anew_falls_asleep_too(plane):
    await up(plane)
    await up_to_sleep(plane)
    plane.prober.samples["bank-r1-0"] = Sample(True, ready=True)  # it crashed and loaded again
    await plane.steps(4)
    assert plane.turner.asked[2:] == [("bank-r1-0", True)]
    assert await phase(plane) is DeploymentPhase.SLEEPING


async def test_a_change_of_what_sleeps_is_rolled_out(plane):
    await up(plane)
    await up_to_sleep(plane)
    await plane.ask(model="models:/bank/2", min_replicas=2, max_replicas=2, asleep=True)
    await plane.steps(40)
    assert plane.running() == ["bank-r2-0", "bank-r2-1"]
    assert await phase(plane) is DeploymentPhase.SLEEPING


async def test_what_cannot_sleep_says_so_and_is_asked_again_later(plane):
    await up(plane)
    plane.turner.refusal = NotSupported("set the option enable_sleep_mode")
    await plane.ask(min_replicas=2, max_replicas=2, asleep=True)
    await plane.steps(8)
    status = await plane.state.get_status("bank")
    assert status.phase is DeploymentPhase.DEGRADED
    assert "bank-r1-0 cannot fall asleep: set the option enable_sleep_mode" in status.message
    assert len(plane.turner.asked) == 2
    await plane.steps(12)
    assert len(plane.turner.asked) == 4
