"""Identities and keys as JSON: what is read, what is refused, what never leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from cloudlm.core import wire_access as wire
from cloudlm.core.access import (
    CustomRole,
    Effect,
    Grant,
    Limits,
    Principal,
    PrincipalKind,
    Project,
    Rule,
    Tenant,
)
from cloudlm.core.errors import CloudlmError, InvalidRequest, UnprocessableRequest
from cloudlm.core.tenant import KeyRecord, Role
from cloudlm.core.wire_access import KeyRequest

LIMITS = Limits(10, 2000, 3, 12.5)


def over_the_wire(body: Any) -> Any:
    return json.loads(json.dumps(body))


def test_a_request_for_a_key() -> None:
    assert wire.key_request_from_body({"name": "ci"}) == KeyRequest("ci", "user")
    wanted = KeyRequest("a", "developer", "acme/web", "p-1", "web", ("bank", "x-*"), LIMITS, 60.0)
    assert wire.key_request_from_body(over_the_wire(wire.key_request_body(wanted))) == wanted
    assert wire.key_request_body(KeyRequest("a")) == {"name": "a", "role": "user"}


@pytest.mark.promise(5)
@pytest.mark.parametrize(
    "field", ["tenant", "digest", "id", "revoked_at", "made_with", "created_at", "user_role"]
)
def test_no_field_that_is_not_offered_can_be_assigned(field: str) -> None:
    readers = (
        wire.key_request_from_body,
        wire.key_change_from_body,
        wire.rotation_from_body,
        lambda body: wire.tenant_from_body(body, 0.0),
        lambda body: wire.principal_from_body(body, "p-1", "default", 0.0),
        lambda body: wire.role_from_body({**body, "rules": []}, "default", 0.0),
    )
    for read in readers[: None if field != "tenant" else 4]:
        with pytest.raises(UnprocessableRequest):
            read({"name": "a", field: "x"} if read is not wire.rotation_from_body else {field: "x"})


@pytest.mark.parametrize(
    "body",
    [
        {"name": ""},
        {"name": "x" * 65},
        {"name": 3},
        {"name": "a", "role": "Not A Role"},
        {"name": "a", "scope": "a/b/c"},
        {"name": "a", "scope": "../x"},
        {"name": "a", "models": ["*x"]},
        {"name": "a", "models": "bank"},
        {"name": "a", "limits": {"requests_per_minute": -1}},
        {"name": "a", "limits": {"requests_per_minute": True}},
        {"name": "a", "limits": {"spend_per_month": float("nan")}},
        {"name": "a", "limits": {"requests": 1}},
        {"name": "a", "expires_in_s": 0},
    ],
)
def test_bad_values_name_their_field(body: dict[str, Any]) -> None:
    with pytest.raises(CloudlmError) as caught:
        wire.key_request_from_body(body)
    assert caught.value.status in (400, 422)
    assert caught.value.param


@pytest.mark.parametrize(
    "rule",
    [
        {"verbs": ["root"], "resources": ["keys"]},
        {"verbs": ["read"], "resources": ["secrets"]},
        {"verbs": ["read"], "resources": ["keys:*a"]},
        {"verbs": ["read"], "resources": ["keys"], "effect": "maybe"},
        {"verbs": "read", "resources": ["keys"]},
        {"verbs": ["read"]},
    ],
)
def test_bad_rules_are_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        wire.role_from_body({"name": "r", "rules": [rule]}, "acme", 0.0)


def test_a_role_belongs_to_no_project() -> None:
    with pytest.raises(InvalidRequest, match="not to the project"):
        wire.role_from_body({"name": "r", "rules": [], "scope": "acme/web"}, "acme", 0.0)


@pytest.mark.promise(32)
def test_a_keys_digest_never_leaves() -> None:
    record = KeyRecord(
        "k",
        "n",
        Role.OWNER.value,
        "d" * 64,
        "wxyz",
        "t",
        1.0,
        2.0,
        "web",
        "p-1",
        "t/web",
        ("a", "b*"),
        LIMITS,
        9.0,
        "k0",
        3.0,
    )
    body = over_the_wire(wire.key_body(record))
    assert "d" * 64 not in json.dumps(body)
    assert wire.key_from_body(body) == replace(record, digest="")


def test_identities_come_back_as_they_were() -> None:
    tenant = Tenant("acme", "Acme", LIMITS, 1.0, 2.0)
    project = Project("acme", "web", "Web", LIMITS, 1.0)
    grants = (Grant("developer", "acme/web", "root"),)
    principal = Principal(
        "p-1", "Ada", PrincipalKind.PERSON, "acme", "web", grants, "i#s", LIMITS, 1.0, 2.0
    )
    rules = (Rule(("read",), ("keys:@self",)), Rule(("*",), ("*",), Effect.DENY))
    role = CustomRole("acme", "reader", rules, 1.0)
    assert wire.tenant_of_body(over_the_wire(wire.tenant_body(tenant))) == tenant
    assert wire.project_of_body(over_the_wire(wire.project_body(project))) == project
    assert wire.principal_of_body(over_the_wire(wire.principal_body(principal))) == principal
    assert wire.role_of_body(over_the_wire(wire.role_body(role))) == role
