"""What control writes into the audit log: every change, every refusal, no secret."""

from __future__ import annotations

import httpx2
import pytest

from cloudlm.control.api.app import build_api
from cloudlm.control.first_key import ensure_admin_key
from cloudlm.core.errors import StorageFailed
from cloudlm.security.audit import Checker, public_key, read_checkpoint
from cloudlm.security.keys import mint

SEED = b"s" * 32


@pytest.fixture
async def api(services, pepper):
    owner = await ensure_admin_key(services.state, pepper, services.clock)
    transport = httpx2.ASGITransport(app=build_api(services))
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://control", headers={"x-api-key": owner}
    ) as client:
        yield client


async def told(services):
    return [
        (one.event.target, one.event.outcome.value, one.event.status)
        for one in await services.state.list_audit()
    ]


async def test_a_change_is_told_before_and_after(api, services):
    made = await api.post("/api/v1/keys", json={"name": "canary-body"})
    records = await services.state.list_audit()
    assert await told(services) == [
        ("POST /api/v1/keys", "begun", 0),
        ("POST /api/v1/keys", "done", 201),
    ]
    last = records[-1].event
    assert (last.actor, last.action, last.tenant) == ("root", "create keys", "default")
    assert last.source == "127.0.0.1"
    assert last.request_id == made.headers["x-request-id"]
    assert last.detail == f"made {made.json()['record']['id']}"
    assert "canary" not in repr(records)
    assert made.json()["key"].split("_")[3] not in repr(records)


async def test_reading_is_not_told_and_failing_is(api, services):
    assert (await api.get("/api/v1/keys")).status_code == 200
    assert await told(services) == []
    assert (await api.post("/api/v1/keys", json={"name": 3})).status_code == 400
    assert (await told(services))[-1] == ("POST /api/v1/keys", "failed", 400)


@pytest.mark.promise(32)
async def test_a_refusal_is_told_without_the_key(api, services, pepper):
    minted = mint("u", "user", pepper, 0.0)
    await services.state.put_key(minted.record)
    headers = {"x-api-key": minted.text}
    await api.get("/api/v1/keys", headers=headers)
    await api.get("/api/v1/keys", headers={"x-api-key": "clm_live_wrong"})
    await api.delete(f"/api/v1/keys/{minted.text}")
    records = [one.event for one in await services.state.list_audit()]
    assert [(one.outcome.value, one.status) for one in records] == [
        ("denied", 403),
        ("denied", 401),
        ("begun", 0),
        ("denied", 404),
    ]
    assert records[0].key_id == minted.record.id
    assert minted.text.split("_")[3] not in repr(records)


async def test_a_flood_of_refusals_is_bounded(api, services):
    for _ in range(200):
        await api.get("/api/v1/keys", headers={"x-api-key": "nonsense"})
    assert len(await told(services)) == 50
    await services.clock.advance(60.0)
    await api.get("/api/v1/keys", headers={"x-api-key": "nonsense"})
    last = (await services.state.list_audit())[-1].event
    assert last.detail == "and 150 more that were not recorded"


async def test_what_cannot_be_told_does_not_happen(api, services, monkeypatch):
    async def full(_events):
        raise StorageFailed("the disk is full")

    before = await services.state.list_keys()
    monkeypatch.setattr(services.state, "append_audit", full)
    answer = await api.post("/api/v1/keys", json={"name": "x"})
    assert answer.status_code == 507
    assert len(await services.state.list_keys()) == len(before)


@pytest.mark.promise(31)
async def test_checkpoints_are_signed_and_lie_apart(api, services, plane):
    await api.post("/api/v1/keys", json={"name": "x"})
    await services.auditor.checkpoint()
    await services.auditor.checkpoint()  # nothing moved
    lines = (plane.home / "checkpoints").read_text().splitlines()
    (mark,) = [read_checkpoint(line) for line in lines]
    assert await services.state.list_checkpoints() == [mark]
    records = await services.state.list_audit()
    checker = Checker([mark], public_key(SEED))
    checker.see(records[:-1])
    finding = checker.end(checker.head)
    assert finding is not None
    assert (finding.seq, "tail is cut" in finding.problem) == (2, True)


async def test_a_tenant_reads_its_own_log_only(api, services, pepper):
    await api.post("/api/v1/tenants", json={"name": "acme"})
    minted = mint("a", "auditor", pepper, 0.0, tenant="acme", scope="acme")
    await services.state.put_key(minted.record)
    headers = {"x-api-key": minted.text}
    await api.post("/api/v1/keys", json={"name": "no"}, headers=headers)
    own = (await api.get("/api/v1/audit", headers=headers)).json()["data"]
    assert {one["tenant"] for one in own} == {"acme"}
    foreign = await api.get("/api/v1/audit?tenant=default", headers=headers)
    assert foreign.status_code == 403
    every = (await api.get("/api/v1/audit")).json()["data"]
    assert {one["tenant"] for one in every} == {"acme", "default"}
    after = (await api.get(f"/api/v1/audit?after={every[0]['seq']}&limit=1")).json()["data"]
    assert [one["seq"] for one in after] == [2]
