"""Roll-outs through the whole loop, over a world of facts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rolling_world import STRATEGIES, Answers, takes

from cloudlm.control.probe import Sample
from cloudlm.core.deployment import Demand, DeploymentPhase
from cloudlm.core.errors import Unavailable
from cloudlm.core.rollout import Kind, Order, Outcome, Strategy


async def ask(plane, version, kind=Kind.CANARY, replicas=2, **more):
    await plane.ask(
        model=f"models:/bank/{version}",
        min_replicas=replicas,
        max_replicas=replicas,
        **{"rollout": STRATEGIES[kind], **more},
    )


async def run(plane, answers, passes, seconds=0.5):
    for _ in range(passes):
        await answers.give()
        await plane.steps(1, seconds)


async def shares(plane):
    return {one.replica: one.share for one in await plane.state.list_endpoints()}


async def test_a_canary_takes_its_share_then_all(plane):
    answers = Answers(plane)
    await ask(plane, 1)
    await plane.steps(3)
    await ask(plane, 2)
    await plane.steps(2)
    assert await shares(plane) == {"bank-r1-0": 0.9, "bank-r1-1": 0.9, "bank-r2-0": 0.1}
    status = await plane.state.get_status("bank")
    assert status.phase is DeploymentPhase.UPDATING
    assert status.message == "step 1 of 2: revision 2 gets 10 % of the requests"
    await run(plane, answers, 50)
    assert await shares(plane) == {"bank-r2-0": None, "bank-r2-1": None}
    assert plane.running() == ["bank-r2-0", "bank-r2-1"]
    assert (await plane.state.get_status("bank")).phase is DeploymentPhase.READY


async def test_a_slow_canary_is_rolled_back_and_its_wish_with_it(plane):
    answers = Answers(plane)
    await ask(plane, 1)
    await run(plane, answers, 6)
    answers.slow = {2}
    await ask(plane, 2, max_surge=3)
    await run(plane, answers, 30)
    deployment = await plane.state.get_deployment("bank")
    assert (deployment.revision, deployment.spec.model) == (1, "models:/bank/1")
    assert deployment.spec.max_surge == 3, "what no replica runs stays as it was asked"
    assert plane.running() == ["bank-r1-0", "bank-r1-1"]
    status = await plane.state.get_status("bank")
    assert status.phase is DeploymentPhase.READY
    assert "revision 2 was rolled back: time to first token" in status.message
    bad, _ = await plane.state.list_revisions("bank")
    assert bad.outcome is Outcome.ROLLED_BACK


async def test_after_a_return_the_same_wish_is_a_new_revision(plane):
    answers = Answers(plane)
    await ask(plane, 1)
    await run(plane, answers, 6)
    answers.bad = {2}
    await ask(plane, 2)
    await run(plane, answers, 30)
    await ask(plane, 2)
    await run(plane, answers, 50)
    assert plane.running() == ["bank-r3-0", "bank-r3-1"]


async def test_a_canary_that_crashes_is_rolled_back(plane):
    await ask(plane, 1)
    await plane.steps(3)
    plane.world.broken["models:/bank/2"] = "exit code 1: no such tensor"
    await ask(plane, 2)
    await plane.steps(20)
    assert plane.running() == ["bank-r1-0", "bank-r1-1"]
    assert "no such tensor" in (await plane.state.get_status("bank")).message


async def test_blue_green_needs_room_for_both_and_switches_at_once(plane):
    answers = Answers(plane)
    await ask(plane, 1, Kind.BLUE_GREEN)
    await plane.steps(3)
    await ask(plane, 2, Kind.BLUE_GREEN)
    seen = []
    for _ in range(40):
        await run(plane, answers, 1)
        takers = {one.revision for one in await plane.state.list_endpoints() if takes(one)}
        if not seen or seen[-1] != takers:
            seen.append(takers)
    assert seen == [{1}, {2}]
    assert plane.running() == ["bank-r2-0", "bank-r2-1"]


async def test_a_canary_scales_with_its_deployment(plane):
    await ask(plane, 1)
    await plane.steps(3)
    await ask(plane, 2)
    await plane.steps(3)
    await ask(plane, 2, replicas=5)
    await plane.steps(4)
    assert plane.running() == [*(f"bank-r1-{n}" for n in range(5)), "bank-r2-0"]
    rollout = await plane.state.get_rollout("bank")
    order = replace(rollout, order=Order.PROMOTE)
    await plane.state.put_rollout(order, replaces=rollout)
    await plane.steps(3)
    assert [one for one in plane.running() if "r2" in one] == [f"bank-r2-{n}" for n in range(3)]
    await ask(plane, 2, replicas=1)
    await plane.steps(8, seconds=1.0)
    assert plane.running() == ["bank-r1-0", "bank-r2-0"]


async def test_a_paused_update_mends_what_breaks_and_does_nothing_else(plane):
    await ask(plane, 1, Kind.ROLLING, replicas=3)
    await plane.steps(3)
    await ask(plane, 2, Kind.ROLLING, replicas=3)
    await plane.steps(2)
    rollout = await plane.state.get_rollout("bank")
    paused = replace(rollout, paused_at=plane.clock.now())
    await plane.state.put_rollout(paused, replaces=rollout)
    await plane.steps(2)
    before = plane.running()
    await plane.steps(20, seconds=1.0)
    assert plane.running() == before
    assert (await plane.state.get_status("bank")).message == "paused"
    await plane.state.put_rollout(rollout, replaces=paused)
    await plane.steps(30)
    assert plane.running() == ["bank-r2-0", "bank-r2-1", "bank-r2-2"]


async def test_an_undone_alias_runs_the_bytes_that_it_ran(plane):
    """Going back means the same version, though the alias has moved and the group is gone."""
    await plane.ask(model="models:/bank@champion")
    await plane.steps(3)
    plane.registry.set_alias("bank", "champion", 2)
    await plane.ask(model="models:/bank@champion", options={"dtype": "float32"})
    await plane.steps(20)
    assert plane.world.groups["bank-r2"].spec.model == "models:/bank/2"
    await plane.state.return_to("bank", 1, reason="undone", now=0.0)
    plane.restart()
    await plane.steps(20)
    assert list(plane.world.groups) == ["bank-r1"]
    assert plane.world.groups["bank-r1"].spec.model == "models:/bank/1"


async def test_a_control_that_was_killed_in_a_drain_lets_requests_end(plane):
    """The endpoint was taken by the control before: that nobody is asked now does not mean that
    nothing runs there."""
    await ask(plane, 1, Kind.ROLLING, replicas=2)
    await plane.steps(3)
    plane.prober.samples["bank-r1-1"] = Sample(True, ready=True, steps=1, running=1)
    await ask(plane, 1, Kind.ROLLING, replicas=1)
    await plane.steps(1)
    assert await plane.serving() == ["bank-r1-0"]
    plane.restart()
    await plane.steps(5, seconds=1.0)
    assert plane.running() == ["bank-r1-0", "bank-r1-1"]
    plane.prober.samples["bank-r1-1"] = Sample(True, ready=True, steps=2)
    await plane.steps(2, seconds=1.0)
    assert plane.running() == ["bank-r1-0"]


async def test_a_store_that_is_away_leaves_the_split_as_it_is(plane, monkeypatch):
    await ask(plane, 1)
    await plane.steps(3)
    await ask(plane, 2)
    await plane.steps(2)
    before = await shares(plane)

    async def away(*_, **__):
        raise Unavailable("the state is away")

    monkeypatch.setattr(plane.state, "latest_attempts", away)
    await plane.steps(10)
    assert await shares(plane) == before
    assert (await plane.state.get_status("bank")).message == "the state is away"


async def test_old_replicas_elsewhere_are_found_by_a_new_control(plane):
    await plane.ask(driver="memory", rollout=STRATEGIES[Kind.CANARY])
    await plane.steps(3)
    await plane.ask(driver="process", rollout=STRATEGIES[Kind.CANARY])
    await plane.steps(2)
    plane.restart()
    await run(plane, Answers(plane), 50)
    await plane.steps(20, seconds=1.0)  # nobody can be asked what runs there: the whole drain time
    assert plane.running() == ["bank-r2-0"]
    assert plane.elsewhere.groups == {}


@pytest.mark.parametrize("kind", [Kind.CANARY, Kind.MIRROR])
async def test_nothing_is_promoted_without_requests(plane, kind):
    await ask(plane, 1, kind)
    await plane.steps(3)
    await ask(plane, 2, kind)
    await plane.steps(100, seconds=1.0)
    assert (await plane.state.get_rollout("bank")).stable == 1


async def test_a_settled_deployment_costs_no_reading_of_its_history(plane, monkeypatch):
    await ask(plane, 1)
    await plane.steps(4)
    asked = []
    found = plane.state.list_revisions
    monkeypatch.setattr(
        plane.state, "list_revisions", lambda name: asked.append(name) or found(name)
    )
    await plane.steps(5)
    assert asked == []


async def test_scores_decide_where_they_are_asked_for(plane):
    answers = Answers(plane)
    strategy = replace(STRATEGIES[Kind.CANARY], min_score=0.8, min_scores=4)
    await ask(plane, 1, rollout=strategy)
    await plane.steps(3)
    await ask(plane, 2, rollout=strategy)
    await run(plane, answers, 40)
    assert (await plane.state.get_rollout("bank")).stage == 0
    await plane.state.add_scores("bank", 2, count=4, total=3.6)
    await run(plane, answers, 5)
    assert (await plane.state.get_rollout("bank")).stage == 1
    await plane.state.add_scores("bank", 2, count=100, total=20.0)
    await run(plane, answers, 20)
    assert (await plane.state.get_rollout("bank")).stable == 1
    assert "mean score 0.227" in (await plane.state.get_status("bank")).message


def test_the_default_is_a_rolling_update():
    assert Strategy().kind is Kind.ROLLING


async def test_what_was_given_up_takes_nobody_s_place_when_the_next_one_rolls(plane):
    """Blue-green, superseded while it bakes by a revision that rolls: the old replicas serve until
    the newest do, those that were given up go at once."""
    answers = Answers(plane)
    await ask(plane, 1)
    await run(plane, answers, 4)
    bakes = Strategy(Kind.BLUE_GREEN, bake_s=300.0)
    await ask(plane, 2, rollout=bakes)
    await run(plane, answers, 4)
    assert {one for one, share in (await shares(plane)).items() if share} == {
        "bank-r2-0",
        "bank-r2-1",
    }
    for number in range(2):
        plane.prober.samples[f"bank-r3-{number}"] = Sample(True, ready=False)
    await ask(plane, 1, rollout=bakes, options={"seed": 1})
    await run(plane, answers, 1)
    await ask(plane, 1, Kind.ROLLING, options={"seed": 1})
    for turn in range(40):
        await run(plane, answers, 1)
        assert any(share != 0.0 for share in (await shares(plane)).values())
        if turn == 20:
            plane.prober.samples.clear()
    assert plane.running() == ["bank-r3-0", "bank-r3-1"]


async def test_a_canary_at_the_peak_of_the_load_is_scaled_with_what_serves(plane):
    """Load comes while a tenth is tried: as many serve as it asks for, until the target is all."""
    answers = Answers(plane)
    bounds = {"min_replicas": 1, "max_replicas": 6, "target_ongoing_requests": 8.0}
    strategy = STRATEGIES[Kind.CANARY]
    await plane.ask(model="models:/bank/1", rollout=strategy, **bounds)
    await run(plane, answers, 4)
    await plane.ask(model="models:/bank/2", rollout=strategy, **bounds)
    await run(plane, answers, 4)
    assert await shares(plane) == {"bank-r1-0": 0.9, "bank-r2-0": 0.1}
    most, stood = 0, []
    for _ in range(80):
        peak = Demand("bank", "g1", 44, 0, 11.0, plane.clock.now())
        await plane.state.put_demand([peak])
        await run(plane, answers, 1)
        wanted = (await plane.state.get_status("bank")).wanted_replicas
        serving = [one for one in await plane.state.list_endpoints() if takes(one)]
        by_revision = {n: sum(one.revision == n for one in serving) for n in (1, 2)}
        assert len(serving) >= most, "what was reached is never given up"
        most = max(most, min(len(serving), wanted))
        if by_revision not in stood:
            stood.append(by_revision)
    assert wanted == most > 4
    whole = [one[2] for one in stood if one[1] == wanted]
    assert whole, "what serves grows to the whole load beside the canary"
    assert max(whole) >= wanted // 2, "and the canary to its part of it"
    assert plane.running() == [f"bank-r2-{number}" for number in range(wanted)]


# A driver that goes away in the middle of it -----------------------------------------------------


async def away_in_the_middle(plane, monkeypatch, kind=Kind.CANARY):
    """The stable revision runs on one driver, its canary on another that fails for good."""
    answers = Answers(plane)
    await ask(plane, 1, kind)
    await run(plane, answers, 6)
    await ask(plane, 2, kind, driver="memory")
    await run(plane, answers, 3)

    async def fails():
        raise Unavailable("the cluster is away")

    monkeypatch.setattr(plane.drivers.get("memory"), "groups", fails)
    await plane.steps(3)
    assert "away" in (await plane.state.get_status("bank")).message
    return answers


async def serves_as_before(plane, monkeypatch, running):
    """The first driver's replicas are looked after, and the other's end once it is back."""
    plane.prober.silence("bank-r1-0")
    await plane.steps(8)
    assert "bank-r1-0" not in await plane.serving(), "who is dead has no endpoint"
    del plane.prober.samples["bank-r1-0"]
    await plane.steps(8)
    status = await plane.state.get_status("bank")
    assert (status.phase, "away" in status.message) == (DeploymentPhase.READY, False)
    assert await plane.serving() == running
    assert "bank-r2-0" in plane.running(), "nobody could tell it to end"
    monkeypatch.undo()
    await plane.steps(80)
    assert plane.running() == await plane.serving() == running


@pytest.mark.parametrize("kind", list(Kind))
async def test_a_roll_out_is_aborted_though_its_targets_driver_is_away(plane, monkeypatch, kind):
    await away_in_the_middle(plane, monkeypatch, kind)
    kept = await plane.state.get_rollout("bank")
    await plane.state.put_rollout(replace(kept, order=Order.ABORT), replaces=kept)
    await plane.steps(3)
    assert (await plane.state.get_deployment("bank")).revision == 1
    await serves_as_before(plane, monkeypatch, ["bank-r1-0", "bank-r1-1"])


async def test_a_roll_out_is_undone_though_its_targets_driver_is_away(plane, monkeypatch):
    await away_in_the_middle(plane, monkeypatch)
    await plane.state.return_to("bank", 1, reason="undone", now=plane.clock.now())
    await serves_as_before(plane, monkeypatch, ["bank-r1-0", "bank-r1-1"])


async def test_another_revision_takes_the_place_of_one_whose_driver_is_away(plane, monkeypatch):
    answers = await away_in_the_middle(plane, monkeypatch)
    await ask(plane, 1, env={"MARK": "3"})
    await run(plane, answers, 60)
    assert await plane.serving() == ["bank-r3-0", "bank-r3-1"]
    assert "bank-r2-0" in plane.running()
    monkeypatch.undo()
    await run(plane, answers, 80)
    assert plane.running() == ["bank-r3-0", "bank-r3-1"]
