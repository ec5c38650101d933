"""Which revision a request falls to: exactly, for good, whatever the number of replicas."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.routing import Policy, Routing
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.split import choose_side, mark_of, sides, taking

MARKS = [(n + 0.5) / 1000 for n in range(1000)]


def some(revision: int, count: int, share: float | None, first: int = 0) -> list[Endpoint]:
    return [
        Endpoint("m", f"m-r{revision}-{n}", f"http://{revision}.{n}", revision, 1.0, share)
        for n in range(first, first + count)
    ]


def fallen(endpoints: list[Endpoint]) -> list[int]:
    """The revision of each mark."""
    return [sides(endpoints, mark)[0][0].revision for mark in MARKS]


@given(st.floats(0.001, 0.999), st.integers(1, 20), st.integers(1, 20))
def test_a_share_is_exact_whatever_the_number_of_replicas(share: float, old: int, new: int) -> None:
    found = fallen([*some(1, old, 1.0 - share), *some(2, new, share)])
    assert abs(found.count(2) - 1000 * share) <= 1.0


@given(st.floats(0.01, 0.5), st.floats(0.0, 0.5))
def test_who_is_at_the_new_revision_stays_there_as_its_share_grows(
    share: float, more: float
) -> None:
    before = fallen([*some(1, 3, 1.0 - share), *some(2, 1, share)])
    after = fallen([*some(1, 3, 1.0 - share - more), *some(2, 2, share + more)])
    assert all(later == 2 for one, later in zip(before, after, strict=True) if one == 2)


def test_marks_are_even_and_tell_models_and_copies_apart() -> None:
    marks = [mark_of(f"s{n}".encode(), "m") for n in range(2000)]
    assert all(0.0 <= mark < 1.0 for mark in marks)
    assert abs(sum(mark < 0.1 for mark in marks) - 200) < 60
    both = sum(
        mark_of(f"s{n}".encode(), "m") < 0.5 and mark_of(f"s{n}".encode(), "m", copy=True) < 0.5
        for n in range(2000)
    )
    assert abs(both - 500) < 100
    assert mark_of(b"s", "m") != mark_of(b"s", "other")
    assert mark_of(b"s" * 1000, "m") == mark_of(b"s" * 64, "m")


def test_a_revision_that_is_alone_gets_everything() -> None:
    assert set(fallen(some(2, 1, 0.05))) == {2}
    assert set(fallen([*some(1, 1, 0.95), *some(3, 1, 0.95)])) == {1, 3}


def test_replicas_without_a_share_take_no_new_request() -> None:
    endpoints = [*some(1, 2, 1.0), *some(2, 1, 0.0), *some(3, 1, None)]
    taken, beside = taking(endpoints)
    assert [one.revision for one in taken] == [1, 1, 3]
    assert [one.revision for one in beside] == [2]


def test_the_other_revision_is_asked_only_when_its_own_is_exhausted() -> None:
    endpoints = [*some(1, 2, 0.5), *some(2, 2, 0.5)]
    loads, mark = Loads(), 0.1  # the newest has the lowest marks
    first = choose_side(endpoints, loads, 0.0, mark)
    assert first is not None
    assert first.revision == 2
    second = choose_side(endpoints, loads, 0.0, mark, tried={first.replica}, retrying=True)
    assert second is not None
    assert second.revision == 2
    tried = {first.replica, second.replica}
    third = choose_side(endpoints, loads, 0.0, mark, tried=tried, retrying=True)
    assert third is not None
    assert third.revision == 1
    assert choose_side(endpoints, loads, 0.0, mark, tried=tried, stay=True) is None


def test_a_revision_whose_replicas_fail_is_left_to_the_other_until_it_is_time_to_look() -> None:
    endpoints = [*some(1, 1, 0.5), *some(2, 1, 0.5)]
    loads = Loads()
    loads.failed("m-r2-0", 0.0)

    def revision(now: float) -> int:
        found = choose_side(endpoints, loads, now, 0.1)
        assert found is not None
        return found.revision

    assert revision(0.5) == 1
    assert revision(1.5) == 2  # its distrust is over: one request finds out
    loads.failed("m-r1-0", 1.5)
    loads.failed("m-r2-0", 1.5)
    assert revision(1.6) == 2, "with nobody else the own side is asked rather than nobody"


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from((None, 0.2, 1.0))), max_size=6))
def test_somebody_is_found_whenever_somebody_takes_requests(found: Any) -> None:
    endpoints = [
        replace(one, replica=f"m-r{revision}-{n}")
        for n, (revision, share) in enumerate(found)
        for one in some(revision, 1, share)
    ]
    for mark in (0.0, 0.3, 0.999999):
        assert (choose_side(endpoints, Loads(), 0.0, mark) is None) == (not endpoints)


# Through the gateway ------------------------------------------------------------------------------


async def split(rig: Any, kit: Any, share: float, mirror: float = 0.0, **routing: Any) -> None:
    """The last replica is of the next revision."""
    spec = DeploymentSpec(kit.MODEL, "models:/m/1", routing=Routing(**routing))
    await rig.state.put_deployment(spec, now=2.0)
    *old, new = rig.replicas
    endpoints = [Endpoint(kit.MODEL, one.name, one.url, 1, 1.0, 1.0 - share) for one in old]
    endpoints.append(Endpoint(kit.MODEL, new.name, new.url, 2, 1.0, share, mirror))
    await rig.state.put_endpoints(kit.MODEL, endpoints)
    await rig.gateway.view.refresh()


async def test_sessions_stay_with_their_revision(kit: Any) -> None:
    async with kit.open_rig(3) as rig:
        await split(rig, kit, 0.5)
        sides = {}
        for number in range(20):
            headers = {**rig.headers, "x-session-id": f"s{number}"}
            found = {
                (await rig.ask(kit.chat_body(), headers=headers)).headers["x-cloudlm-replica"]
                == rig.replicas[2].name
                for _ in range(4)
            }
            assert len(found) == 1
            sides[number] = found.pop()
        assert 0 < sum(sides.values()) < 20
        rig.assert_nothing_open()


@pytest.mark.parametrize("policy", list(Policy))
async def test_a_share_holds_under_every_policy(kit: Any, policy: Policy) -> None:
    async with kit.open_rig(3) as rig:
        await split(rig, kit, 0.25, policy=policy)
        for number in range(60):
            headers = {**rig.headers, "x-request-id": f"r{number}"}
            assert (await rig.ask(kit.chat_body(), headers=headers)).status == 200
        mine = sum(mark_of(f"r{n}".encode(), kit.MODEL) < 0.25 for n in range(60))
        assert len(rig.replicas[2].requests) == mine


async def test_a_canary_that_fails_costs_no_client_an_answer(kit: Any) -> None:
    async with kit.open_rig(2) as rig:
        await split(rig, kit, 0.5)
        rig.replicas[1].default = kit.Plan(kind="status", status=500)
        results = [await rig.ask(kit.chat_body()) for _ in range(40)]
        assert {one.status for one in results} == {200}
        assert len(rig.replicas[1].requests) >= 1
        rig.assert_nothing_open()


async def test_a_hedge_stays_with_its_revision(kit: Any) -> None:
    async with kit.open_rig(2) as rig:
        await split(rig, kit, 0.5, hedge_after_s=0.05)
        rig.gateway.handler.errands._hedges.clear()
        for replica in rig.replicas:
            replica.default = kit.Plan(pause_s=0.15)
        results = await asyncio.gather(*(rig.ask(kit.chat_body()) for _ in range(24)))
        assert {one.status for one in results} == {200}
        assert sum(len(one.requests) for one in rig.replicas) == 24


async def test_a_stream_goes_on_with_the_revision_that_was_replaced(kit: Any) -> None:
    """After a switch the old replicas take nothing new, but what began there ends there."""
    async with kit.open_rig(3) as rig:
        *old, new = rig.replicas
        for one in old:
            one.default = kit.Plan(tokens=4, notes=True)
        broken, whole = old
        broken.plans.append(kit.Plan(tokens=4, notes=True, stall_at=3))
        rig.gateway.loads.begin(whole.name)
        ask = kit.chat_body(stream=True)
        response = await rig.gateway.handler.handle(rig.request(ask))
        assert response.headers["x-cloudlm-replica"] == broken.name
        rig.gateway.loads.end(whole.name)
        await split(rig, kit, 1.0)
        assert rig.gateway.view.snapshot().models[kit.MODEL].beside
        reading = asyncio.create_task(rig.finish(response))
        await kit.until(lambda: broken.active == 1)
        await broken.stop()
        result = await reading
        assert result.error is None
        assert result.tokens == 4
        assert not new.requests


# Copies -------------------------------------------------------------------------------------------


async def copied(rig: Any, kit: Any) -> None:
    await kit.until(lambda: not rig.gateway.handler.errands.mirror._copies)


async def test_a_copy_is_sent_afterwards_and_nobody_pays(kit: Any) -> None:
    async with kit.open_rig(2, prices="*=1/1/1") as rig:
        await split(rig, kit, 0.0, mirror=1.0)
        old, shadow = rig.replicas
        shadow.default = kit.Plan(tokens=9)
        for stream in (False, True):
            result = await rig.ask(kit.chat_body(stream=stream))
            assert result.headers["x-cloudlm-replica"] == old.name
            await copied(rig, kit)
        assert old.requests == shadow.requests
        rows = await rig.rows()
        mine = [row for row in rows if row.key_id == rig.key_id]
        copies = [row for row in rows if row.key_id == "@mirror"]
        assert [row.replica for row in mine] == [old.name] * 2
        assert all(row.cost > 0 for row in mine)
        assert [row.replica for row in copies] == [shadow.name] * 2
        assert [(row.attempt, row.cost, row.completion_tokens) for row in copies] == [(0, 0, 9)] * 2
        assert all(row.first_token_s is not None for row in copies)
        assert {row.request_id for row in copies} == {row.request_id for row in mine}
        assert (
            b'cloudlm_gateway_requests_total{model="tiny",outcome="finished",status="200"} 2.0'
            in (await rig.gateway.exposition())
        )
        rig.assert_nothing_open()


async def test_a_copy_that_goes_on_elsewhere_is_still_nobodys(kit: Any) -> None:
    async with kit.open_rig(3) as rig:
        await split(rig, kit, 0.0, mirror=1.0)
        old, *shadows = rig.replicas
        endpoints = [Endpoint(kit.MODEL, old.name, old.url, 1, 1.0, 1.0)]
        endpoints += [Endpoint(kit.MODEL, s.name, s.url, 2, 1.0, 0.0, 1.0) for s in shadows]
        await rig.state.put_endpoints(kit.MODEL, endpoints)
        await rig.gateway.view.refresh()
        for shadow in shadows:
            shadow.default = kit.Plan(tokens=4, notes=True)
        shadows[0].plans.append(kit.Plan(tokens=4, notes=True, garbage_at=3))
        for _ in range(2):  # one begins at the shadow that breaks off
            assert (await rig.ask(kit.chat_body(stream=True))).tokens == 5
            await copied(rig, kit)
        copies = [row for row in await rig.rows() if row.key_id == "@mirror"]
        assert sorted(row.outcome for row in copies) == ["failed", "finished", "finished"]
        assert [row.attempt for row in copies] == [0, 0, 0]
        assert b'cloudlm_gateway_resumes_total{model="tiny"} 0.0' in (
            await rig.gateway.exposition()
        )
        rig.assert_nothing_open()


async def test_a_shadow_that_fails_or_hangs_is_no_clients_matter(kit: Any) -> None:
    async with kit.open_rig(2, first_token_timeout_s=1.0) as rig:
        await split(rig, kit, 0.0, mirror=1.0)
        _, shadow = rig.replicas
        shadow.plans.extend(
            [
                kit.Plan(kind="status", status=500),
                kit.Plan(body=b"no answer"),
                kit.Plan(kind="silence"),
            ]
        )
        for _ in range(3):
            assert (await rig.ask(kit.chat_body())).status == 200
            await copied(rig, kit)
            rig.gateway.loads.answered(shadow.name)
        rows = [row for row in await rig.rows() if row.key_id == "@mirror"]
        assert [row.outcome for row in rows] == ["failed"] * 3
        rig.assert_nothing_open()


async def test_copies_are_bounded_and_cut_off_at_the_end(kit: Any) -> None:
    async with kit.open_rig(2) as rig:
        await split(rig, kit, 0.0, mirror=1.0)
        _, shadow = rig.replicas
        shadow.default = kit.Plan(kind="silence")
        for _ in range(12):
            assert (await rig.ask(kit.chat_body())).status == 200
        assert len(rig.gateway.handler.errands.mirror._copies) == 8
        text = await rig.gateway.exposition()
        assert b'cloudlm_gateway_mirrored_total{left_out="true",model="tiny"} 4.0' in text
        await rig.gateway.handler.errands.mirror.close()
        rows = [row for row in await rig.rows() if row.key_id == "@mirror"]
        assert [row.outcome for row in rows] == ["cancelled"] * 8
        rig.assert_nothing_open()


async def test_what_is_not_answered_well_or_not_drawn_is_not_copied(kit: Any) -> None:
    async with kit.open_rig(2) as rig:
        await split(rig, kit, 0.0, mirror=0.5)
        old, shadow = rig.replicas
        for number in range(40):
            headers = {**rig.headers, "x-request-id": f"r{number}"}
            await rig.ask(kit.chat_body(), headers=headers)
            await copied(rig, kit)
        drawn = sum(mark_of(f"r{n}".encode(), kit.MODEL, copy=True) < 0.5 for n in range(40))
        assert len(shadow.requests) == drawn
        await split(rig, kit, 0.0, mirror=1.0)
        old.plans.append(kit.Plan(kind="status", status=400, error={"error": {"message": "no"}}))
        assert (await rig.ask(kit.chat_body())).status == 400
        assert len(shadow.requests) == drawn


async def test_a_client_that_leaves_is_not_copied_and_nothing_stays_open(kit: Any) -> None:
    async with kit.open_rig(2) as rig:
        await split(rig, kit, 0.0, mirror=1.0)
        rig.replicas[0].default = kit.Plan(pause_s=5.0)
        request = rig.request(kit.chat_body(stream=True))
        asking = asyncio.create_task(rig.gateway.handler.handle(request))
        await kit.until(lambda: rig.replicas[0].active)
        request.disconnected.set_result(None)
        await rig.finish(await asking)
        assert not rig.replicas[1].requests
        await kit.until(lambda: not rig.replicas[0].active)
        rig.assert_nothing_open()
