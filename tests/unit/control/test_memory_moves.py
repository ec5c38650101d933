"""Roll-outs and moves between drivers under a memory budget: the whole control plane."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from crowd import SIZE_MB, Clients, at_work, present, residence

from cloudlm.core.deployment import Demand, DeploymentSpec, Residence
from cloudlm.core.errors import StorageFailed
from cloudlm.core.external import EXTERNAL, ExternalEndpoint
from cloudlm.core.model import ModelFile
from cloudlm.core.rollout import DEFAULT_STRATEGY, Kind, Outcome, Step, Strategy
from cloudlm.core.spec import check_spec

CANARY = Strategy(Kind.CANARY, steps=(Step(10.0, 6000.0),), start_timeout_s=10.0)
MIB = 2**20


def roomy(plane, budget_mb=3 * SIZE_MB):
    plane.budget_mb = budget_mb
    plane.restart()
    return plane


@pytest.fixture
def crowd(plane):
    """A plane with room for three models."""
    return roomy(plane)


async def own(plane, version=1, name="bank", **more):
    await plane.ask(name, f"models:/bank/{version}", **{"memory_mb": SIZE_MB, **more})


async def foreign(plane, rollout=DEFAULT_STRATEGY):
    endpoints = (ExternalEndpoint("https://a.example/v1", "big"),)
    spec = DeploymentSpec("bank", "big", EXTERNAL, endpoints=endpoints, rollout=rollout)
    await plane.state.put_deployment(check_spec(spec), now=plane.clock.now())


async def passes(plane, count=4, *busy):
    for _ in range(count):
        at_work(plane, *busy)
        await plane.steps(1)
        for _ in range(5):  # looks at endpoints are taken in the background
            await asyncio.sleep(0)


async def fill(plane, count=3):
    """So many models are in memory, and each has a request that never ends."""
    busy = [f"m{number}-r1-0" for number in range(count)]
    for number in range(count):
        await own(plane, name=f"m{number}")
    at_work(plane, *busy)
    await passes(plane, 4, *busy)
    assert {f"m{number}" for number in range(count)} <= present(plane)
    return busy


async def outcome(plane, number):
    found = {one.number: one.outcome for one in await plane.state.list_revisions("bank")}
    return found[number]


async def asks(plane, *names):
    await plane.state.put_demand([Demand(n, "g1", 1, 1, 1.0, plane.clock.now()) for n in names])


# Between drivers ----------------------------------------------------------------------------------


async def test_endpoints_of_others_take_none_of_the_room_for_our_own(crowd):
    await foreign(crowd)
    await passes(crowd)
    assert await crowd.serving() == ["bank-r1-0"]
    await own(crowd)
    await passes(crowd, 10)
    assert crowd.running() == ["bank-r2-0"]
    assert await crowd.serving() == ["bank-r2-0"]


async def test_endpoints_stay_while_what_replaces_them_has_no_room(crowd):
    await foreign(crowd)
    await passes(crowd)
    busy = await fill(crowd)
    await own(crowd)
    for _ in range(20):
        await asks(crowd, "bank")
        await passes(crowd, 1, *busy)
        assert "bank-r1-0" in await crowd.serving()
    assert await residence(crowd, "bank") is Residence.WAITING


async def test_of_two_wished_one_that_fits_takes_no_endpoint_away(crowd):
    await foreign(crowd)
    await passes(crowd)
    busy = await fill(crowd, 2)
    await own(crowd, min_replicas=2, max_replicas=2)
    await passes(crowd, 20, *busy)
    assert set(await crowd.serving()) >= {"bank-r1-0", "bank-r2-0"}


async def test_unloading_ours_leaves_the_endpoints_of_others(crowd):
    await foreign(crowd, CANARY)
    await passes(crowd)
    await own(crowd, rollout=CANARY)
    await passes(crowd, 6)
    assert crowd.running() == ["bank-r2-0"]
    for number in range(3):
        await own(crowd, name=f"m{number}")
    for _ in range(40):
        await asks(crowd, "m0", "m1", "m2")
        await passes(crowd, 1)
        assert "bank-r1-0" in await crowd.serving()
    assert present(crowd) == {"m0", "m1", "m2"}


async def test_what_moves_to_others_step_by_step_is_still_in_the_budget(crowd):
    await own(crowd, rollout=CANARY)
    await passes(crowd)
    await foreign(crowd, CANARY)
    await passes(crowd, 6)
    assert crowd.running() == ["bank-r1-0"]
    status = await crowd.state.get_status("bank")
    assert (status.residence, status.memory_bytes) == (Residence.RESIDENT, SIZE_MB * MIB)


# Roll-outs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [CANARY, DEFAULT_STRATEGY], ids=["canary", "rolling"])
async def test_a_roll_out_that_stands_still_starves_nobody(crowd, strategy):
    """Its target goes for who is asked, its stable revision stays."""
    await own(crowd, rollout=strategy)
    busy = await fill(crowd, 1)
    await own(crowd, 2, rollout=strategy)
    await passes(crowd, 1, *busy)
    crowd.prober.silence("bank-r2-0")
    await passes(crowd, 3, *busy)
    kept = next(one for one in await crowd.state.list_rollouts() if one.name == "bank")
    paused = replace(kept, paused_at=crowd.clock.now())
    await crowd.state.put_rollout(paused, replaces=kept)
    await passes(crowd, 1, *busy)
    assert {"bank-r1-0", "bank-r2-0", "m0-r1-0"} == set(crowd.running())
    await own(crowd, name="new")
    for _ in range(60):
        await asks(crowd, "new")
        await passes(crowd, 1, *busy)
    assert {"bank-r1-0", "m0-r1-0", "new-r1-0"} == set(crowd.running())


async def test_a_paused_update_that_was_unloaded_comes_back(crowd):
    await own(crowd)
    await passes(crowd)
    await own(crowd, 2)
    await passes(crowd, 1)
    kept = next(one for one in await crowd.state.list_rollouts() if one.name == "bank")
    await crowd.state.put_rollout(replace(kept, paused_at=crowd.clock.now()), replaces=kept)
    await passes(crowd, 2)
    for number in range(3):
        await own(crowd, name=f"m{number}")
    for _ in range(40):
        await asks(crowd, "m0", "m1", "m2")
        await passes(crowd, 1)
    assert present(crowd) == {"m0", "m1", "m2"}
    for _ in range(60):
        await asks(crowd, "bank")
        await passes(crowd, 1)
    assert "bank" in present(crowd)


async def test_a_canary_of_a_model_at_zero_is_started_and_tried(crowd):
    await own(crowd, min_replicas=0, rollout=CANARY)
    await passes(crowd)
    assert await outcome(crowd, 1) is Outcome.PROMOTED
    await own(crowd, 2, min_replicas=0, rollout=CANARY)
    await passes(crowd, 60)
    assert "bank-r2-0" in crowd.running()
    assert await outcome(crowd, 2) is Outcome.PENDING


async def test_a_canary_that_waits_for_memory_is_not_late(crowd):
    await own(crowd, rollout=CANARY)
    await passes(crowd)
    busy = await fill(crowd, 2)
    await own(crowd, 2, rollout=CANARY)
    for _ in range(10 * int(CANARY.start_timeout_s)):
        await passes(crowd, 1, *busy)
        assert len(crowd.running()) <= 3
    assert (await crowd.state.get_deployment("bank")).revision == 2
    assert await outcome(crowd, 2) is Outcome.PENDING
    crowd.prober.samples.clear()
    for name in ("m0", "m1"):
        await crowd.state.mark_deleting(name, now=crowd.clock.now())
    await passes(crowd, 30)
    assert {"bank-r1-0", "bank-r2-0"} <= set(crowd.running())
    assert await outcome(crowd, 2) is Outcome.PENDING


async def test_a_canary_that_does_not_start_although_there_is_room_is_late(crowd):
    await own(crowd, rollout=CANARY)
    await passes(crowd)
    crowd.prober.silence("bank-r2-0")
    await own(crowd, 2, rollout=CANARY)
    await passes(crowd, 40)
    assert await outcome(crowd, 2) is Outcome.ROLLED_BACK


async def test_a_canary_takes_the_room_of_its_step_and_no_more(plane):
    crowd = roomy(plane, 6 * SIZE_MB)
    four = {"min_replicas": 4, "max_replicas": 4, "rollout": CANARY}
    await own(crowd, **four)
    await own(crowd, name="m0")
    clients = Clients(crowd)
    for _ in range(5):
        clients.ask("bank")
        await clients.second()
    assert len(crowd.running()) == 5
    await own(crowd, 2, **four)
    for _ in range(20):
        clients.ask("bank")
        await clients.second()
        assert "m0" in present(crowd)
    assert "bank-r2-0" in crowd.running()


async def test_revisions_of_different_size_never_overrun_the_budget(plane):
    """The small one would fit beside what runs; the large one, which is to answer, would not."""
    crowd = roomy(plane, 2200)
    small, large = crowd.registry.versions["bank"]
    weights = (ModelFile("model.safetensors", 1024 * MIB, "0" * 64),)
    crowd.registry.versions["bank"] = [small, replace(large, files=weights)]
    sizes_mb = {"bank-r1": 400 + 512 + 1024, "bank-r2": 400 + 512, "m0-r1": 1200}
    await own(crowd, 2, memory_mb=0, rollout=CANARY)
    await passes(crowd)
    await own(crowd, name="m0", memory_mb=1200)
    for _ in range(20):
        await asks(crowd, "m0")
        await passes(crowd, 1)
    assert present(crowd) == {"m0"}
    await own(crowd, 1, memory_mb=0, rollout=CANARY)
    for _ in range(20):
        await passes(crowd, 1, "m0-r1-0")
        held_mb = sum(sizes_mb[one.rpartition("-")[0]] for one in crowd.running())
        assert held_mb <= 2200


# What goes wrong ----------------------------------------------------------------------------------


async def test_what_starts_and_hangs_gives_way_in_the_end(crowd):
    patient = Strategy(start_timeout_s=60.0)
    for number in range(3):
        await own(crowd, name=f"m{number}", rollout=patient)
        crowd.prober.silence(f"m{number}-r1-0")
    await passes(crowd)
    await own(crowd, name="new")
    for _ in range(160):
        await asks(crowd, "m0", "m1", "m2", "new")
        await passes(crowd, 1)
    assert "new" in present(crowd)


async def test_one_deployment_whose_facts_cannot_be_had_hinders_no_other(crowd):
    need = crowd.memory.need

    async def troubled(running, memory_mb=0):
        if memory_mb == 7:
            raise RuntimeError("no such luck")
        return await need(running, memory_mb)

    crowd.memory.need = troubled
    await own(crowd, name="bad", memory_mb=7)
    await own(crowd, name="good")
    await passes(crowd)
    assert present(crowd) == {"good"}
    assert "not known" in (await crowd.state.get_status("bad")).message


async def test_what_cannot_be_planned_still_gives_way(crowd):
    await own(crowd)
    await passes(crowd)
    resolve = crowd.registry.resolve

    def troubled(ref):
        if ref.version == 2:
            raise StorageFailed("the disk is gone")
        return resolve(ref)

    crowd.registry.resolve = troubled
    await own(crowd, 2)
    for number in range(3):
        await own(crowd, name=f"m{number}")
    for _ in range(40):
        await asks(crowd, "m0", "m1", "m2")
        await passes(crowd, 1)
    assert present(crowd) == {"m0", "m1", "m2"}


async def test_other_tenants_deployments_are_counted_not_named(crowd):
    for number in range(3):
        await own(crowd, name=f"m{number}", tenant="rivals")
    await passes(crowd)
    busy = [f"m{number}-r1-0" for number in range(3)]
    for _ in range(12):
        await passes(crowd, 1, *busy)
    await own(crowd, name="new", tenant="ours")
    for _ in range(100):
        await asks(crowd, "new")
        await passes(crowd, 1, *busy)
    message = (await crowd.state.get_status("new")).message
    assert "leaving: 1 of other tenants" in message
    assert not any(f"m{number}" in message for number in range(3))


async def test_what_belongs_to_nobody_is_not_free(crowd):
    busy = await fill(crowd, 2)
    await own(crowd, name="stays", pinned=True)
    await passes(crowd, 4, *busy)
    marked = await crowd.state.mark_deleting("m0", now=crowd.clock.now())
    await crowd.state.remove_deployment("m0", generation=marked.generation)
    await own(crowd, name="new")
    await asks(crowd, "new")
    await passes(crowd, 2, *busy)
    message = (await crowd.state.get_status("new")).message
    assert "; 0 MiB of 300 MiB are free" in message


async def test_a_canary_that_is_not_in_memory_still_says_how_far_it_is(crowd):
    await own(crowd, rollout=CANARY)
    await passes(crowd)
    busy = await fill(crowd, 2)
    await own(crowd, name="m2", pinned=True)
    await passes(crowd, 10, *busy)
    assert present(crowd) == {"m0", "m1", "m2"}
    await own(crowd, 2, rollout=CANARY)
    await passes(crowd, 3, *busy)
    assert "step 1 of 1" in (await crowd.state.get_status("bank")).message
    await crowd.state.mark_deleting("bank", now=crowd.clock.now())
    await crowd.reconciler.step()
    status = await crowd.state.get_status("bank")
    assert status is None or "a request loads it" not in status.message
