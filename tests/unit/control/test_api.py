"""The control API: who may, what comes back, and how it says no."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import httpx2
import pytest
from fastapi.routing import APIRoute

from cloudlm.control.api.app import build_api, build_app
from cloudlm.control.api.edge import MAX_BODY_BYTES
from cloudlm.control.budget import MemoryBudget
from cloudlm.control.first_key import ensure_admin_key
from cloudlm.core.deployment import DeploymentPhase
from cloudlm.core.settings import OidcSettings
from cloudlm.core.tenant import Role
from cloudlm.core.wire import deployment_from_body, job_from_body, model_from_body
from cloudlm.core.wire_access import key_from_body
from cloudlm.security.keys import mint
from cloudlm.security.matrix import ROWS, Holder, control_row

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW")


@pytest.fixture
def services(services, plane):
    return replace(services, memory=MemoryBudget(plane.registry, 2000 * 2**20))


@pytest.fixture
async def admin(services, pepper):
    return await ensure_admin_key(services.state, pepper, services.clock)


@pytest.fixture
async def user(services, pepper):
    minted = mint("user", Role.USER, pepper, 0.0)
    await services.state.put_key(minted.record)
    return minted.text


def client_of(services, key=None):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    transport = httpx2.ASGITransport(app=build_api(services))
    return httpx2.AsyncClient(transport=transport, base_url="http://control", headers=headers)


@pytest.fixture
async def api(services, admin):
    async with client_of(services, admin) as client:
        yield client


def error_of(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


SPEC = {"name": "bank", "model": "models:/bank/1"}
OPEN_PATHS = {row.path for row in ROWS if row.holder is Holder.OPEN and row.server == "control"}


# Who may ------------------------------------------------------------------------------------------


def all_paths(services):
    """Every path under which the application answers anything."""
    app = build_app(services)
    documented = set(app.openapi()["paths"])
    endpoints = {route.endpoint for route in _routes(app) if isinstance(route, APIRoute)}
    operations = sum(len(methods) for methods in app.openapi()["paths"].values())
    hidden = OPEN_PATHS - documented
    assert len(endpoints) == operations + len(hidden), "a route is not in the document"
    return sorted(documented | {"/", "/api/v1", "/api/v1/openapi.json", "/docs", "/no/such/path"})


def _routes(app):
    """All routes of the application, however deep the framework has put them."""
    waiting, found = list(app.router.routes), []
    while waiting:
        route = waiting.pop()
        inner = getattr(route, "routes", None) or getattr(
            getattr(route, "original_router", None), "routes", None
        )
        if inner:
            waiting.extend(inner)
        else:
            found.append(route)
    return found


@pytest.mark.promise(34)
@pytest.mark.known_failure("CVE-2023-48022", "CVE-2026-27482")
async def test_nothing_is_answered_without_a_key_that_may(services, admin, user):
    refusals = {None: 401, "clm_live_wrong": 401, user: 403}
    async with client_of(services) as client:
        for path in all_paths(services):
            concrete = path.replace("{", "").replace("}", "")
            for method in METHODS:
                for key, status in refusals.items():
                    headers = {} if key is None else {"x-api-key": key}
                    found = control_row(method, concrete)
                    row = None if found is None else found.row
                    if row is not None and row.holder is Holder.OPEN:
                        continue
                    if key == user and (found is None or found.row is None):
                        status = 404 if found is None else 405
                    elif key == user and found.row.holder is Holder.ANY_KEY:
                        continue
                    answer = await client.request(method, concrete, headers=headers)
                    assert answer.status_code == status, (method, path, key)


async def test_control_is_not_ready_before_its_first_look(services):
    async with client_of(services) as nobody:
        answer = await nobody.get("/readyz")
        assert (answer.status_code, (await nobody.get("/livez")).status_code) == (503, 200)
        running = asyncio.create_task(services.reconciler.run())
        while not services.reconciler.has_looked:
            await asyncio.sleep(0)
        assert (await nobody.get("/readyz")).status_code == 200
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_open_paths_are_open_and_no_more(services):
    services.reconciler.has_looked = True
    oidc = OidcSettings(issuer="https://login.example", client_id="cloudlm")
    async with client_of(replace(services, oidc=oidc)) as nobody:
        for path in OPEN_PATHS:
            assert (await nobody.get(path)).status_code == 200
        assert (await nobody.get("/livez/")).status_code == 401
        assert (await nobody.get("//livez")).status_code == 401
    async with client_of(services) as nobody:
        assert (await nobody.get("/api/v1/signin")).status_code == 404  # no issuer is set


async def test_a_revoked_key_is_a_wrong_key(services, admin, pepper):
    other = mint("second", Role.ADMIN, pepper, 0.0)
    await services.state.put_key(other.record)
    async with client_of(services, other.text) as client:
        assert (await client.get("/api/v1/keys")).status_code == 200
        await services.state.revoke_key(other.record.id, now=1.0)  # by another process
        revoked = await client.get("/api/v1/keys")
    async with client_of(services, "nonsense") as client:
        nonsense = await client.get("/api/v1/keys")
    assert revoked.status_code == nonsense.status_code == 401
    assert revoked.json() == nonsense.json()
    assert revoked.headers["www-authenticate"] == "Bearer"


async def test_x_api_key_is_as_good(services, admin):
    async with client_of(services) as client:
        assert (await client.get("/api/v1/keys", headers={"x-api-key": admin})).status_code == 200


# How it says no -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/api/v1/nothing", 404, "not_found"),
        ("PUT", "/api/v1/keys", 405, "method_not_allowed"),
        ("GET", "/api/v1/deployments/none", 404, "not_found"),
        ("GET", "/api/v1/deployments/UPPER", 400, "invalid_value"),
        ("GET", "/api/v1/deployments/bank/logs?tail=-1", 422, "unprocessable_entity"),
        ("GET", "/api/v1/deployments/bank/logs?follow=perhaps", 422, "unprocessable_entity"),
        ("GET", "/api/v1/models/none", 404, "model_not_found"),
        ("GET", "/api/v1/models/bank/versions/x", 400, "invalid_value"),
        ("GET", "/api/v1/models/bank/versions/9", 404, "model_not_found"),
        ("GET", "/api/v1/jobs/none", 404, "not_found"),
        ("DELETE", "/api/v1/jobs/none", 404, "not_found"),
        ("DELETE", "/api/v1/keys/none", 404, "not_found"),
        ("DELETE", "/api/v1/deployments/none", 404, "not_found"),
        ("DELETE", "/api/v1/models/bank/aliases/none", 404, "not_found"),
    ],
)
async def test_errors_have_openais_shape(api, method, path, status, code):
    response = await api.request(method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == code


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"null",
        b'{"name": 1e999}',
        b'{"a":' * 100 + b"1" + b"}" * 100,
    ],
)
async def test_bodies_that_are_none_are_400(api, raw):
    for path in ("/api/v1/deployments", "/api/v1/keys", "/api/v1/jobs", "/api/v1/models"):
        response = await api.post(path, content=raw)
        assert response.status_code == 400
        error_of(response)


async def test_a_body_too_large_is_413_announced_or_not(api):
    async def pieces():
        for _ in range(MAX_BODY_BYTES // 1000 + 2):
            yield b"x" * 1000

    announced = await api.post("/api/v1/keys", content=b"x" * (MAX_BODY_BYTES + 1))
    streamed = await api.post("/api/v1/keys", content=pieces())
    assert announced.status_code == streamed.status_code == 413
    assert error_of(streamed)["code"] == "payload_too_large"


async def test_our_own_fault_is_500_without_detail(api, services, monkeypatch):
    async def bug():
        raise RuntimeError("secret detail")

    monkeypatch.setattr(services.state, "list_keys", bug)
    response = await api.get("/api/v1/keys")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert error_of(response)["code"] == "internal_error"


async def test_the_request_id_is_echoed_or_made(api):
    given = await api.get("/api/v1/keys", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    for bad in ("with space", "x" * 129):
        made = await api.get("/api/v1/keys", headers={"x-request-id": bad})
        assert made.headers["x-request-id"].startswith("req-")
    refused = await api.get("/api/v1/nothing")
    assert refused.headers["x-request-id"]


# Deployments --------------------------------------------------------------------------------------


async def test_the_life_of_a_deployment(api, plane):
    made = await api.post("/api/v1/deployments", json=SPEC)
    assert made.status_code == 202
    assert made.headers["etag"] == '"1"'
    view = deployment_from_body(made.json())
    assert (view.generation, view.phase) == (1, DeploymentPhase.PENDING)
    assert (await api.post("/api/v1/deployments", json=SPEC)).status_code == 409
    await plane.steps(2)
    view = deployment_from_body((await api.get("/api/v1/deployments/bank")).json())
    assert view.phase is DeploymentPhase.READY
    assert view.status.replicas[0].id == "bank-r1-0"
    listed = (await api.get("/api/v1/deployments")).json()["data"]
    assert [deployment_from_body(one) for one in listed] == [view]
    scaled = await api.post(
        "/api/v1/deployments/bank/scale", json={"min_replicas": 2, "max_replicas": 3}
    )
    assert scaled.status_code == 202
    assert deployment_from_body(scaled.json()).deployment.revision == 1
    await plane.steps(2)
    assert plane.running() == ["bank-r1-0", "bank-r1-1"]
    gone = await api.delete("/api/v1/deployments/bank")
    assert gone.status_code == 202
    assert gone.json()["deleting"] is True
    again = {"min_replicas": 1, "max_replicas": 1}
    assert (await api.post("/api/v1/deployments/bank/scale", json=again)).status_code == 409
    assert (await api.post("/api/v1/deployments", json=SPEC)).status_code == 409
    await plane.steps(6)
    assert (await api.get("/api/v1/deployments/bank")).status_code == 404


async def test_put_creates_replaces_and_minds_the_generation(api):
    path = "/api/v1/deployments/bank"
    body = {"model": "models:/bank/1"}
    assert (await api.put(path, json=body)).json()["generation"] == 1
    assert (await api.put(path, json=body)).json()["generation"] == 1
    other = {"model": "models:/bank/2"}
    for stale in ('"7"', "7", 'W/"7"'):
        response = await api.put(path, json=other, headers={"if-match": stale})
        assert response.status_code == 409
    response = await api.put(path, json=other, headers={"if-match": '"1"'})
    assert (response.json()["generation"], response.json()["revision"]) == (2, 2)
    assert (await api.put(path, json=body, headers={"if-match": "*"})).status_code == 202
    assert (await api.put(path, json=body, headers={"if-match": "x"})).status_code == 400
    assert (await api.delete(path, headers={"if-match": "1"})).status_code == 409
    mismatch = await api.put(path, json={**SPEC, "name": "other"})
    assert (mismatch.status_code, error_of(mismatch)["param"]) == (400, "name")


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"model": "/models/bank"}, 400, "model", "import it first"),
        ({"model": "hf://org/name"}, 400, "model", "import it first"),
        ({"model": "models:/none/1"}, 404, None, "registered: bank"),
        ({"min_replicas": -1}, 400, "min_replicas", "from 0 to max"),
        ({"scaling": {"algorithm": "magic"}}, 400, "scaling.algorithm", "tokens, hpa, kpa"),
        ({"min_replicas": 3, "max_replicas": 2}, 400, "min_replicas", "from 0 to max"),
        ({"max_surge": -1}, 400, "max_surge", ""),
        ({"engine": "other"}, 400, "engine", "cloudlm"),
        ({"driver": "nosuch"}, 400, "driver", "installed"),
        ({"name": "Not Valid"}, 400, "name", ""),
        ({"env": {"LD_PRELOAD": "x"}}, 400, None, ""),
        ({"surprise": 1}, 422, "surprise", "has no field"),
        ({"memory_mb": -1}, 400, "memory_mb", "have it estimated"),
        ({"memory_mb": 2001}, 422, "memory_mb", "memory budget of 2.0 GiB"),
        ({"pinned": True, "min_replicas": 0}, 400, "pinned", "lets the last one go"),
        ({"pinned": "yes"}, 400, "pinned", ""),
    ],
)
async def test_what_cannot_run_is_refused_at_once(api, plane, change, status, param, words):
    response = await api.post("/api/v1/deployments", json={**SPEC, **change})
    assert response.status_code == status
    error = error_of(response)
    assert words in error["message"]
    if param:
        assert error["param"] == param
    assert await plane.state.list_deployments() == []


async def test_logs_of_a_deployment(api, plane):
    await api.post("/api/v1/deployments", json={**SPEC, "min_replicas": 2, "max_replicas": 2})
    assert (await api.get("/api/v1/deployments/bank/logs")).text == ""
    await plane.steps(2)
    plane.drivers.get("process").say("bank-r1", "bank-r1-1", "hello — line")
    answer = await api.get("/api/v1/deployments/bank/logs")
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text == "bank-r1-0 started\nbank-r1-1 started\nhello — line\n"
    one = await api.get("/api/v1/deployments/bank/logs?replica=bank-r1-1&tail=1")
    assert one.text == "hello — line\n"
    for replica in ("bank-r1-7", "other-r1-0", "../x"):
        answer = await api.get(f"/api/v1/deployments/bank/logs?replica={replica}")
        assert answer.status_code == 404


async def test_following_logs_streams_until_the_deployment_is_gone(api, plane):
    await api.post("/api/v1/deployments", json=SPEC)
    await plane.steps(2)
    request = asyncio.create_task(api.get("/api/v1/deployments/bank/logs?follow=true"))
    await asyncio.sleep(0.01)
    plane.drivers.get("process").say("bank-r1", "bank-r1-0", "later")
    await plane.clock.advance(0.5)
    await api.delete("/api/v1/deployments/bank")
    await plane.steps(6)
    answer = await asyncio.wait_for(request, 60)
    assert answer.text == "bank-r1-0 started\nlater\n"


# Models -------------------------------------------------------------------------------------------


async def test_models_versions_and_aliases(api, plane):
    (model,) = (await api.get("/api/v1/models")).json()["data"]
    entry = model_from_body(model)
    assert (entry.name, [v.version for v in entry.versions]) == ("bank", [1, 2])
    assert entry.aliases == {"champion": 1}
    assert (await api.get("/api/v1/models/bank")).json() == model
    assert (await api.get("/api/v1/models/bank/versions/2")).json()["version"] == 2
    moved = await api.put("/api/v1/models/bank/aliases/champion", json={"version": 2})
    assert moved.json()["aliases"] == {"champion": 2}
    bad = await api.put("/api/v1/models/bank/aliases/Not!", json={"version": 2})
    assert bad.status_code == 400
    assert (await api.delete("/api/v1/models/bank/aliases/champion")).json()["aliases"] == {}


async def test_a_version_in_use_cannot_be_removed(api, plane):
    aliased = await api.delete("/api/v1/models/bank/versions/1")
    assert (aliased.status_code, "champion" in aliased.text) == (409, True)
    await api.post("/api/v1/deployments", json={**SPEC, "model": "models:/bank/2"})
    deployed = await api.delete("/api/v1/models/bank/versions/2")
    assert (deployed.status_code, "deployment 'bank'" in deployed.text) == (409, True)
    await plane.steps(2)
    await api.put("/api/v1/deployments/bank", json={"model": "models:/bank/1"})
    running = await api.delete("/api/v1/models/bank/versions/2")
    assert (running.status_code, "still runs" in running.text) == (409, True)
    await plane.steps(10)
    assert (await api.delete("/api/v1/models/bank/versions/2")).status_code == 200
    assert [v.version for v in plane.registry.versions["bank"]] == [1]


async def test_an_import_is_a_job(api, plane):
    answer = await api.post("/api/v1/models", json={"source": "/models/new", "name": "new"})
    assert answer.status_code == 202
    job = job_from_body(answer.json()["job"])
    async with asyncio.timeout(60):
        while (await api.get(f"/api/v1/jobs/{job.id}")).json()["state"] != "succeeded":
            await asyncio.sleep(0.01)
    assert plane.imported == ["/models/new"]
    listed = (await api.get("/api/v1/jobs")).json()["data"]
    assert [one["id"] for one in listed] == [job.id]
    again = await api.post(
        "/api/v1/jobs", json={"kind": "import", "arguments": {"source": "/models/new"}}
    )
    assert again.status_code == 202
    cancelled = await api.delete(f"/api/v1/jobs/{again.json()['job']['id']}")
    assert cancelled.status_code == 202
    for bad in ({"kind": "nosuch"}, {"kind": "import", "arguments": {"source": "ftp://x"}}):
        assert (await api.post("/api/v1/jobs", json=bad)).status_code == 400


# Keys, drivers, documents -------------------------------------------------------------------------


async def test_keys_are_shown_once_and_the_last_admin_stays(api, services, admin):
    made = await api.post("/api/v1/keys", json={"name": "app"})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    text, record = made.json()["key"], key_from_body(made.json()["record"])
    assert record.role == Role.USER
    listed = await api.get("/api/v1/keys")
    assert text not in listed.text
    assert "digest" not in listed.text
    first = next(k for k in listed.json()["data"] if k["role"] == "owner")
    last = await api.delete(f"/api/v1/keys/{first['id']}")
    assert last.status_code == 409
    await api.post("/api/v1/keys", json={"name": "second", "role": "owner", "scope": "*"})
    assert (await api.delete(f"/api/v1/keys/{record.id}")).json()["revoked_at"] is not None
    assert (await api.delete(f"/api/v1/keys/{first['id']}")).status_code == 200
    assert (await api.get("/api/v1/keys")).status_code == 401


async def test_the_first_key_is_made_once(services, admin, pepper):
    assert admin.startswith("clm_live_")
    assert await ensure_admin_key(services.state, pepper, services.clock) is None
    (record,) = await services.state.list_keys()
    await services.state.revoke_key(record.id, now=1.0)
    assert await ensure_admin_key(services.state, pepper, services.clock) is not None


async def test_drivers_are_listed_with_their_abilities(api):
    found = {one["name"]: one for one in (await api.get("/api/v1/drivers")).json()["data"]}
    assert "per_replica_address" in found["process"]["abilities"]
    assert found["memory"]["package"] == "cloudlm"


async def test_the_openapi_document_describes_every_route(api):
    document = (await api.get("/api/v1/openapi.json")).json()
    json.dumps(document)
    paths = set(document["paths"])
    assert "/api/v1/models/{name}/versions/{version}" in paths
    assert len(paths) >= 12
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (method, path)
            turns = path.endswith(("/sleep", "/wake", "/pause", "/resume", "/abort"))
            has_body = method in ("post", "put", "patch") and not turns
            assert ("requestBody" in operation) is has_body, (method, path)
    create = document["paths"]["/api/v1/deployments"]["post"]
    schema = create["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["model"]


async def test_metrics_tell_of_deployments(api, plane):
    await api.post("/api/v1/deployments", json=SPEC)
    await plane.steps(2)
    text = (await api.get("/metrics")).text
    assert 'cloudlm_deployment_ready_replicas{deployment="bank"} 1.0' in text
