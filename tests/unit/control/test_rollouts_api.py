"""Roll-outs through the control API: watching, steering, going back, scores."""

from __future__ import annotations

import httpx2
import pytest
from rolling_world import STRATEGIES, Answers

from cloudlm.control.api.app import build_api
from cloudlm.control.first_key import ensure_admin_key
from cloudlm.core.rollout import Kind, strategy_body
from cloudlm.core.tenant import LedgerRow, Outcome, Role
from cloudlm.core.wire_rollout import revision_from_body, rollout_from_body
from cloudlm.security.keys import mint

AT = "/api/v1/deployments/bank"


def client_of(services, key):
    transport = httpx2.ASGITransport(app=build_api(services))
    headers = {"authorization": f"Bearer {key}"}
    return httpx2.AsyncClient(transport=transport, base_url="http://control", headers=headers)


@pytest.fixture
async def api(services, pepper):
    key = await ensure_admin_key(services.state, pepper, services.clock)
    async with client_of(services, key) as client:
        yield client


async def put(api, version, kind=Kind.CANARY, strategy=None):
    body = {
        "model": f"models:/bank/{version}",
        "min_replicas": 2,
        "max_replicas": 2,
        "rollout": strategy_body(strategy or STRATEGIES[kind]),
    }
    answer = await api.put(AT, json=body)
    assert answer.status_code == 202, answer.text
    return answer.json()


async def view(api):
    return rollout_from_body((await api.get(f"{AT}/rollout")).json())


async def go(api, verb, body=None, status=202):
    answer = await api.post(f"{AT}/rollout/{verb}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.fixture
async def canary(plane, api):
    """Revision 2 beside revision 1, both answering."""
    plane.answers = Answers(plane)
    await put(api, 1)
    await plane.steps(3)
    await put(api, 2)
    await plane.steps(2)
    await plane.answers.give()
    return api


async def test_where_it_stands(canary):
    found = await view(canary)
    assert (found.kind, found.stable, found.target, found.under_way) == (Kind.CANARY, 1, 2, True)
    assert (found.step, found.steps, found.percent) == (1, 2, 10.0)
    assert found.note == "step 1 of 2: revision 2 gets 10 % of the requests"
    assert "14 more requests" in found.waits
    old, new = found.sides
    assert (old.revision, old.attempts, new.revision, new.attempts) == (1, 12, 2, 6)
    assert new.ttft_s == pytest.approx(0.1)


async def test_the_strategy_is_shown_as_it_was_asked(canary):
    spec = (await canary.get(AT)).json()["spec"]
    assert spec["rollout"] == strategy_body(STRATEGIES[Kind.CANARY])


async def test_pause_holds_and_its_time_does_not_count(canary, plane):
    assert (await go(canary, "pause"))["paused"]
    before = await plane.state.get_rollout("bank")
    for _ in range(100):
        await plane.answers.give()
        await plane.steps(1)
    assert (await view(canary)).step == 1
    assert not (await go(canary, "resume"))["paused"]
    after = await plane.state.get_rollout("bank")
    assert after.since == pytest.approx(before.since + 50.0)
    await plane.steps(2)
    assert (await view(canary)).step == 1, "the pause was no part of the step"


async def test_promote_and_promote_fully(canary, plane):
    await go(canary, "promote", {})
    await plane.steps(1)
    found = await view(canary)
    assert (found.step, found.percent) == (2, 50.0)
    await go(canary, "promote", {"fully": True})
    await plane.steps(20)
    found = await view(canary)
    assert (found.stable, found.target, found.sides) == (2, 2, ())
    assert plane.running() == ["bank-r2-0", "bank-r2-1"]
    error = await go(canary, "promote", {}, status=409)
    assert "no roll-out of 'bank' is under way" in error["error"]["message"]


async def test_abort_goes_back_even_in_a_pause(canary, plane):
    await go(canary, "pause")
    await go(canary, "abort")
    await plane.steps(20)
    assert plane.running() == ["bank-r1-0", "bank-r1-1"]
    newest, _ = (await canary.get(f"{AT}/revisions")).json()["data"]
    assert (newest["revision"], newest["outcome"], newest["reason"]) == (
        2,
        "rolled_back",
        "aborted",
    )


async def test_undo_of_a_rollout_under_way_and_of_one_that_is_over(canary, plane):
    await go(canary, "undo", {})
    await plane.steps(20)
    assert plane.running() == ["bank-r1-0", "bank-r1-1"]
    await put(canary, 2)
    await go(canary, "promote", {"fully": True})
    await plane.steps(30)
    assert plane.running() == ["bank-r3-0", "bank-r3-1"]
    await go(canary, "undo", {})
    await plane.steps(30)
    assert plane.running() == ["bank-r1-0", "bank-r1-1"]
    assert (await canary.get(AT)).json()["spec"]["model"] == "models:/bank/1"
    refused = await go(canary, "undo", {}, status=404)
    assert "no earlier revision that was promoted" in refused["error"]["message"]
    await go(canary, "undo", {"revision": 3})
    await plane.steps(3)
    assert (await view(canary)).steps == 2, "it was taken back: it is to prove itself again"
    await go(canary, "promote", {"fully": True})
    await plane.steps(30)
    assert plane.running() == ["bank-r3-0", "bank-r3-1"]


async def test_the_history_says_who_and_what_became_of_it(canary, plane):
    await go(canary, "promote", {"fully": True})
    await plane.steps(30)
    await go(canary, "undo", {"revision": 1})
    data = (await canary.get(f"{AT}/revisions")).json()["data"]
    second, first = (revision_from_body(one) for one in data)
    assert (first.number, first.outcome, first.model) == (1, "promoted", "models:/bank/1")
    assert (second.number, second.outcome) == (2, "rolled_back")
    assert first.by == second.by != ""
    assert second.reason == f"undone by {first.by}"


async def test_what_cannot_be_is_said(canary, plane):
    assert (
        "what is asked for" in (await go(canary, "undo", {"revision": 2}, 409))["error"]["message"]
    )
    assert "rollout history" in (await go(canary, "undo", {"revision": 9}, 404))["error"]["message"]
    await go(canary, "undo", {"revision": 0}, 400)
    await go(canary, "undo", {"to": 1}, 422)
    plane.registry.versions["bank"] = plane.registry.versions["bank"][1:]
    gone = await go(canary, "undo", {"revision": 1}, 404)
    assert "does not exist" in gone["error"]["message"]
    other = await canary.post("/api/v1/deployments/none/rollout/pause")
    assert other.status_code == 404


async def test_a_first_revision_has_no_way_back(plane, api):
    await put(api, 1)
    refused = await go(api, "abort", status=409)
    assert "no revision of 'bank' was ever ready" in refused["error"]["message"]
    assert "no steps" in (await go(api, "promote", {}, 409))["error"]["message"]


async def test_a_rolling_update_can_be_paused_before_control_has_seen_it(plane, api):
    await put(api, 1, Kind.ROLLING)
    await plane.steps(3)
    await put(api, 2, Kind.ROLLING)
    await go(api, "pause")
    await plane.steps(10)
    assert plane.running() == ["bank-r1-0", "bank-r1-1"]
    await go(api, "resume")
    await plane.steps(20)
    assert plane.running() == ["bank-r2-0", "bank-r2-1"]


async def test_scores_by_revision_and_by_request(canary, plane):
    answer = await canary.post(f"{AT}/score", json={"revision": 2, "score": 0.5, "count": 4})
    assert answer.status_code == 200
    row = LedgerRow(
        "x",
        "req-7",
        1,
        "default",
        "k",
        "bank",
        "bank-r2-0",
        Outcome.FINISHED,
        200,
        1,
        1,
        0,
        1.0,
        1.0,
    )
    await plane.state.append_ledger([row])
    answer = await canary.post(f"{AT}/score", json={"request_id": "req-7", "score": 1.0})
    noted = revision_from_body(answer.json())
    assert (noted.number, noted.scores, noted.score_total) == (2, 5, 3.0)
    assert (await view(canary)).sides[1].score == pytest.approx(0.6)
    for body in ({"revision": 9, "score": 1.0}, {"request_id": "req-8", "score": 1.0}):
        assert (await canary.post(f"{AT}/score", json=body)).status_code == 404


@pytest.mark.parametrize("role", [Role.USER, Role.VIEWER])
async def test_who_may_not_change_a_deployment_may_not_steer_it(canary, services, pepper, role):
    minted = mint("other", role, pepper, 0.0)
    await services.state.put_key(minted.record)
    async with client_of(services, minted.text) as client:
        for verb in ("pause", "resume", "promote", "abort", "undo"):
            answer = await client.post(f"{AT}/rollout/{verb}", json={})
            assert answer.status_code in (403, 404)
        answer = await client.post(f"{AT}/score", json={"revision": 2, "score": 0.0})
        assert answer.status_code in (403, 404)


async def test_a_strategy_in_a_spec_is_checked(api):
    body = {"model": "models:/bank/1", "rollout": {"strategy": "canary", "max_error_rate": 7}}
    answer = await api.put(AT, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "rollout.max_error_rate"
