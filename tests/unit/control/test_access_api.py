"""Tenants, projects, principals, roles and keys over the API: every route, role, foreign object."""

from __future__ import annotations

from dataclasses import replace

import httpx2
import pytest

from cloudlm.control.api.app import build_api
from cloudlm.core.access import (
    CustomRole,
    Grant,
    Principal,
    PrincipalKind,
    Project,
    Resource,
    Rule,
    Tenant,
)
from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.tenant import Role
from cloudlm.security.keys import mint
from cloudlm.security.matrix import ROWS, SHARED, Holder, Server, role_may

IDS = {"acme": "p-acme", "other": "p-other"}


@pytest.fixture
async def world(services, pepper):
    """Two tenants with the same inside; returns a way to make clients."""
    state = services.state
    for tenant, principal in IDS.items():
        await state.put_identity(Tenant(tenant))
        for project in ("default", "web"):
            await state.put_identity(Project(tenant, project))
        grants = (Grant("admin", tenant, "root"),)
        await state.put_identity(
            Principal(principal, principal, PrincipalKind.PERSON, tenant, "web", grants)
        )
        await state.put_identity(CustomRole(tenant, "helper", (Rule(("read",), ("usage",)),)))
        minted = mint("target", "user", pepper, 0.0, tenant=tenant, principal=principal)
        await state.put_key(replace(minted.record, id=f"k-{tenant}"))
        spec = DeploymentSpec(f"d-{tenant}", "models:/bank/1", tenant=tenant)
        await state.put_deployment(spec, now=0.0)
    clients = []

    async def client(role="owner", scope="*", principal="root", **more):
        made = mint("k", role, pepper, 0.0, scope=scope, principal=principal, **more)
        await state.put_key(made.record)
        headers = {"authorization": f"Bearer {made.text}"}
        transport = httpx2.ASGITransport(app=build_api(services))
        one = httpx2.AsyncClient(
            transport=transport, base_url="http://control/api/v1", headers=headers
        )
        one.id = made.record.id
        clients.append(one)
        return one

    yield client
    for one in clients:
        await one.aclose()


def body_for(row, tenant):
    bodies = {
        ("POST", "/projects"): {"name": "new", "tenant": tenant},
        ("POST", "/principals"): {"name": "new", "tenant": tenant, "project": "web"},
        ("POST", "/roles"): {"name": "new", "scope": tenant, "rules": []},
        ("POST", "/keys"): {"name": "new", "principal": IDS[tenant], "scope": tenant},
        ("POST", "/tenants"): {"name": "new"},
        ("PUT", "/roles/{role}"): {"rules": []},
        ("POST", "/deployments"): {"name": "new", "model": "models:/bank/1", "tenant": tenant},
        ("PUT", "/deployments/{name}"): {"model": "models:/bank/1", "tenant": tenant},
        ("POST", "/deployments/{name}/scale"): {"min_replicas": 1, "max_replicas": 1},
    }
    return bodies.get((row.method, row.path.removeprefix("/api/v1")), {})


def path_for(row, tenant):
    names = {"tenant": tenant, "project": "web", "principal": IDS[tenant], "role": "helper"}
    path = row.path.removeprefix("/api/v1").format(
        **names, key_id=f"k-{tenant}", name=f"d-{tenant}"
    )
    if row.resource is Resource.PROJECTS and "{" in row.path:
        path += f"?tenant={tenant}"
    if row.resource is Resource.ROLES and "{" in row.path:
        path += f"?scope={tenant}"
    return path


TENANTED = [
    row
    for row in ROWS
    if row.server is Server.CONTROL and row.holder is Holder.KEY and row.resource not in SHARED
]


@pytest.mark.promise(34)
@pytest.mark.parametrize("role", list(Role))
async def test_nobody_reaches_another_tenants_objects(world, services, role):
    """Every route × role × foreign object id."""
    client = await world(role.value, "acme", "root", tenant="acme")
    before = await services.state.list_identities(), await services.state.list_keys()
    deployed = await services.state.list_deployments()
    for row in TENANTED:
        answer = await client.request(
            row.method, path_for(row, "other"), json=body_for(row, "other")
        )
        where = row.method, row.path
        if row.method == "GET" and "{" not in row.path:
            assert answer.status_code in (200, 403), where
            assert "p-other" not in answer.text, where
            assert "k-other" not in answer.text, where
            if row.resource is not Resource.AUDIT:  # which knows what this client asked for
                assert "d-other" not in answer.text, where
        else:
            assert answer.status_code in (403, 404), (where, answer.text)
            assert "k-other-secret" not in answer.text
    after = await services.state.list_identities(), await services.state.list_keys()
    plain = [[replace(k, last_used_at=None) for k in keys] for _, keys in (before, after)]
    assert before[0] == after[0]
    assert deployed == await services.state.list_deployments()
    assert plain[0] == plain[1]


@pytest.mark.promise(34)
@pytest.mark.parametrize("role", list(Role))
async def test_the_matrix_is_what_the_api_does(world, role):
    """Every route × role, on one's own tenant: refused exactly where the matrix says so."""
    client = await world(role.value, "*", "root", tenant="acme")
    for row in ROWS:
        if row.server is not Server.CONTROL or row.holder is not Holder.KEY:
            continue
        if row.method == "DELETE" and row.resource is Resource.TENANTS:
            continue
        shared = row.resource in SHARED
        path = "none" if shared else path_for(row, "acme")
        if shared:
            path = row.path.removeprefix("/api/v1")
            for name in ("name", "version", "alias", "job_id"):
                path = path.replace(f"{{{name}}}", "none")
        answer = await client.request(row.method, path, json=body_for(row, "acme"))
        allowed = role_may(role, row)
        if role is Role.DEVELOPER and row.resource in (Resource.KEYS, Resource.PRINCIPALS):
            continue  # its own only: see test_a_developer_manages_its_own_keys
        refused = answer.status_code in (403,) or (
            answer.status_code == 404 and not shared and "{" in row.path
        )
        assert refused == (not allowed), (role, row.method, row.path, answer.text)


@pytest.mark.promise(5)
@pytest.mark.known_failure("CVE-2026-47101", "CVE-2026-47102")
async def test_the_shapes_of_known_escalations_are_refused(world, services):
    """Fields that are not offered, wider roles."""
    admin = await world("admin", "acme", "p-acme", tenant="acme")
    keys = await services.state.list_keys()
    for body, status in (
        ({"name": "x", "allowed_routes": ["/*"]}, 422),
        ({"name": "x", "user_role": "proxy_admin"}, 422),
        ({"name": "x", "tenant": "other"}, 422),
        ({"name": "x", "made_with": ""}, 422),
        ({"name": "x", "role": "owner"}, 403),
        ({"name": "x", "role": "owner", "scope": "*"}, 403),
        ({"name": "x", "role": "admin", "scope": "*"}, 403),
        ({"name": "x", "role": "user", "scope": "other"}, 403),
        ({"name": "x", "role": "user", "principal": "p-other"}, 404),
        ({"name": "x", "role": "user", "principal": "root"}, 404),
    ):
        answer = await admin.post("/keys", json=body)
        assert answer.status_code == status, (body, answer.text)
    for body, status in (
        ({"grants": [{"role": "owner", "scope": "acme"}]}, 403),
        ({"grants": [{"role": "admin", "scope": "*"}]}, 403),
        ({"grants": [{"role": "admin", "scope": "acme", "granted_by": ""}]}, 422),
        ({"tenant": "other"}, 422),
        ({"subject": "x#y"}, 422),
    ):
        answer = await admin.patch("/principals/p-acme", json=body)
        assert answer.status_code == status, (body, answer.text)
    wide = {"name": "wide", "rules": [{"verbs": ["*"], "resources": ["*"]}]}
    assert (await admin.post("/roles", json=wide)).status_code == 403
    wider = {"rules": wide["rules"]}
    assert (await admin.put("/roles/helper?scope=acme", json=wider)).status_code == 403
    assert (await admin.post("/roles", json={**wide, "name": "admin"})).status_code in (403, 409)
    plain = [replace(one, last_used_at=None) for one in await services.state.list_keys()]
    assert plain == [replace(one, last_used_at=None) for one in keys]


@pytest.mark.promise(5)
async def test_who_is_above_cannot_be_touched(world, services):
    """An admin of the default tenant neither disables the installation's root nor takes its key."""
    owner = await world()
    admin = await world("admin", "default")
    for method, path, body in (
        ("PATCH", "/principals/root", {"disabled": True}),
        ("PATCH", "/principals/root", {"name": "mine"}),
        ("DELETE", "/principals/root", None),
        ("POST", f"/keys/{owner.id}/rotate", {}),
        ("PATCH", f"/keys/{owner.id}", {"expires_in_s": 1}),
        ("DELETE", f"/keys/{owner.id}", None),
    ):
        answer = await admin.request(method, path, json=body)
        assert answer.status_code == 403, (method, path, answer.text)
    assert (await owner.patch("/principals/root", json={"disabled": True})).status_code == 409
    assert (await owner.get("/whoami")).status_code == 200


@pytest.mark.promise(5)
async def test_a_child_falls_with_its_maker(world, services):
    """At use: what an admin granted, and the keys it made, go with its rights."""
    root = await world()
    admin = await world("admin", "acme", "p-acme", tenant="acme")
    grants = [{"role": "admin", "scope": "acme"}]
    made = (await admin.post("/principals", json={"name": "n", "grants": grants})).json()
    assert made["grants"] == [{**grants[0], "granted_by": "p-acme"}]
    key = await admin.post("/keys", json={"name": "c", "role": "admin", "principal": made["id"]})
    child = httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=build_api(services)),
        base_url="http://control/api/v1",
        headers={"x-api-key": key.json()["key"]},
    )
    async with child:
        assert (await child.get("/projects/web?tenant=acme")).status_code == 200
        demoted = {"grants": [{"role": "user", "scope": "acme"}]}
        assert (await root.patch("/principals/p-acme", json=demoted)).status_code == 200
        assert (await child.get("/projects/web?tenant=acme")).status_code == 404
        restored = {"grants": [{"role": "admin", "scope": "acme"}]}
        await root.patch("/principals/p-acme", json=restored)
        assert (await child.get("/projects/web?tenant=acme")).status_code == 200
        assert (await root.delete("/principals/p-acme")).status_code == 200
        assert (await admin.get("/whoami")).status_code == 401
        assert (await child.get("/projects/web?tenant=acme")).status_code == 200  # root's now
        await root.patch(f"/principals/{made['id']}", json={"disabled": True})
        assert (await child.get("/whoami")).status_code == 401


async def test_a_developer_manages_its_own_keys(world):
    developer = await world("developer", "acme", "p-acme", tenant="acme")
    made = await developer.post("/keys", json={"name": "mine"})
    assert made.status_code == 201
    record = made.json()["record"]
    assert (record["principal"], record["scope"], record["role"]) == ("p-acme", "acme", "user")
    listed = {one["id"] for one in (await developer.get("/keys")).json()["data"]}
    assert record["id"] in listed
    assert (await developer.delete(f"/keys/{record['id']}")).status_code == 200
    wider = await developer.post("/keys", json={"name": "x", "role": "admin"})
    assert (wider.status_code, "more than you have" in wider.text) == (403, True)


@pytest.mark.promise(5)
async def test_models_of_a_key_only_narrow(world):
    narrow = await world("developer", "acme", "p-acme", tenant="acme", models=("bank", "x-*"))
    for models, status in ((["bank"], 201), (["x-1", "x-2*"], 201), (["*"], 403), (["b*"], 403)):
        answer = await narrow.post("/keys", json={"name": "n", "models": models})
        assert answer.status_code == status, models
    made = (await narrow.post("/keys", json={"name": "n", "models": ["bank"]})).json()["record"]
    widened = await narrow.patch(f"/keys/{made['id']}", json={"models": ["*"]})
    assert widened.status_code == 403
    limits = {"requests_per_minute": 5, "spend_per_month": 2.5}
    changed = await narrow.patch(f"/keys/{made['id']}", json={"limits": limits, "name": "m"})
    assert (changed.json()["limits"]["spend_per_month"], changed.json()["name"]) == (2.5, "m")


async def test_rotation_overlaps_and_expiry_ends(world, services, plane, pepper):
    owner = await world()
    made = (
        await owner.post("/keys", json={"name": "n", "role": "viewer", "expires_in_s": 100})
    ).json()
    old = {"x-api-key": made["key"]}
    answer = await owner.post(f"/keys/{made['record']['id']}/rotate", json={"overlap_s": 30})
    assert answer.headers["cache-control"] == "no-store"
    replaced = answer.json()["replaced"]
    assert (replaced["id"], replaced["revoked_at"]) == (made["record"]["id"], None)
    assert replaced["expires_at"] == services.clock.now() + 30
    new = {"x-api-key": answer.json()["key"]}

    async def statuses():
        asked = [await owner.get("/whoami", headers=headers) for headers in (old, new)]
        return [one.status_code for one in asked]

    del owner.headers["authorization"]
    assert await statuses() == [200, 200]
    await plane.clock.advance(30.5)
    assert await statuses() == [401, 200]
    await plane.clock.advance(70.0)
    assert await statuses() == [401, 401]


async def test_a_rotation_without_overlap_revokes_and_one_never_prolongs(world, services):
    owner = await world()
    for overlap_s, lives_s in ((0, None), (500, 100)):
        made = await owner.post("/keys", json={"name": "n", "expires_in_s": 100})
        old = made.json()["record"]
        path = f"/keys/{old['id']}/rotate"
        replaced = (await owner.post(path, json={"overlap_s": overlap_s})).json()["replaced"]
        now = services.clock.now()
        assert replaced["id"] == old["id"]
        assert replaced["revoked_at"] == (now if lives_s is None else None)
        assert replaced["expires_at"] == now + 100


async def test_revoking_a_key_can_take_what_it_made(world, services):
    owner, leaked = await world(), await world()
    child = (await leaked.post("/keys", json={"name": "c", "role": "admin", "scope": "*"})).json()
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=build_api(services)),
        base_url="http://control/api/v1",
        headers={"x-api-key": child["key"]},
    ) as client:
        grandchild = (await client.post("/keys", json={"name": "g"})).json()["record"]["id"]
    assert (await owner.delete(f"/keys/{leaked.id}?descendants=true")).status_code == 200
    revoked = {one.id for one in await services.state.list_keys() if one.revoked_at is not None}
    assert revoked == {leaked.id, child["record"]["id"], grandchild}


async def test_a_tenant_from_making_to_removing(world, services):
    owner = await world()
    made = await owner.post("/tenants", json={"name": "new", "limits": {"tokens_per_minute": 9}})
    assert made.status_code == 201
    assert made.json()["limits"]["tokens_per_minute"] == 9
    assert (await owner.post("/tenants", json={"name": "new"})).status_code == 409
    assert (await owner.post("/projects", json={"name": "a", "tenant": "new"})).status_code == 201
    assert (await owner.post("/projects", json={"name": "a", "tenant": "none"})).status_code == 404
    assert (await owner.delete("/tenants/new")).status_code == 409
    renamed = await owner.patch("/projects/a?tenant=new", json={"title": "A"})
    assert renamed.json()["title"] == "A"
    assert (await owner.delete("/projects/a?tenant=new")).status_code == 200
    stopped = await owner.patch("/tenants/new", json={"disabled": True})
    assert stopped.json()["disabled_at"] is not None
    assert (await owner.delete("/tenants/new")).status_code == 200
    assert (await owner.get("/tenants/new")).status_code == 404
    for method in ("PATCH", "DELETE"):
        body = {"disabled": True}
        assert (await owner.request(method, "/tenants/default", json=body)).status_code == 409


async def test_a_disabled_tenant_is_refused_and_may_come_back(world):
    owner = await world()
    member = await world("user", "acme", "p-acme", tenant="acme")
    for disabled, status in ((True, 401), (False, 200)):
        await owner.patch("/tenants/acme", json={"disabled": disabled})
        assert (await member.get("/whoami")).status_code == status


async def test_last_use_is_noted_and_shown(world, plane):
    owner = await world()
    await plane.clock.advance(50.0)
    await owner.get("/whoami")
    listed = {one["id"]: one for one in (await owner.get("/keys")).json()["data"]}
    assert listed[owner.id]["last_used_at"] == plane.clock.now()
    assert listed["k-acme"]["last_used_at"] is None


async def test_a_tenants_deployment_is_nobody_elses(world, services):
    owner, ours = await world(), await world("admin", "acme", "p-acme", tenant="acme")
    theirs = await world("admin", "other", "p-other", tenant="other")
    default = await world("operator", "default")

    async def names(client):
        return {one["spec"]["name"] for one in (await client.get("/deployments")).json()["data"]}

    assert await names(owner) == {"d-acme", "d-other"}
    assert await names(ours) == {"d-acme"}
    assert await names(default) == set()
    for client in (theirs, default):
        missing = await client.get("/deployments/nothing-here")
        foreign = await client.get("/deployments/d-acme")
        assert (missing.status_code, foreign.status_code) == (404, 404)
        said = foreign.text.replace("d-acme", "nothing-here")
        assert said == missing.text  # nor can anybody tell that it is there
    body = {"model": "models:/bank/1"}
    for client, tenant, status in (
        (ours, "acme", 202),
        (ours, "", 403),  # of the installation
        (ours, "other", 403),
        (theirs, "other", 409),  # the name is taken, and no more is said
        (default, "", 409),
        (owner, "nowhere", 400),
    ):
        answer = await client.put("/deployments/d-acme", json={**body, "tenant": tenant})
        assert answer.status_code == status, (tenant, answer.text)
        assert status != 409 or "acme'" in answer.text
    prices = {"prompt": 0.5, "completion": 1.5}
    answer = await ours.put(
        "/deployments/d-acme", json={**body, "tenant": "acme", "prices": prices}
    )
    assert answer.json()["spec"]["prices"] == {"prompt": 0.5, "cached": 0.5, "completion": 1.5}
    assert answer.json()["revision"] == 1  # a price restarts nothing
    assert (await owner.delete("/tenants/acme")).status_code == 409


@pytest.mark.parametrize(
    "prices",
    [
        {},
        {"prompt": 1},
        {"prompt": -1, "completion": 1},
        {"prompt": 1, "completion": 0.0001},
        {"prompt": 1, "completion": 1e9},
        {"prompt": "1", "completion": 1},
        {"prompt": 1, "completion": 1, "tokens": 1},
        [1, 2],
        1,
    ],
)
async def test_prices_that_cannot_be(world, prices):
    owner = await world()
    body = {"name": "x", "model": "models:/bank/1", "prices": prices}
    answer = await owner.post("/deployments", json=body)
    assert answer.status_code in (400, 422), answer.text
    assert "prices" in answer.json()["error"]["param"]


async def test_a_scope_that_is_not_there_is_refused_with_the_way_to_make_it(world):
    owner = await world()
    for scope, wanted in (
        ("none", "'cloudlm tenants create none' makes it"),
        ("none/web", "'cloudlm projects create web --tenant none'"),
        ("acme/none", "'cloudlm projects create none --tenant acme' makes it"),
    ):
        answer = await owner.post("/keys", json={"name": "x", "role": "user", "scope": scope})
        assert answer.status_code == 400, answer.text
        assert wanted in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "scope"
    answer = await owner.post("/keys", json={"name": "x", "role": "user", "scope": "acme/web"})
    assert answer.status_code == 201, answer.text
    record = answer.json()["record"]
    # The holder's own project pays: its tenant has none called 'web'.
    assert (record["scope"], record["tenant"], record["project"]) == (
        "acme/web",
        "default",
        "default",
    )


@pytest.mark.promise(34)
async def test_who_may_not_act_there_does_not_learn_which_tenants_there_are(world):
    admin = await world("admin", "acme", "p-acme", tenant="acme")
    said = []
    for scope in ("other", "none", "other/web", "none/web"):
        answer = await admin.post("/keys", json={"name": "x", "role": "user", "scope": scope})
        assert answer.status_code == 403
        said.append(answer.json()["error"]["message"].replace(scope, "SCOPE"))
    assert said[0] == said[1]
    assert said[2] == said[3]
