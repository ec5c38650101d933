"""The matrix has a row for every route of every server, and no row without a route."""

from __future__ import annotations

from collections import Counter
from unittest.mock import MagicMock

import pytest

from cloudlm.control.api.app import build_app
from cloudlm.core.access import DEFAULT_TENANT
from cloudlm.core.settings import GatewaySettings
from cloudlm.core.tenant import Role
from cloudlm.gateway import app as gateway_app
from cloudlm.gateway.dialects import routes
from cloudlm.security.matrix import (
    ROWS,
    SHARED,
    Holder,
    Server,
    as_data,
    control_row,
    role_may,
    shared_ask,
)
from cloudlm.worker.app import ROUTES


def rows(server):
    return {(row.method, row.path) for row in ROWS if row.server is server}


def flat(routes):
    """All routes of an application, however deep the framework has put them."""
    waiting, found = list(routes), []
    while waiting:
        route = waiting.pop()
        original = getattr(route, "original_router", None)
        inner = getattr(route, "routes", None) or getattr(original, "routes", None)
        waiting.extend(inner or ())
        if not inner:
            found.append(route)
    return found


@pytest.mark.promise(34)
def test_every_route_of_control_has_a_row():
    app = build_app(MagicMock())
    documented = {
        (method.upper(), path)
        for path, operations in app.openapi()["paths"].items()
        for method in operations
    }
    hidden = {
        (method, route.path)
        for route in flat(app.router.routes)
        if not getattr(route, "include_in_schema", True)
        for method in (route.methods or ()) - {"HEAD"}
    }
    assert documented | hidden == rows(Server.CONTROL)


@pytest.mark.promise(34)
def test_every_route_of_the_gateway_has_a_row():
    gateway = MagicMock(settings=GatewaySettings())
    served = {("GET", route.path) for route in gateway_app.make_app(gateway).routes}
    assert {path for _, path in served} == {
        row.path for row in ROWS if row.server is Server.GATEWAY and row.holder is Holder.OPEN
    }
    served |= routes.served()
    assert served == rows(Server.GATEWAY)


@pytest.mark.promise(34)
def test_every_route_of_the_worker_has_a_row_and_is_as_open_as_it_says():
    served = {(e.method, e.path.replace(":path}", "}")) for e in ROUTES}
    assert served == rows(Server.WORKER)
    opened = {row.path for row in ROWS if (row.server, row.holder) == ("worker", Holder.OPEN)}
    assert {entry.path for entry in ROUTES if entry.is_open} == opened


def test_no_route_has_two_rows_and_only_keys_have_verbs():
    assert max(Counter((r.server, r.method, r.path) for r in ROWS).values()) == 1
    for row in ROWS:
        assert (row.holder is Holder.KEY) == (row.verb is not None) == (row.resource is not None)


def test_a_request_finds_its_row():
    found = control_row("GET", "/api/v1/models/bank/versions/3")
    assert found is not None
    assert found.names == {"name": "bank", "version": "3"}
    assert found.row is not None
    ask = shared_ask(found.row, found.names)
    assert (ask.name, ask.scope) == ("bank", DEFAULT_TENANT)
    assert found.row.resource in SHARED
    for path in ("/api/v1/models/", "/api/v1//models", "/api/v1/keys/a/b", "/livez/", "/", ""):
        assert control_row("GET", path) is None
    nothing = control_row("BREW", "/api/v1/keys")
    assert nothing is not None
    assert nothing.row is None


@pytest.mark.parametrize(
    ("role", "path", "methods"),
    [
        (Role.USER, "/api/v1/keys", set()),
        (Role.DEVELOPER, "/api/v1/deployments", {"GET"}),
        (Role.OPERATOR, "/api/v1/deployments", {"GET", "POST"}),
        (Role.ADMIN, "/api/v1/tenants", {"GET"}),
        (Role.OWNER, "/api/v1/tenants", {"GET", "POST"}),
        (Role.AUDITOR, "/api/v1/keys", {"GET"}),
        (Role.VIEWER, "/api/v1/deployments", {"GET"}),
    ],
)
def test_the_matrix_tells_roles_apart(role, path, methods):
    control = [row for row in ROWS if row.server is Server.CONTROL and row.path == path]
    assert {row.method for row in control if role_may(role, row)} == methods


def test_the_matrix_is_data():
    one = next(row for row in as_data() if row["path"] == "/v1/completions")
    assert one["roles"] == ["owner", "admin", "operator", "developer", "user"]
    assert all(row["roles"] == [] for row in as_data() if row["holder"] == "worker token")
