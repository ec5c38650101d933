"""Many models on one machine: the whole control plane over the driver's twin, on a manual clock."""

from __future__ import annotations

import itertools
import random

import pytest
from crowd import SIZE_MB, Clients, phase, present, residence

from cloudlm.control.probe import Sample
from cloudlm.core.deployment import DeploymentPhase, Residence
from cloudlm.core.rollout import Kind, Step, Strategy


@pytest.fixture
def crowd(plane):
    """A plane with room for three models."""
    plane.budget_mb = 3 * SIZE_MB
    plane.restart()
    return plane


async def test_fifty_models_are_served_from_memory_for_three(crowd):
    """Zipf's law decides who is asked: a few all the time, most now and then. Every request is
    answered, and never are there more than three models."""
    dice = random.Random(7)
    names = [f"m{number:02d}" for number in range(50)]
    for name in names:
        await crowd.ask(name, memory_mb=SIZE_MB)
    clients = Clients(crowd)
    weights = [1 / rank for rank in range(1, 51)]
    crowd.world.start_s = 2.0
    asked = set()
    for _ in range(300):
        for name in dice.choices(names, weights, k=dice.choice([0, 0, 1])):
            asked.add(name)
            clients.ask(name)
        await clients.second()
        assert len(present(crowd)) <= 3
    for name in sorted(set(names) - asked):
        clients.ask(name)
    for _ in range(400):
        if not clients.waiting:
            break
        await clients.second()
        assert len(present(crowd)) <= 3
    assert clients.answered == clients.sent
    assert clients.longest_s < 300.0  # gateway.hold_timeout_s


async def test_all_at_once_have_their_turns(crowd):
    names = [f"m{number}" for number in range(12)]
    for name in names:
        await crowd.ask(name, memory_mb=SIZE_MB)
    clients = Clients(crowd)
    for _ in range(200):
        for name in names:
            clients.ask(name)  # without a pause: nobody is ever idle
        await clients.second()
    assert clients.longest_s < 12 / 3 * 30.0
    before = clients.answered
    assert before > 0
    for name in names:
        assert not clients.waiting.get(name) or min(clients.waiting[name]) > 60.0


async def test_no_request_under_way_is_cut_however_long_it_takes(crowd):
    for number in range(3):
        await crowd.ask(f"m{number}", memory_mb=SIZE_MB)
    clients = Clients(crowd)
    for number in range(3):
        clients.ask(f"m{number}")
        await clients.second()
    for number in range(3):
        crowd.prober.samples[f"m{number}-r1-0"] = Sample(True, ready=True, running=1, steps=1)
    await crowd.ask("new", memory_mb=SIZE_MB)
    clients.ask("new")
    for step in range(100):  # far beyond the time limit of a drain
        for number in range(3):
            name = f"m{number}-r1-0"
            crowd.prober.samples[name] = Sample(True, ready=True, running=1, steps=step)
        await clients.second()
    assert present(crowd) == {"m0", "m1", "m2"}
    assert await residence(crowd, "new") is Residence.WAITING
    leaving = [n for n in ("m0", "m1", "m2") if await residence(crowd, n) is Residence.LEAVING]
    assert len(leaving) == 1
    message = (await crowd.state.get_status("new")).message
    assert "waits for 100 MiB of memory" in message
    assert leaving[0] in message
    crowd.prober.samples.clear()
    for _ in range(8):
        await clients.second()
    assert "new" in present(crowd)
    assert not clients.waiting


async def test_pinned_stays_whoever_else_is_asked(crowd):
    await crowd.ask("pinned", memory_mb=SIZE_MB, pinned=True)
    others = [f"m{number}" for number in range(6)]
    for name in others:
        await crowd.ask(name, memory_mb=SIZE_MB)
    await crowd.steps(3)
    clients = Clients(crowd)
    for name in itertools.chain(*[others] * 5):
        clients.ask(name)
        for _ in range(10):
            await clients.second()
            assert "pinned" in present(crowd)
    assert clients.answered == clients.sent


async def test_what_is_unloaded_says_so_and_a_new_control_knows(crowd):
    for number in range(4):
        await crowd.ask(f"m{number}", memory_mb=SIZE_MB)
    await crowd.steps(3)
    outside = ({f"m{number}" for number in range(4)} - present(crowd)).pop()
    status = await crowd.state.get_status(outside)
    assert (status.phase, status.residence) == (DeploymentPhase.IDLE, Residence.UNLOADED)
    assert "a request loads it" in status.message
    inside = sorted(present(crowd))
    assert (await crowd.state.get_status(inside[0])).memory_bytes == SIZE_MB * 2**20
    crowd.restart()
    await crowd.steps(3)
    assert sorted(present(crowd)) == inside
    told = dict(
        line.rsplit(" ", 1)
        for line in crowd.metrics.exposition().decode().splitlines()
        if line.startswith("cloudlm_")
    )
    assert float(told["cloudlm_control_memory_budget_bytes"]) == 3 * SIZE_MB * 2**20
    assert float(told["cloudlm_control_memory_held_bytes"]) == 3 * SIZE_MB * 2**20


async def test_without_a_budget_nothing_is_said_or_done(plane):
    for number in range(6):
        await plane.ask(f"m{number}", memory_mb=10**6)
    await plane.steps(3)
    assert len(present(plane)) == 6
    assert await residence(plane, "m0") is Residence.NONE


async def test_a_model_that_can_never_fit_fails_and_says_what_it_needs(crowd):
    await crowd.ask("huge", memory_mb=4 * SIZE_MB)
    await crowd.steps(3)
    status = await crowd.state.get_status("huge")
    assert (status.phase, status.residence) == (DeploymentPhase.FAILED, Residence.TOO_LARGE)
    assert "needs 400 MiB" in status.message
    assert "budget of 300 MiB" in status.message
    assert present(crowd) == set()


async def test_a_new_revision_without_room_beside_the_old_takes_its_place(crowd):
    """The old one finishes and goes first; requests wait meanwhile."""
    await crowd.ask("bank", memory_mb=2 * SIZE_MB, max_surge=1)
    clients = Clients(crowd)
    clients.ask("bank")
    for _ in range(5):
        await clients.second()
    await crowd.ask("bank", "models:/bank/2", memory_mb=2 * SIZE_MB, max_surge=1)
    for _ in range(20):
        clients.ask("bank")
        await clients.second()
        assert len(crowd.running()) <= 1
    assert crowd.running() == ["bank-r2-0"]
    assert await phase(crowd, "bank") is DeploymentPhase.READY


async def test_a_canary_gets_the_place_of_what_nobody_asks(crowd):
    canary = Strategy(Kind.CANARY, steps=(Step(10.0, 600.0),))
    await crowd.ask("bank", memory_mb=SIZE_MB, rollout=canary)
    for number in range(2):
        await crowd.ask(f"m{number}", memory_mb=SIZE_MB)
    clients = Clients(crowd)
    clients.ask("bank")
    for _ in range(5):
        await clients.second()
    assert len(present(crowd)) == 3
    await crowd.ask("bank", "models:/bank/2", memory_mb=SIZE_MB, rollout=canary)
    for _ in range(12):
        clients.ask("bank")
        await clients.second()
        assert len(crowd.running()) <= 3
    assert {"bank-r1-0", "bank-r2-0"} <= set(crowd.running())


async def test_what_was_put_to_sleep_goes_first_and_does_not_come_by_itself(crowd):
    for number in range(3):
        await crowd.ask(f"m{number}", memory_mb=SIZE_MB)
    clients = Clients(crowd)
    await crowd.steps(3)
    await crowd.ask("m1", memory_mb=SIZE_MB, asleep=True)
    await crowd.steps(6)
    assert await phase(crowd, "m1") is DeploymentPhase.SLEEPING
    await crowd.ask("new", memory_mb=SIZE_MB)
    clients.ask("new")
    for _ in range(12):
        await clients.second()
    assert present(crowd) == {"m0", "m2", "new"}
    assert not clients.waiting
    assert await residence(crowd, "m1") is Residence.UNLOADED


async def test_memory_of_what_is_being_removed_counts_until_it_is_gone(crowd):
    for number in range(3):
        await crowd.ask(f"m{number}", memory_mb=SIZE_MB)
    clients = Clients(crowd)
    for number in range(3):
        clients.ask(f"m{number}")
    for _ in range(4):
        await clients.second()
    await crowd.state.mark_deleting("m0", now=crowd.clock.now())
    await crowd.ask("new", memory_mb=SIZE_MB)
    clients.ask("new")
    for _ in range(10):
        await clients.second()
        assert len(present(crowd)) <= 3
    assert present(crowd) == {"m1", "m2", "new"}


async def test_a_deletion_keeps_to_the_drain_timeout(crowd):
    """Under a budget too: only what goes to make room for others may take its time."""
    await crowd.ask("m0", memory_mb=SIZE_MB)
    await crowd.steps(3)
    crowd.prober.samples["m0-r1-0"] = Sample(True, ready=True, running=1, steps=1)
    await crowd.steps(1)
    await crowd.state.mark_deleting("m0", now=crowd.clock.now())
    for step in range(20):  # its steps go on: it is at work, and does not stand still
        crowd.prober.samples["m0-r1-0"] = Sample(True, ready=True, running=1, steps=step + 2)
        await crowd.steps(1, seconds=1.0)
    assert crowd.running() == ["m0-r1-0"]
    for step in range(20, 40):
        crowd.prober.samples["m0-r1-0"] = Sample(True, ready=True, running=1, steps=step + 2)
        await crowd.steps(1, seconds=1.0)
    assert crowd.running() == []
    assert await crowd.state.get_deployment("m0") is None
