"""Staged roll-outs from and to endpoints of others: what is counted, judged and gone back to."""

from __future__ import annotations

import asyncio

import pytest
from rolling_world import STRATEGIES, Answers, takes

from cloudlm.control.api.deployments import check_can_run
from cloudlm.core.deployment import Demand, Deployment, DeploymentSpec
from cloudlm.core.external import EXTERNAL, ExternalEndpoint
from cloudlm.core.rollout import Kind, Outcome
from cloudlm.core.spec import check_spec
from cloudlm.drivers.external_look import Look
from cloudlm.security.credentials import Credential

URLS = tuple(f"https://{name}.example/v1" for name in "abcd")
REFUSED = Look("it does not accept the key (401)")


async def own(plane, version=1, low=1, high=1, kind=Kind.CANARY, **more):
    await plane.ask(
        model=f"models:/bank/{version}",
        min_replicas=low,
        max_replicas=high,
        rollout=STRATEGIES[kind],
        **more,
    )


async def foreign(plane, *urls, kind=Kind.CANARY):
    endpoints = tuple(ExternalEndpoint(url, "big") for url in urls)
    spec = DeploymentSpec("bank", "big", EXTERNAL, endpoints=endpoints, rollout=STRATEGIES[kind])
    await plane.state.put_deployment(check_spec(spec), now=plane.clock.now())


async def run(plane, passes, answers=None, seconds=0.5):
    for _ in range(passes):
        if answers is not None:
            await answers.give()
        await plane.steps(1, seconds)
        for _ in range(5):  # looks are taken in the background
            await asyncio.sleep(0)


async def asked(plane, ongoing):
    report = Demand("bank", "g1", ongoing, 0, 1.0, plane.clock.now())
    await plane.state.put_demand([report])


async def takers(plane):
    return sorted(one.replica for one in await plane.state.list_endpoints() if takes(one))


async def outcomes(plane):
    return {one.number: one.outcome for one in await plane.state.list_revisions("bank")}


class TestFromOwn:
    @pytest.mark.parametrize("kind", [Kind.CANARY, Kind.BLUE_GREEN, Kind.MIRROR])
    async def test_own_replicas_stay_as_many_until_the_endpoints_are_promoted(self, plane, kind):
        """One endpoint is one replica by count, but five answer until it takes over."""
        answers = Answers(plane)
        await own(plane, low=5, high=5, kind=kind)
        await run(plane, 4)
        await foreign(plane, URLS[0], kind=kind)
        for _ in range(60):
            await run(plane, 1, answers)
            kept = await plane.state.get_rollout("bank")
            if kept.stable == 1 and not kept.plain:
                assert plane.running() == [f"bank-r1-{n}" for n in range(5)]
        assert plane.running() == []
        assert await takers(plane) == ["bank-r2-0"]

    async def test_they_follow_their_own_load_within_their_own_bounds(self, plane):
        await own(plane, low=1, high=6, target_ongoing_requests=2.0)
        await run(plane, 4)
        await foreign(plane, URLS[0])
        for _ in range(20):
            await asked(plane, 7)
            await run(plane, 1)
        assert len(plane.running()) == 4

    async def test_all_endpoints_are_there_at_once_and_one_dead_hinders_nothing_else(self, plane):
        """A tenth of one replica is one endpoint by count: the dead one."""
        plane.looks.found[URLS[0]] = REFUSED
        await own(plane)
        await run(plane, 4)
        await foreign(plane, *URLS[:3], kind=Kind.CANARY)
        await run(plane, 4)
        assert {one.replica for one in await plane.state.list_endpoints()} >= {
            "bank-r2-1",
            "bank-r2-2",
        }

    async def test_going_back_gives_the_replicas_back_that_were_asked_for(self, plane):
        await own(plane, low=1, high=1)
        await own(plane, low=2, high=4)
        await run(plane, 4)
        await foreign(plane, URLS[0], kind=Kind.ROLLING)
        await run(plane, 10, seconds=1.0)
        await plane.state.return_to("bank", 1, reason="undone", now=plane.clock.now())
        spec = (await plane.state.get_deployment("bank")).spec
        assert (spec.driver, spec.min_replicas, spec.max_replicas) == ("process", 2, 4)
        await run(plane, 20, seconds=1.0)
        assert plane.running() == ["bank-r1-0", "bank-r1-1"]


class TestToOwn:
    async def test_the_number_of_endpoints_is_none_of_replicas(self, plane):
        """Four endpoints are no reason to start four replicas."""
        await foreign(plane, *URLS)
        await run(plane, 4)
        await own(plane, low=1, high=8, kind=Kind.ROLLING)
        for _ in range(10):
            await run(plane, 1)
            assert len(plane.running()) <= 1
        assert await takers(plane) == ["bank-r2-0"]

    @pytest.mark.parametrize("kind", [Kind.CANARY, Kind.BLUE_GREEN, Kind.MIRROR])
    async def test_a_staged_one_ends(self, plane, kind):
        answers = Answers(plane)
        await foreign(plane, *URLS)
        await run(plane, 4)
        await own(plane, low=2, high=2, kind=kind)
        await run(plane, 60, answers)
        assert await takers(plane) == ["bank-r2-0", "bank-r2-1"]
        assert await plane.drivers.get(EXTERNAL).groups() == []

    async def test_a_failed_one_goes_back_to_all_endpoints(self, plane):
        await foreign(plane, *URLS[:3])
        await run(plane, 4)
        plane.world.broken["models:/bank/1"] = "exit code 1: no such tensor"
        await own(plane, low=1, high=9)
        await run(plane, 30, seconds=1.0)
        spec = (await plane.state.get_deployment("bank")).spec
        assert check_spec(spec) == spec, "it is as it was asked for"
        assert await takers(plane) == [f"bank-r1-{n}" for n in range(3)]
        assert (await plane.state.get_status("bank")).wanted_replicas == 3

    async def test_an_undo_to_endpoints_is_a_spec_that_can_run(self, plane):
        from types import SimpleNamespace

        from cloudlm.control.api.rollouts import _as_it_ran

        await foreign(plane, *URLS[:3])
        await run(plane, 4)
        await own(plane, low=1, high=9, kind=Kind.ROLLING, asleep=True)
        chosen = (await plane.state.list_revisions("bank"))[-1]
        wanted = _as_it_ran(chosen, await plane.state.get_deployment("bank"))
        services = SimpleNamespace(drivers=plane.drivers, state=plane.state, credentials=None)
        await check_can_run(services, wanted)


async def test_nothing_goes_back_to_a_key_that_is_another_tenants_by_now(plane):
    """The way back looks at keys as the way there did; the bad revision stops all the same."""
    origin = f"{URLS[0]}:443".replace("/v1:443", ":443")
    plane.credentials.put(Credential("ours", origin, "sk-1"))
    endpoint = ExternalEndpoint(URLS[0], "big", secret="ours")
    spec = DeploymentSpec(
        "bank", "big", EXTERNAL, endpoints=(endpoint,), rollout=STRATEGIES[Kind.CANARY]
    )
    await plane.state.put_deployment(check_spec(spec), now=plane.clock.now())
    await run(plane, 4)
    plane.credentials.put(Credential("ours", origin, "sk-2", tenant="acme"))
    plane.world.broken["models:/bank/1"] = "exit code 1: no such tensor"
    await own(plane)
    await run(plane, 30, seconds=1.0)
    assert (await plane.state.get_deployment("bank")).revision == 2
    message = (await plane.state.get_status("bank")).message
    assert await takers(plane) == ["bank-r1-0"]
    view = await plane.state.get_rollout("bank")
    assert view.stable == 1
    assert message


class TestAmongEndpoints:
    async def test_one_missed_look_rolls_nothing_back_and_two_do(self, plane):
        await foreign(plane, URLS[0])
        await run(plane, 4)
        plane.looks.found[URLS[1]] = Look("cannot be reached", passing=True)
        await foreign(plane, URLS[1])
        await run(plane, 4)
        assert plane.looks.looked.count(URLS[1]) == 1
        assert (await plane.state.get_deployment("bank")).revision == 2
        plane.looks.found.clear()
        await run(plane, 12)
        assert "bank-r2-0" in await plane.serving()
        plane.looks.found[URLS[1]] = REFUSED
        looked = plane.looks.looked.count(URLS[1])
        while plane.looks.looked.count(URLS[1]) == looked:
            await run(plane, 1, seconds=2.0)
        await run(plane, 1)
        assert (await plane.state.get_deployment("bank")).revision == 2
        await run(plane, 15)
        assert (await plane.state.get_deployment("bank")).revision == 1
        assert (await outcomes(plane))[2] is Outcome.ROLLED_BACK

    async def test_one_that_was_dead_before_is_not_the_new_revisions_fault(self, plane):
        answers = Answers(plane)
        plane.looks.found[URLS[1]] = REFUSED
        await foreign(plane, *URLS[:2])
        await run(plane, 20)
        assert (await outcomes(plane))[1] is Outcome.PROMOTED, "the other one answers"
        await foreign(plane, *URLS[1:3])
        await run(plane, 80, answers)
        assert await outcomes(plane) == {1: Outcome.PROMOTED, 2: Outcome.PROMOTED}
        assert await takers(plane) == ["bank-r2-1"]


def test_bounds_go_with_endpoints_and_with_nothing_else():
    ours = Deployment(DeploymentSpec("bank", "models:/bank/1", min_replicas=2, max_replicas=4))
    other = DeploymentSpec("bank", "models:/bank/2", max_replicas=9)
    assert ours.returned(other, 2, 0.0).spec.max_replicas == 4
    theirs = check_spec(
        DeploymentSpec("bank", "big", EXTERNAL, endpoints=(ExternalEndpoint(URLS[0], "big"),) * 3)
    )
    assert ours.returned(theirs, 2, 0.0).spec.max_replicas == 3
    there = Deployment(theirs)
    back = there.returned(ours.spec, 2, 0.0).spec
    assert (back.min_replicas, back.max_replicas) == (2, 4)


def test_what_is_said_of_memory_goes_with_endpoints_and_with_nothing_else():
    model = "models:/bank/1"
    ours = Deployment(DeploymentSpec("bank", model, pinned=True, memory_mb=500))
    theirs = check_spec(
        DeploymentSpec("bank", "big", EXTERNAL, endpoints=(ExternalEndpoint(URLS[0], "big"),))
    )
    there = ours.returned(theirs, 2, 0.0).spec
    assert check_spec(there) == there
    back = Deployment(there).returned(ours.spec, 1, 0.0).spec
    assert (back.pinned, back.memory_mb) == (True, 500)
    other = DeploymentSpec("bank", "models:/bank/2")
    assert ours.returned(other, 2, 0.0).spec.pinned
