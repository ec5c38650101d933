"""A roll-out whose target can never be in memory ends with a reason; nothing is given up for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from crowd import SIZE_MB, at_work
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.control.misfits import (
    Side,
    Sizes,
    kept_by_others,
    least_beside,
    least_wanted,
    never_fits,
    why_never,
)
from cloudlm.control.residency import Claim, reside
from cloudlm.control.rollout import Facts, size_of
from cloudlm.control.rollout_view import view_of
from cloudlm.control.room import Moving, Wish
from cloudlm.core.deployment import Deployment, DeploymentSpec
from cloudlm.core.model import ModelFile
from cloudlm.core.rollout import Kind, Outcome, Revision, Stage, Step, Strategy

MIB = 2**20
PROCESS_MB = 400 + 512
"""What a replica takes beside its weights, where its deployment does not say (``footprint``)."""
STAGED = {
    kind: Strategy(kind, steps=(Step(10.0, 6000.0),), start_timeout_s=20.0)
    for kind in (Kind.CANARY, Kind.BLUE_GREEN, Kind.MIRROR)
}
ROLLING = Strategy(start_timeout_s=20.0)


def roomy(plane, budget_mb):
    plane.budget_mb = budget_mb
    plane.restart()
    return plane


def weighs(plane, *weights_mb):
    """The versions of the model, one after the other, have weights of so many MiB."""
    versions = plane.registry.versions["bank"]
    plane.registry.versions["bank"] = [
        replace(one, files=(ModelFile("model.safetensors", size * MIB, "0" * 64),))
        for one, size in zip(versions, weights_mb, strict=True)
    ]


async def own(plane, version=1, name="bank", **more):
    await plane.ask(name, f"models:/bank/{version}", **more)


async def seconds(plane, count):
    """So many seconds in which all that runs is asked all the time."""
    for _ in range(2 * count):
        at_work(plane, *plane.running())
        await plane.steps(1)


async def revisions(plane):
    return {one.number: one for one in await plane.state.list_revisions("bank")}


async def said(plane, name="bank"):
    return (await plane.state.get_status(name)).message


def wish(wanted, least=1, most=10):
    spec = DeploymentSpec("bank", "models:/bank/1", min_replicas=least, max_replicas=most)
    return Wish(
        Deployment(spec, 1, 1), Deployment(spec, 1, 1), wanted, [], "models:/bank/1", Moving()
    )


# The rule -----------------------------------------------------------------------------------------


@given(
    wanted=st.integers(1, 40),
    least=st.integers(1, 40),
    share=st.sampled_from([0.05, 0.1, 0.25, 0.5, 1.0]),
)
def test_what_a_quieter_moment_wants_is_never_reckoned_too_high(wanted, least, share):
    """'Never' must hold whatever the load: of stable and target the fewest there can be count."""
    fewest = least_wanted(wish(wanted, least))
    assert fewest == min(wanted, least)
    stage = Stage(share, 0.0, share, 0.0)
    now, quiet = (size_of(stage, Facts(number)) for number in (wanted, fewest))
    assert 1 <= least_beside(now, wish(wanted, least)) <= quiet


def test_what_fits_beside_may_come_and_what_does_not_never_will():
    stable, target = Side(1, 2, 10), Side(2, 1, 12)
    assert not never_fits(target, stable, 32)
    assert never_fits(target, stable, 31)
    assert not never_fits(target, None, 12)
    assert never_fits(target, None, 11)
    small = Side(2, 2, 4)
    assert not never_fits(small, stable, 34), "the last start needs room for the larger of both"
    assert never_fits(small, stable, 33)


@given(
    stable=st.integers(1, 3),
    target=st.integers(1, 3),
    stable_mb=st.integers(1, 30),
    target_mb=st.integers(1, 30),
    budget_mb=st.integers(1, 120),
)
def test_never_is_what_residency_would_not_grant_on_an_empty_machine(
    stable, target, stable_mb, target_mb, budget_mb
):
    """Whoever else is there: with the whole budget to itself the last replica gets no room."""
    sizes = (target_mb,) * (target - 1) + (stable_mb,) * stable
    claim = Claim(
        "bank",
        max(stable_mb, target_mb),
        stable + target,
        present=len(sizes),
        held_bytes=sum(sizes),
        asked=True,
        used_at=0.0,
        loaded_at=0.0,
        sizes_bytes=sizes,
    )
    granted = reside([claim], budget_mb, 1000.0, 0.0)["bank"].replicas
    never = never_fits(Side(2, target, target_mb), Side(1, stable, stable_mb), budget_mb)
    assert never == (granted < stable + target)


def test_what_others_pinned_keep_is_not_to_be_had():
    claims = {
        "bank": Claim("bank", 10, 1, pinned=True, present=1),
        "kept": Claim("kept", 10, 2, pinned=True, least=2, present=2),
        "idle": Claim("idle", 10, 1, present=1),
        "huge": Claim("huge", 1000, 1, pinned=True),
    }
    assert kept_by_others("bank", claims, 100) == 20


# In the loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STAGED)
async def test_a_target_that_never_fits_beside_the_stable_revision_is_rolled_back(plane, kind):
    roomy(plane, 2 * PROCESS_MB + 200)
    weighs(plane, 50, 300)
    await own(plane, rollout=STAGED[kind])
    await seconds(plane, 3)
    await own(plane, 2, rollout=STAGED[kind])
    await seconds(plane, 15)
    why = "revision 2 (1 x 1.2 GiB) can never be in memory beside revision 1 (1 x 962 MiB)"
    assert why in await said(plane)
    deployment = await plane.state.get_deployment("bank")
    assert why in (await view_of(plane.state, deployment, plane.clock.now())).note
    assert (await revisions(plane))[2].outcome is Outcome.PENDING
    await seconds(plane, 10)
    ended = (await revisions(plane))[2]
    assert ended.outcome is Outcome.ROLLED_BACK
    assert f"not ready within 20 s: {why}" in ended.reason
    assert why in await said(plane)
    assert plane.running() == await plane.serving() == ["bank-r1-0"]
    assert not any(one.startswith("bank-r2") for one in plane.world.started)


async def test_without_roll_back_it_is_said_and_left_to_people(plane):
    roomy(plane, 2 * PROCESS_MB + 200)
    weighs(plane, 50, 300)
    canary = replace(STAGED[Kind.CANARY], auto_rollback=False)
    await own(plane, rollout=canary)
    await seconds(plane, 3)
    await own(plane, 2, rollout=canary)
    await seconds(plane, 40)
    assert "can never be in memory" in await said(plane)
    assert (await revisions(plane))[2].outcome is Outcome.PENDING
    assert await plane.serving() == ["bank-r1-0"]


async def test_what_only_waits_for_others_is_not_ended(plane):
    """The other one could be unloaded, if it were not asked all the time."""
    roomy(plane, 3 * SIZE_MB)
    await own(plane, memory_mb=SIZE_MB, rollout=STAGED[Kind.CANARY])
    for number in range(2):
        await own(plane, name=f"m{number}", memory_mb=SIZE_MB)
    await seconds(plane, 3)
    await own(plane, 2, memory_mb=SIZE_MB, rollout=STAGED[Kind.CANARY])
    await seconds(plane, 60)
    assert (await revisions(plane))[2].outcome is Outcome.PENDING
    assert "can never be" not in await said(plane)


async def test_a_pinned_neighbour_can_be_why(plane):
    roomy(plane, 3 * SIZE_MB)
    await own(plane, memory_mb=SIZE_MB, rollout=STAGED[Kind.CANARY])
    pinned = {"pinned": True, "min_replicas": 2, "max_replicas": 2}
    await own(plane, name="other", memory_mb=SIZE_MB, **pinned)
    await seconds(plane, 3)
    await own(plane, 2, memory_mb=SIZE_MB, rollout=STAGED[Kind.CANARY])
    await seconds(plane, 5)
    assert "of which pinned deployments keep 200 MiB" in await said(plane)
    await seconds(plane, 30)
    assert (await revisions(plane))[2].outcome is Outcome.ROLLED_BACK


async def test_a_rolling_update_gives_up_nothing_for_what_can_never_be_loaded(plane):
    """The budget was lowered, or an alias moved: what the API refuses can still come to be."""
    roomy(plane, PROCESS_MB + 200)
    weighs(plane, 50, 300)
    await own(plane, rollout=ROLLING)
    await seconds(plane, 3)
    await own(plane, 2, rollout=ROLLING)
    for _ in range(15):
        await seconds(plane, 1)
        assert await plane.serving() == ["bank-r1-0"]
    assert "revision 2 (1 x 1.2 GiB) can never be in memory: the budget" in await said(plane)
    await seconds(plane, 10)
    assert (await revisions(plane))[2].outcome is Outcome.ROLLED_BACK
    assert plane.running() == await plane.serving() == ["bank-r1-0"]
    assert "revision 2 was rolled back" in await said(plane)


async def test_a_control_that_begins_anew_does_not_begin_to_wait_anew(plane):
    roomy(plane, 2 * PROCESS_MB + 200)
    weighs(plane, 50, 300)
    await own(plane, rollout=STAGED[Kind.CANARY])
    await seconds(plane, 3)
    await own(plane, 2, rollout=STAGED[Kind.CANARY])
    for _ in range(5):
        await seconds(plane, 5)
        plane.restart()
    await seconds(plane, 2)
    assert (await revisions(plane))[2].outcome is Outcome.ROLLED_BACK


async def test_room_that_is_made_lets_it_go_on(plane):
    """A larger budget, or fewer replicas wanted, before its time is over."""
    roomy(plane, 3 * PROCESS_MB + 100)
    weighs(plane, 10, 200)
    two = {"min_replicas": 2, "max_replicas": 2, "rollout": STAGED[Kind.CANARY]}
    await own(plane, **two)
    await seconds(plane, 3)
    await own(plane, 2, **two)
    await seconds(plane, 5)
    assert "can never be in memory" in await said(plane)
    await own(plane, 2, **{**two, "min_replicas": 1, "max_replicas": 1})
    plane.prober.samples.clear()
    await plane.steps(60)
    assert "bank-r2-0" in plane.running()
    assert (await revisions(plane))[2].outcome is Outcome.PENDING


async def test_what_serves_follows_its_load_while_its_successor_is_kept_out(plane):
    """Nobody decides for an hour (no roll-back by itself): the old revision scales meanwhile."""
    roomy(plane, 2 * PROCESS_MB + 150)
    weighs(plane, 50, 1200)
    rolling = replace(ROLLING, auto_rollback=False)
    await own(plane, rollout=rolling, max_replicas=2)
    await seconds(plane, 3)
    await own(plane, 2, rollout=rolling, max_replicas=2)
    await seconds(plane, 3)
    assert "can never be in memory" in await said(plane)
    await own(plane, 2, rollout=rolling, min_replicas=2, max_replicas=2)
    await seconds(plane, 5)
    assert await plane.serving() == ["bank-r1-0", "bank-r1-1"]
    assert set(plane.world.groups) == {"bank-r1"}, "and no empty group for what never comes"
    assert "can never be in memory" in await said(plane)
    await own(plane, 2, rollout=rolling, min_replicas=1, max_replicas=1)
    plane.prober.samples.clear()
    await plane.steps(20)
    assert await plane.serving() == plane.running() == ["bank-r1-0"]


@given(target=st.integers(1, 60), stable=st.integers(0, 60), budget=st.integers(1, 120))
def test_never_depends_on_nothing_but_the_sizes(target, stable, budget):
    spec = DeploymentSpec("bank", "models:/bank/2")
    moving = Moving(1, Revision(1, spec), 1)
    asked = replace(wish(1), deployment=Deployment(spec, 2, 2), moving=moving)
    sizes = Sizes(target, stable or None)
    why = why_never(asked, sizes, {}, budget)
    need = target if not stable else stable + max(target, stable)
    assert bool(why) == (need > budget)
    settled = replace(asked, deployment=Deployment(spec, 1, 1))
    assert why_never(settled, sizes, {}, budget) == ""
