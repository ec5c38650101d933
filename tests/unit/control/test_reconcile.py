"""The loop, pass by pass: what was asked comes to run, whatever happens in between."""

from __future__ import annotations

import random

import pytest

from cloudlm.control.probe import Sample
from cloudlm.core.deployment import Demand, DeploymentPhase, ReplicaState
from cloudlm.core.errors import Unavailable


async def test_from_wish_to_endpoint_to_nothing(plane):
    await plane.ask(min_replicas=2, max_replicas=2)
    await plane.steps(2)
    assert await plane.serving() == ["bank-r1-0", "bank-r1-1"]
    status = await plane.state.get_status("bank")
    assert (status.phase, status.ready_replicas) == (DeploymentPhase.READY, 2)
    assert status.observed_generation == 1
    await plane.state.mark_deleting("bank", now=0.0)
    await plane.steps(5)
    assert plane.running() == []
    assert await plane.serving() == []
    assert await plane.state.list_deployments() == []
    assert await plane.state.get_status("bank") is None
    assert b'deployment="bank"' not in plane.metrics.exposition()


async def test_a_replica_gets_no_endpoint_before_it_answers(plane):
    plane.prober.default = Sample(True, ready=False)
    await plane.ask()
    await plane.steps(3)
    assert plane.running() == ["bank-r1-0"]
    assert await plane.serving() == []
    assert (await plane.state.get_status("bank")).phase is DeploymentPhase.STARTING
    plane.prober.default = Sample(True, ready=True)
    await plane.steps(1)
    assert await plane.serving() == ["bank-r1-0"]


async def test_an_alias_is_fixed_for_the_life_of_a_revision(plane):
    await plane.ask(model="models:/bank@champion")
    await plane.steps(2)
    plane.registry.set_alias("bank", "champion", 2)
    await plane.steps(2)
    plane.restart()
    await plane.steps(2)
    assert plane.world.groups["bank-r1"].spec.model == "models:/bank/1"
    assert plane.reconciler.models_in_use() == {"models:/bank/1"}
    assert plane.world.started == ["bank-r1-0"]


async def test_endpoints_go_before_replicas_and_running_requests_end_first(plane):
    await plane.ask(min_replicas=2, max_replicas=2)
    await plane.steps(2)
    plane.prober.samples["bank-r1-1"] = Sample(True, ready=True, steps=1, running=1)
    await plane.ask(min_replicas=1, max_replicas=1)
    await plane.steps(4, seconds=1.0)  # the wish, and more than gateways need to notice
    assert await plane.serving() == ["bank-r1-0"]
    assert plane.running() == ["bank-r1-0", "bank-r1-1"]
    status = await plane.state.get_status("bank")
    assert [r.state for r in status.replicas] == [ReplicaState.READY, ReplicaState.DRAINING]
    plane.prober.samples["bank-r1-1"] = Sample(True, ready=True, steps=2)
    await plane.steps(1)
    assert plane.running() == ["bank-r1-0"]


async def test_who_is_on_its_way_out_serves_again_if_the_one_that_stays_does_not(plane):
    await plane.ask(min_replicas=3, max_replicas=3)
    await plane.steps(2)
    await plane.ask(min_replicas=1, max_replicas=1)
    await plane.steps(1, seconds=0.1)
    assert await plane.serving() == ["bank-r1-0"]
    plane.prober.samples["bank-r1-0"] = Sample(True, ready=False)
    await plane.steps(4, seconds=1.0)
    assert await plane.serving() == ["bank-r1-1"]
    assert plane.running() == ["bank-r1-0", "bank-r1-1"]
    del plane.prober.samples["bank-r1-0"]
    await plane.steps(4, seconds=1.0)
    assert await plane.serving() == plane.running() == ["bank-r1-0"]


async def test_a_request_that_never_ends_holds_up_a_stop_no_longer_than_the_limit(plane):
    await plane.ask()
    await plane.steps(2)
    steps = 0

    async def busy(url):
        nonlocal steps
        steps += 1
        return Sample(True, ready=True, steps=steps, running=1)

    plane.prober.probe = busy
    await plane.state.mark_deleting("bank", now=0.0)
    await plane.steps(29, seconds=1.0)
    assert plane.running() == ["bank-r1-0"]
    await plane.steps(4, seconds=1.0)
    assert plane.running() == []


async def test_gateways_get_a_moment_to_notice_even_if_nothing_runs(plane):
    await plane.ask()
    await plane.steps(2)
    await plane.state.mark_deleting("bank", now=0.0)
    await plane.steps(2, seconds=0.1)
    assert plane.running() == ["bank-r1-0"]
    await plane.steps(2, seconds=1.0)
    assert plane.running() == []


@pytest.mark.promise(20)
async def test_a_rolling_update_always_has_somebody_to_answer(plane):
    await plane.ask(min_replicas=2, max_replicas=2)
    await plane.steps(2)
    await plane.ask(model="models:/bank/2", min_replicas=2, max_replicas=2)
    most = 0
    phases = set()
    for _ in range(30):
        await plane.steps(1)
        assert len(await plane.serving()) >= 2
        most = max(most, len(plane.running()))
        phases.add((await plane.state.get_status("bank")).phase)
    assert plane.running() == ["bank-r2-0", "bank-r2-1"]
    assert await plane.serving() == ["bank-r2-0", "bank-r2-1"]
    assert most == 3
    assert DeploymentPhase.UPDATING in phases
    assert (await plane.state.get_status("bank")).phase is DeploymentPhase.READY


async def test_a_broken_update_leaves_the_old_revision_serving_and_says_why(plane):
    await plane.ask()
    await plane.steps(2)
    plane.world.broken["models:/bank/2"] = 'exit code 1: {"event": "no such tensor"}'
    await plane.ask(model="models:/bank/2")
    await plane.steps(20)
    assert await plane.serving() == ["bank-r1-0"]
    status = await plane.state.get_status("bank")
    assert status.phase is DeploymentPhase.DEGRADED
    assert status.message == "bank-r2-0: exit code 1: no such tensor"


async def test_a_model_that_never_starts_is_failed_with_its_last_words(plane):
    plane.world.broken["models:/bank/1"] = "exit code 1: out of memory"
    await plane.ask()
    await plane.steps(20)
    status = await plane.state.get_status("bank")
    assert status.phase is DeploymentPhase.FAILED
    assert status.message == "bank-r1-0: exit code 1: out of memory"


@pytest.mark.promise(11)
async def test_a_stalled_replica_is_ejected_and_restarted_once(plane):
    await plane.ask(min_replicas=2, max_replicas=2)
    await plane.steps(2)
    plane.prober.samples["bank-r1-1"] = Sample(True, ready=True, steps=9, running=1)
    await plane.steps(22, seconds=1.0)
    assert await plane.serving() == ["bank-r1-0"]
    assert b"cloudlm_control_stalled_replicas_total 1.0" in plane.metrics.exposition()
    del plane.prober.samples["bank-r1-1"]
    await plane.steps(3)
    assert plane.world.groups["bank-r1"].replicas["bank-r1-1"].restarts == 1
    assert await plane.serving() == ["bank-r1-0", "bank-r1-1"]


async def test_a_silent_replica_is_asked_twice_and_loses_its_endpoint_in_that_pass(plane):
    await plane.ask(min_replicas=2, max_replicas=2)
    await plane.steps(2)
    plane.prober.misses_once("bank-r1-0")
    await plane.steps(1)
    assert await plane.serving() == ["bank-r1-0", "bank-r1-1"]
    plane.prober.silence("bank-r1-0")
    await plane.steps(1)
    assert await plane.serving() == ["bank-r1-1"]
    assert (await plane.state.get_status("bank")).phase is DeploymentPhase.DEGRADED


@pytest.mark.promise(29)
async def test_demand_scales_up_and_silence_scales_nothing_down(plane):
    await plane.ask(max_replicas=4)
    await plane.steps(2)
    report = Demand("bank", "g1", 24, 0, 9.0, plane.clock.now())
    await plane.state.put_demand([report])
    await plane.steps(3)
    assert len(plane.running()) == 3
    await plane.steps(100, seconds=10.0)
    assert len(plane.running()) == 3
    plane.restart()
    await plane.steps(3)
    assert len(plane.running()) == 3


async def test_groups_of_nobody_are_removed(plane):
    await plane.ask("gone")
    await plane.steps(2)
    deployment = await plane.state.mark_deleting("gone", now=0.0)
    await plane.state.remove_deployment("gone", generation=deployment.generation)
    plane.restart()
    await plane.steps(5)
    assert plane.running() == []
    assert await plane.serving() == []


async def test_an_unknown_model_is_told_and_keeps_what_serves(plane):
    await plane.ask()
    await plane.steps(2)
    await plane.ask(model="models:/missing/1")
    await plane.steps(2)
    status = await plane.state.get_status("bank")
    assert status.phase is DeploymentPhase.DEGRADED
    assert "missing" in status.message
    assert await plane.serving() == ["bank-r1-0"]


async def test_a_driver_that_cannot_be_asked_changes_nothing(plane, monkeypatch):
    await plane.ask()
    await plane.steps(2)
    driver = plane.drivers.get("process")

    async def fails(name):
        raise Unavailable("the cluster is away")

    monkeypatch.setattr(driver, "observe", fails)
    await plane.state.mark_deleting("bank", now=0.0)
    await plane.steps(3)
    assert plane.running() == ["bank-r1-0"]
    assert await plane.serving() == ["bank-r1-0"]
    assert len(await plane.state.list_deployments()) == 1
    monkeypatch.undo()
    await plane.steps(5)
    assert await plane.state.list_deployments() == []


async def test_an_unknown_driver_fails_its_deployment_alone(plane):
    await plane.ask("odd", driver="nosuch")
    await plane.ask("bank")
    await plane.steps(2)
    status = await plane.state.get_status("odd")
    assert status.phase is DeploymentPhase.FAILED
    assert "nosuch" in status.message
    assert await plane.serving() == ["bank-r1-0"]
    await plane.state.mark_deleting("odd", now=0.0)
    await plane.steps(1)
    assert [d.spec.name for d in await plane.state.list_deployments()] == ["bank"]


async def test_what_was_to_move_to_an_unknown_driver_can_be_deleted(plane):
    await plane.ask()
    await plane.steps(2)
    await plane.ask(driver="nosuch")
    await plane.steps(2)
    assert await plane.serving() == ["bank-r1-0"]
    await plane.state.mark_deleting("bank", now=0.0)
    await plane.steps(5)
    assert plane.running() == []
    assert await plane.state.list_deployments() == []


@pytest.mark.promise(25)
@pytest.mark.known_failure("ray#65076")
async def test_one_deployments_fault_does_not_stop_the_others(plane, monkeypatch):
    await plane.ask("aaa")
    await plane.ask("bank")
    original = plane.registry.resolve
    calls = []

    def resolve(ref):
        calls.append(ref)
        if len(calls) == 1:
            raise RuntimeError("a bug")
        return original(ref)

    monkeypatch.setattr(plane.registry, "resolve", resolve)
    await plane.steps(1)
    assert plane.running() == ["bank-r1-0"]
    await plane.steps(2)
    assert plane.running() == ["aaa-r1-0", "bank-r1-0"]


async def test_an_unchanged_world_is_not_written_again(plane, monkeypatch):
    await plane.ask()
    await plane.steps(3)
    version = await plane.state.version()
    written = []
    monkeypatch.setattr(plane.state, "put_status", lambda status: written.append(status))
    await plane.steps(5)
    assert written == []
    assert await plane.state.version() == version


async def test_asking_again_while_it_is_being_deleted_revives_it(plane):
    await plane.ask()
    await plane.steps(2)
    await plane.state.mark_deleting("bank", now=0.0)
    await plane.steps(1, seconds=0.1)
    assert await plane.serving() == []
    await plane.ask()
    await plane.steps(3)
    assert await plane.serving() == ["bank-r1-0"]
    assert plane.world.started == ["bank-r1-0"]


async def test_moving_to_another_driver_is_a_rollout(plane):
    await plane.ask(driver="memory")
    await plane.steps(2)
    await plane.ask(driver="process")
    for _ in range(10):
        await plane.steps(1, seconds=5.0)
        assert await plane.serving()
    assert plane.running() == ["bank-r2-0"]
    assert list(plane.world.groups) == ["bank-r2"]


@pytest.mark.promise(25)
@pytest.mark.parametrize("seed", range(5))
async def test_killed_at_any_pass_a_new_control_ends_where_the_old_would_have(plane, seed):
    """Crashes in the middle of a pass, too: every write may be the last one."""
    choose = random.Random(seed)
    await plane.ask(min_replicas=2, max_replicas=2)
    for number in range(60):
        if number == 15:
            await plane.ask(model="models:/bank/2", min_replicas=3, max_replicas=3)
        if number == 40:
            await plane.ask("other")
        if choose.random() < 0.5:
            plane.restart()
            verbs = {
                plane.state: ("put_endpoints", "put_status"),
                plane.drivers.get("process"): ("apply", "delete"),
            }
            target = choose.choice(list(verbs))
            name = choose.choice(verbs[target])

            async def dies(*args, **kwargs):
                raise KeyboardInterrupt

            setattr(target, name, dies)
            try:
                await plane.steps(1)
            except KeyboardInterrupt:
                pass
            finally:
                delattr(target, name)
            plane.restart()
        await plane.steps(1)
        assert len(plane.running()) <= 6
    await plane.steps(30)
    assert plane.running() == ["bank-r2-0", "bank-r2-1", "bank-r2-2", "other-r1-0"]
    assert await plane.serving() == plane.running()
    assert len(plane.world.started) == len(set(plane.world.started))


@pytest.mark.promise(25)
@pytest.mark.known_failure("ray#65076")
async def test_the_loop_survives_a_store_that_is_away(plane, monkeypatch):
    import asyncio

    await plane.ask()
    failures = []

    async def away():
        failures.append(1)
        raise Unavailable("the database is away")

    monkeypatch.setattr(plane.state, "list_deployments", away)
    loop = asyncio.create_task(plane.reconciler.run())
    for _ in range(4):
        await plane.clock.advance(0.5)
    assert len(failures) >= 3
    monkeypatch.undo()
    for _ in range(6):
        await plane.clock.advance(0.5)
        await asyncio.sleep(0.01)  # resolving a model runs in a thread
    assert await plane.serving() == ["bank-r1-0"]
    before = plane.clock.monotonic()
    await plane.ask("new")
    plane.reconciler.nudge()
    await asyncio.sleep(0.05)
    assert plane.clock.monotonic() == before
    assert "new-r1-0" in plane.running()
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)


@pytest.mark.parametrize("write", ["put_endpoints", "put_status"])
async def test_a_write_whose_answer_was_lost_is_not_taken_for_undone(plane, monkeypatch, write):
    """What is wanted next may be what was there before."""
    await plane.ask()
    await plane.steps(3)
    before = await plane.serving(), await plane.state.get_status("bank")
    done = getattr(plane.state, write)

    async def lost(*arguments):
        await done(*arguments)
        raise Unavailable("the state broke off")

    monkeypatch.setattr(plane.state, write, lost)
    plane.prober.silence("bank-r1-0")
    await plane.steps(2)
    assert (await plane.serving(), await plane.state.get_status("bank")) != before
    monkeypatch.setattr(plane.state, write, done)
    del plane.prober.samples["bank-r1-0"]
    await plane.steps(3)
    assert await plane.serving() == ["bank-r1-0"]
    assert (await plane.state.get_status("bank")).phase is before[1].phase


def loses_the_answer(plane, monkeypatch, verb):
    """The state does it once and breaks off before it says so."""
    done = getattr(plane.state, verb)

    async def lost(*arguments, **named):
        monkeypatch.undo()
        await done(*arguments, **named)
        raise Unavailable("the state broke off")

    monkeypatch.setattr(plane.state, verb, lost)


@pytest.mark.parametrize("passes_between", [0, 2])
async def test_a_new_deployment_runs_its_own_model_though_a_removals_answer_was_lost(
    plane, monkeypatch, passes_between
):
    """Its name and its revision are those of the one that was removed."""
    await plane.ask()
    await plane.steps(2)
    await plane.state.mark_deleting("bank", now=plane.clock.now())
    loses_the_answer(plane, monkeypatch, "remove_deployment")
    while await plane.state.list_deployments():
        await plane.steps(1)
    await plane.steps(passes_between)
    await plane.ask(model="models:/bank/2")
    await plane.steps(3)
    assert plane.running() == ["bank-r1-0"]
    assert plane.world.groups["bank-r1"].spec.model == "models:/bank/2"


async def test_nothing_is_told_of_a_deployment_whose_removals_answer_was_lost(plane, monkeypatch):
    await plane.ask(min_replicas=2, max_replicas=2)
    await plane.steps(2)
    await plane.state.mark_deleting("bank", now=plane.clock.now())
    loses_the_answer(plane, monkeypatch, "remove_deployment")
    await plane.steps(6)
    assert await plane.state.list_deployments() == []
    assert b'deployment="bank"' not in plane.metrics.exposition()
    await plane.ask(min_replicas=0, max_replicas=2)
    await plane.steps(2)
    assert (await plane.state.get_status("bank")).wanted_replicas == 0, "nothing was asked yet"
