"""What a key may use through the gateway, and how quickly a right that is taken away is gone."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest

from cloudlm.core.access import (
    FIRST_IDENTITIES,
    Grant,
    Identities,
    Principal,
    PrincipalKind,
    Project,
    Tenant,
)
from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.tenant import Role
from cloudlm.gateway.known import KnownKeys
from cloudlm.gateway.view import Snapshot
from cloudlm.security.access import Directory
from cloudlm.security.keys import mint


async def test_a_key_sees_and_uses_its_models_only(rig: Any, kit: Any) -> None:
    await rig.state.put_deployment(DeploymentSpec("hidden", "models:/m/1"), now=1.0)
    url = rig.replicas[0].url
    await rig.state.put_endpoints("hidden", [Endpoint("hidden", rig.replicas[0].name, url, 1)])
    narrow = mint("n", Role.USER, kit.PEPPER, 1.0, models=("ti*",))
    blind = mint("b", Role.VIEWER, kit.PEPPER, 1.0)
    for minted in (narrow, blind):
        await rig.state.put_key(minted.record)
    headers = {"authorization": f"Bearer {narrow.text}"}
    assert (await rig.ask(kit.chat_body(), headers=headers)).status == 200
    for model in ("hidden", "absent"):
        refused = await rig.ask(kit.chat_body(model=model), headers=headers)
        assert refused.status == 404
        message = refused.json["error"]["message"].replace(model, "MODEL")
        assert message == "there is no model 'MODEL'; deployed here: tiny"
    listed = await rig.ask(None, method="GET", path="/v1/models", headers=headers)
    assert [one["id"] for one in listed.json["data"]] == ["tiny"]
    shown = await rig.ask(None, method="GET", path="/v1/models/hidden", headers=headers)
    assert shown.status == 404
    headers = {"authorization": f"Bearer {blind.text}"}
    assert (await rig.ask(kit.chat_body(), headers=headers)).status == 404


async def test_an_expired_key_is_a_wrong_key(rig: Any, kit: Any) -> None:
    past = mint("n", Role.USER, kit.PEPPER, 1.0, expires_at=time.time() - 0.01)
    later = mint("n", Role.USER, kit.PEPPER, 1.0, expires_at=time.time() + 60.0)
    for minted, status in ((past, 401), (later, 200)):
        await rig.state.put_key(minted.record)
        headers = {"authorization": f"Bearer {minted.text}"}
        assert (await rig.ask(kit.chat_body(), headers=headers)).status == status


def test_a_key_that_was_found_before_expires_all_the_same(kit: Any) -> None:
    """Nothing of the state changes when a key's time is over."""
    minted = mint("n", Role.USER, kit.PEPPER, 1.0, expires_at=100.0)
    record, headers = minted.record, {"authorization": f"Bearer {minted.text}"}
    view = Snapshot(1, keys={record.id: record}, directory=Directory(FIRST_IDENTITIES, [record]))
    known = KnownKeys()
    known.remember(headers, record)
    assert known.find(headers, view, 99.0) is record
    assert known.find(headers, view, 100.0) is None
    assert known.find({"authorization": f"Bearer {minted.text}x"}, view, 99.0) is None
    gone = Snapshot(2, keys={}, directory=Directory(FIRST_IDENTITIES))
    assert known.find(headers, gone, 99.0) is None
    revoked = replace(record, revoked_at=50.0)
    later = Snapshot(3, keys={record.id: revoked}, directory=Directory(FIRST_IDENTITIES, [revoked]))
    assert known.find(headers, later, 99.0) is None


@pytest.mark.promise(33)
@pytest.mark.parametrize("what", ["tenant", "principal", "grants", "digest"])
def test_a_key_that_was_found_before_stands_on_others_all_the_same(kit: Any, what: str) -> None:
    """The record is as it was; what it stands on is not. And it is found again afterwards."""
    holder = Principal("p", "p", PrincipalKind.SERVICE, "acme", grants=(Grant("user", "acme"),))
    minted = mint("n", Role.USER, kit.PEPPER, 1.0, tenant="acme", principal="p")
    record, headers = minted.record, {"authorization": f"Bearer {minted.text}"}

    def view(version: int, *, fallen: bool) -> Snapshot:
        tenant, principal, key = Tenant("acme"), holder, record
        if fallen and what == "tenant":
            tenant = replace(tenant, disabled_at=1.0)
        elif fallen and what == "principal":
            principal = replace(principal, disabled_at=1.0)
        elif fallen and what == "digest":
            key = replace(key, digest="0" * 64)
        people = () if fallen and what == "grants" else (principal,)
        found = Identities(tenants=(tenant,), projects=(Project("acme", "default"),))
        directory = Directory(replace(found, principals=people), [key])
        return Snapshot(version, keys={record.id: key}, directory=directory)

    known, good = KnownKeys(), view(1, fallen=False)
    known.remember(headers, record)
    for _ in range(2):
        assert known.find(headers, good, 2.0) is record
    assert known.find(headers, view(2, fallen=True), 2.0) is None
    assert known.find(headers, view(3, fallen=False), 2.0) is record


def test_keys_that_are_known_are_bounded(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudlm.gateway.known.MAX_KNOWN_KEYS", 3)
    minted = [mint(f"n{n}", Role.USER, kit.PEPPER, 1.0) for n in range(9)]
    records = {one.record.id: one.record for one in minted}
    view = Snapshot(1, keys=records, directory=Directory(FIRST_IDENTITIES, records.values()))
    known = KnownKeys()
    for one in minted:
        headers = {"authorization": f"Bearer {one.text}"}
        known.remember(headers, one.record)
        assert known.find(headers, view, 2.0) is one.record
        assert max(len(known._known), len(known._standing)) <= 3


@pytest.mark.promise(33)
async def test_whatever_a_key_stands_on_stops_it_within_a_second(rig: Any, kit: Any) -> None:
    """A disabled principal or tenant, a grant taken away; open streams are cut."""
    tenant = Tenant("acme")
    grants = (Grant("user", "acme", "root"),)
    holder = Principal("p", "p", PrincipalKind.SERVICE, "acme", grants=grants)
    for fact in (tenant, Project("acme", "default"), holder):
        await rig.state.put_identity(fact)
    minted = mint("n", Role.USER, kit.PEPPER, 1.0, tenant="acme", principal="p")
    await rig.state.put_key(minted.record)
    headers = {"authorization": f"Bearer {minted.text}"}
    for before, after, status in (
        (holder, replace(holder, disabled_at=1.0), 401),
        (tenant, replace(tenant, disabled_at=1.0), 401),
        (holder, replace(holder, grants=()), 404),
    ):
        await kit.until(lambda: rig.gateway.view.snapshot().version > 0)
        assert (await rig.ask(kit.chat_body(), headers=headers)).status == 200
        rig.replicas[0].plans.append(kit.Plan(tokens=600, pause_s=0.05))
        streaming = asyncio.create_task(rig.ask(kit.chat_body(stream=True), headers=headers))
        await kit.until(lambda: rig.replicas[0].active == 1)
        began = time.monotonic()
        await rig.state.put_identity(after, replaces=before)
        cut = await streaming
        assert time.monotonic() - began < 2.0
        assert b"[DONE]" not in cut.body
        assert (await rig.ask(kit.chat_body(), headers=headers)).status == status
        await rig.state.put_identity(before, replaces=after)
        await rig.gateway.view.refresh()


async def test_refusals_are_in_the_audit_log_within_bounds(rig: Any, kit: Any) -> None:
    hidden = mint("b", Role.VIEWER, kit.PEPPER, 1.0)
    await rig.state.put_key(hidden.record)
    for key in [hidden.text] + ["clm_live_wrong"] * 120:
        await rig.ask(kit.chat_body(), headers={"authorization": f"Bearer {key}"})
    await rig.ask(kit.chat_body(model="absent"))  # a typing error is nobody's attack
    await rig.gateway.refusals.flush()
    records = [one.event for one in await rig.state.list_audit()]
    assert 50 <= len(records) <= 60
    assert [(one.status, one.key_id) for one in records[:2]] == [(404, hidden.record.id), (401, "")]
    assert all(one.outcome == "denied" and one.server == "gateway" for one in records)
    assert "hello" not in repr(records)
    assert hidden.text not in repr(records)
