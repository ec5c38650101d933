"""The control API's identities and keys, as data; see ``client.calls``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from cloudlm.client.calls import Call, NewKey, RotatedKey, all_of, nothing, path_of
from cloudlm.core import wire_access as wire
from cloudlm.core.access import CustomRole, Grant, Limits, Principal, Project, Tenant
from cloudlm.core.fields import Fields
from cloudlm.core.lease import Leader, leader_from_body
from cloudlm.core.tenant import KeyRecord
from cloudlm.core.wire_access import KeyRequest


class RoleEntry(NamedTuple):
    """A role, and whether it is built in."""

    role: CustomRole
    built_in: bool


class Whoami(NamedTuple):
    """The key in use and the principal that it speaks for."""

    key: KeyRecord
    principal: Principal


@dataclass(frozen=True, slots=True)
class Place:
    """Where people of a control API sign in: an OpenID Connect issuer, the installation's id there
    and the scopes to ask for."""

    issuer: str
    client_id: str
    scopes: str


def signin_place() -> Call[Place]:
    def read(body: Any) -> Place:
        fields = Fields(body, "where to sign in")
        return Place(fields.text("issuer"), fields.text("client_id"), fields.text("scopes"))

    return Call("GET", path_of("signin"), read, needs_key=False)


def leader() -> Call[Leader]:
    return Call("GET", path_of("leader"), leader_from_body)


def whoami() -> Call[Whoami]:
    def read(body: Any) -> Whoami:
        fields = Fields(body, "an answer")
        key, principal = fields.raw("key"), fields.raw("principal")
        return Whoami(wire.key_from_body(key), wire.principal_of_body(principal))

    return Call("GET", path_of("whoami"), read)


def list_audit(after: int, limit: int, tenant: str | None) -> Call[list[dict[str, Any]]]:
    query = {"after": str(after), "limit": str(limit), **_query(tenant=tenant)}
    return Call("GET", path_of("audit"), all_of(_record), query=query)


def _record(body: Any) -> dict[str, Any]:
    fields = Fields(body, "a record")
    fields.integer("seq", low=1)
    return dict(body)


# Tenants and projects ---------------------------------------------------------------------------


def list_tenants() -> Call[list[Tenant]]:
    return Call("GET", path_of("tenants"), all_of(wire.tenant_of_body))


def get_tenant(name: str) -> Call[Tenant]:
    return Call("GET", path_of("tenants", name), wire.tenant_of_body)


def create_tenant(name: str, title: str, limits: Limits | None) -> Call[Tenant]:
    body = {"name": name, "title": title, **_limits(limits)}
    return Call("POST", path_of("tenants"), wire.tenant_of_body, body)


def change_tenant(name: str, changes: Mapping[str, Any]) -> Call[Tenant]:
    return Call("PATCH", path_of("tenants", name), wire.tenant_of_body, _changes(changes))


def remove_tenant(name: str) -> Call[None]:
    return Call("DELETE", path_of("tenants", name), nothing)


def list_projects(tenant: str | None) -> Call[list[Project]]:
    query = _query(tenant=tenant)
    return Call("GET", path_of("projects"), all_of(wire.project_of_body), query=query)


def create_project(
    name: str, tenant: str | None, title: str, limits: Limits | None
) -> Call[Project]:
    body = {"name": name, "title": title, **_query(tenant=tenant), **_limits(limits)}
    return Call("POST", path_of("projects"), wire.project_of_body, body)


def change_project(name: str, tenant: str | None, changes: Mapping[str, Any]) -> Call[Project]:
    path, query = path_of("projects", name), _query(tenant=tenant)
    return Call("PATCH", path, wire.project_of_body, _changes(changes), query=query)


def remove_project(name: str, tenant: str | None) -> Call[None]:
    return Call("DELETE", path_of("projects", name), nothing, query=_query(tenant=tenant))


# Principals and roles ---------------------------------------------------------------------------


def list_principals(tenant: str | None) -> Call[list[Principal]]:
    query = _query(tenant=tenant)
    return Call("GET", path_of("principals"), all_of(wire.principal_of_body), query=query)


def get_principal(principal_id: str) -> Call[Principal]:
    return Call("GET", path_of("principals", principal_id), wire.principal_of_body)


def create_principal(wanted: Principal) -> Call[Principal]:
    body = {
        "name": wanted.name,
        "kind": wanted.kind.value,
        "tenant": wanted.tenant,
        "project": wanted.project,
        "grants": wire.grants_body(wanted.grants),
        "subject": wanted.subject,
        "limits": wire.limits_body(wanted.limits),
    }
    return Call("POST", path_of("principals"), wire.principal_of_body, body)


def change_principal(principal_id: str, changes: Mapping[str, Any]) -> Call[Principal]:
    path = path_of("principals", principal_id)
    return Call("PATCH", path, wire.principal_of_body, _changes(changes))


def remove_principal(principal_id: str) -> Call[None]:
    return Call("DELETE", path_of("principals", principal_id), nothing)


def list_roles() -> Call[list[RoleEntry]]:
    def read(body: Any) -> RoleEntry:
        return RoleEntry(wire.role_of_body(body), Fields(body, "a role").flag("built_in", False))

    return Call("GET", path_of("roles"), all_of(read))


def create_role(role: Mapping[str, Any]) -> Call[CustomRole]:
    return Call("POST", path_of("roles"), wire.role_of_body, role)


def change_role(name: str, scope: str | None, rules: list[Any]) -> Call[CustomRole]:
    path, query = path_of("roles", name), _query(scope=scope)
    return Call("PUT", path, wire.role_of_body, {"rules": rules}, query=query)


def remove_role(name: str, scope: str | None) -> Call[None]:
    return Call("DELETE", path_of("roles", name), nothing, query=_query(scope=scope))


# Keys -------------------------------------------------------------------------------------------


def list_keys(tenant: str | None = None) -> Call[list[KeyRecord]]:
    query = _query(tenant=tenant)
    return Call("GET", path_of("keys"), all_of(wire.key_from_body), query=query)


def create_key(wanted: KeyRequest) -> Call[NewKey]:
    return Call("POST", path_of("keys"), _new_key, wire.key_request_body(wanted))


def change_key(key_id: str, changes: Mapping[str, Any]) -> Call[KeyRecord]:
    return Call("PATCH", path_of("keys", key_id), wire.key_from_body, _changes(changes))


def rotate_key(key_id: str, overlap_s: float) -> Call[RotatedKey]:
    path = path_of("keys", key_id, "rotate")
    return Call("POST", path, _rotated_key, {"overlap_s": overlap_s})


def revoke_key(key_id: str, *, descendants: bool = False) -> Call[KeyRecord]:
    query = {"descendants": "true"} if descendants else {}
    return Call("DELETE", path_of("keys", key_id), wire.key_from_body, query=query)


def _new_key(body: Any) -> NewKey:
    fields = Fields(body, "a new key")
    return NewKey(fields.text("key", low=1), wire.key_from_body(fields.raw("record")))


def _rotated_key(body: Any) -> RotatedKey:
    replaced = Fields(body, "a new key").raw("replaced", None)
    return RotatedKey(*_new_key(body), None if replaced is None else wire.key_from_body(replaced))


def _query(**given: str | None) -> dict[str, str]:
    return {name: value for name, value in given.items() if value is not None}


def _limits(limits: Limits | None) -> dict[str, Any]:
    return {} if limits is None else {"limits": wire.limits_body(limits)}


def _changes(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes as JSON: limits and grants are facts of ``core.access``."""
    plain: dict[str, Any] = {}
    for name, value in changes.items():
        if isinstance(value, Limits):
            plain[name] = wire.limits_body(value)
        elif isinstance(value, tuple) and any(isinstance(one, Grant) for one in value):
            plain[name] = wire.grants_body(value)
        else:
            plain[name] = list(value) if isinstance(value, tuple) else value
    return plain
