"""Identities and keys as JSON, both ways; as ``core.wire`` for the rest of the control API.

Requests are read field by field, and a field that is not offered is refused: nobody assigns a
digest, a maker or a date by sending one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cloudlm.core.access import (
    CustomRole,
    Effect,
    Grant,
    Limits,
    Principal,
    PrincipalKind,
    Project,
    Resource,
    Rule,
    Tenant,
    Verb,
    check_scope,
)
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.fields import Fields, check_text
from cloudlm.core.model import check_name
from cloudlm.core.tenant import KeyRecord, Role

MAX_NAME = 64
MAX_TITLE = 200
MAX_ENTRIES = 100
MAX_OVERLAP_S = 90 * 86_400.0
_VERBS = frozenset(verb.value for verb in Verb)
_KINDS = frozenset(kind.value for kind in Resource)


@dataclass(frozen=True, slots=True)
class KeyRequest:
    """What may be asked of a new key. Empty texts mean: as the one who asks."""

    name: str
    role: str = Role.USER.value
    scope: str = ""
    principal: str = ""
    project: str = ""
    models: tuple[str, ...] = ("*",)
    limits: Limits = field(default_factory=Limits)
    expires_in_s: float | None = None


# Requests ---------------------------------------------------------------------------------------


def key_request_from_body(body: Any) -> KeyRequest:
    """Read a request for a key; only the name is required."""
    fields = Fields(body, "a key request")
    wanted = KeyRequest(
        name=fields.text("name", low=1, max_length=MAX_NAME),
        role=check_name(fields.text("role", Role.USER.value), "role"),
        scope=_optional_scope(fields),
        principal=fields.text("principal", "", max_length=MAX_NAME),
        project=_optional_name(fields, "project"),
        models=_patterns(fields),
        limits=_limits(fields),
        expires_in_s=_optional_seconds(fields, "expires_in_s"),
    )
    fields.end()
    return wanted


def key_request_body(wanted: KeyRequest) -> dict[str, Any]:
    """A request as JSON, without what is left to the server."""
    body = {**asdict(wanted), "models": list(wanted.models), "limits": limits_body(wanted.limits)}
    plain = KeyRequest("")
    keep = ("name", "role")
    return {
        name: value
        for name, value in body.items()
        if name in keep or getattr(wanted, name) != getattr(plain, name)
    }


def key_change_from_body(body: Any) -> dict[str, Any]:
    """Read a change of a key: those of ``name``, ``models``, ``limits``, ``expires_in_s`` that are
    given."""
    fields = Fields(body, "a change of a key")
    changes: dict[str, Any] = {}
    if "name" in fields:
        changes["name"] = fields.text("name", low=1, max_length=MAX_NAME)
    if "models" in fields:
        changes["models"] = _patterns(fields)
    if "limits" in fields:
        changes["limits"] = _limits(fields)
    if "expires_in_s" in fields:
        changes["expires_in_s"] = _optional_seconds(fields, "expires_in_s")
    fields.end()
    return changes


def rotation_from_body(body: Any) -> float:
    """Read ``{"overlap_s"}``: how long the old key stays good, seconds; 0 if it is left out."""
    fields = Fields(body, "a rotation")
    overlap_s = fields.number("overlap_s", 0.0, low=0.0, high=MAX_OVERLAP_S)
    fields.end()
    return overlap_s


def tenant_from_body(body: Any, now: float) -> Tenant:
    """Read a new tenant."""
    fields = Fields(body, "a tenant")
    made = Tenant(
        name=check_name(fields.text("name", low=1), "name"),
        title=fields.text("title", "", max_length=MAX_TITLE),
        limits=_limits(fields),
        created_at=now,
    )
    fields.end()
    return made


def project_from_body(body: Any, tenant: str, now: float) -> Project:
    """Read a new project; its tenant is ``tenant`` unless it is given."""
    fields = Fields(body, "a project")
    made = Project(
        tenant=check_name(fields.text("tenant", tenant, low=1), "tenant"),
        name=check_name(fields.text("name", low=1), "name"),
        title=fields.text("title", "", max_length=MAX_TITLE),
        limits=_limits(fields),
        created_at=now,
    )
    fields.end()
    return made


def principal_from_body(body: Any, principal_id: str, tenant: str, now: float) -> Principal:
    """Read a new principal, with an id of ours; its grants say not yet who granted them."""
    fields = Fields(body, "a principal")
    made = Principal(
        id=principal_id,
        name=fields.text("name", low=1, max_length=MAX_NAME),
        kind=fields.choice("kind", PrincipalKind, PrincipalKind.SERVICE.value),
        tenant=check_name(fields.text("tenant", tenant, low=1), "tenant"),
        project=_optional_name(fields, "project") or "default",
        grants=_grants(fields),
        subject=fields.text("subject", "", max_length=1000),
        limits=_limits(fields),
        created_at=now,
    )
    fields.end()
    return made


def change_from_body(body: Any, what: str, *, names: frozenset[str]) -> dict[str, Any]:
    """Read a change of a tenant, project or principal: those of ``names`` that are given.

    ``title`` and ``name`` are texts, ``disabled`` true or false, ``limits`` and ``grants`` whole.
    """
    fields = Fields(body, f"a change of a {what}")
    readers: Mapping[str, Any] = {
        "title": lambda: fields.text("title", max_length=MAX_TITLE),
        "name": lambda: fields.text("name", low=1, max_length=MAX_NAME),
        "disabled": lambda: fields.flag("disabled"),
        "limits": lambda: _limits(fields),
        "grants": lambda: _grants(fields),
    }
    changes = {name: readers[name]() for name in sorted(names) if name in fields}
    fields.end()
    return changes


def role_from_body(body: Any, scope: str, now: float, *, name: str | None = None) -> CustomRole:
    """Read a role; ``name`` is the one in the path. It may be granted within ``scope`` unless
    another is given."""
    fields = Fields(body, "a role")
    made = CustomRole(
        scope=check_scope(fields.text("scope", scope, low=1)),
        name=check_name(fields.text("name", low=1) if name is None else name, "name"),
        rules=tuple(_rule(entry) for entry in fields.items("rules", max_entries=MAX_ENTRIES)),
        created_at=now,
    )
    fields.end()
    if "/" in made.scope:
        raise InvalidRequest(
            f"a role belongs to a tenant or to '*', not to the project {made.scope!r}; grant it "
            "within the project instead",
            param="scope",
        )
    return made


def grants_body(grants: tuple[Grant, ...]) -> list[dict[str, str]]:
    """Grants as a request asks for them."""
    return [{"role": grant.role, "scope": grant.scope} for grant in grants]


def limits_body(limits: Limits) -> dict[str, Any]:
    return asdict(limits)


# Answers ----------------------------------------------------------------------------------------


def key_body(record: KeyRecord) -> dict[str, Any]:
    """A key's record for people: everything but the digest."""
    body = {**asdict(record), "role": str(record.role), "models": list(record.models)}
    del body["digest"]
    return body


def key_from_body(body: Any) -> KeyRecord:
    """The record with an empty digest, for that never leaves the server."""
    fields = Fields(body, "a key")
    plain = KeyRecord("", "", "", "", "")
    return KeyRecord(
        id=fields.text("id", low=1),
        name=fields.text("name"),
        role=fields.text("role"),
        digest="",
        last4=fields.text("last4"),
        tenant=fields.text("tenant", plain.tenant),
        created_at=fields.number("created_at", 0.0),
        revoked_at=fields.optional_number("revoked_at"),
        project=fields.text("project", plain.project),
        principal=fields.text("principal", plain.principal),
        scope=fields.text("scope", plain.scope),
        models=tuple(check_text(one, "models", max_length=200) for one in _models_of(fields)),
        limits=_limits(fields),
        expires_at=fields.optional_number("expires_at"),
        made_with=fields.text("made_with", ""),
        last_used_at=fields.optional_number("last_used_at"),
    )


def tenant_body(tenant: Tenant) -> dict[str, Any]:
    return asdict(tenant)


def tenant_of_body(body: Any) -> Tenant:
    fields = Fields(body, "a tenant")
    return Tenant(
        name=fields.text("name", low=1),
        title=fields.text("title", ""),
        limits=_limits(fields),
        created_at=fields.number("created_at", 0.0),
        disabled_at=fields.optional_number("disabled_at"),
    )


def project_body(project: Project) -> dict[str, Any]:
    return asdict(project)


def project_of_body(body: Any) -> Project:
    fields = Fields(body, "a project")
    return Project(
        tenant=fields.text("tenant", low=1),
        name=fields.text("name", low=1),
        title=fields.text("title", ""),
        limits=_limits(fields),
        created_at=fields.number("created_at", 0.0),
    )


def principal_body(principal: Principal) -> dict[str, Any]:
    body = asdict(principal)
    body["kind"] = principal.kind.value
    body["grants"] = [asdict(grant) for grant in principal.grants]
    return body


def principal_of_body(body: Any) -> Principal:
    fields = Fields(body, "a principal")
    return Principal(
        id=fields.text("id", low=1),
        name=fields.text("name"),
        kind=fields.choice("kind", PrincipalKind),
        tenant=fields.text("tenant"),
        project=fields.text("project"),
        grants=tuple(_grant_of(entry) for entry in fields.items("grants", ())),
        subject=fields.text("subject", ""),
        limits=_limits(fields),
        created_at=fields.number("created_at", 0.0),
        disabled_at=fields.optional_number("disabled_at"),
    )


def role_body(role: CustomRole, *, built_in: bool = False) -> dict[str, Any]:
    rules = [
        {
            "effect": rule.effect.value,
            "verbs": list(rule.verbs),
            "resources": list(rule.resources),
        }
        for rule in role.rules
    ]
    return {
        "scope": role.scope,
        "name": str(role.name),
        "rules": rules,
        "created_at": role.created_at,
        "built_in": built_in,
    }


def role_of_body(body: Any) -> CustomRole:
    fields = Fields(body, "a role")
    return CustomRole(
        scope=fields.text("scope"),
        name=fields.text("name", low=1),
        rules=tuple(_rule(entry) for entry in fields.items("rules")),
        created_at=fields.number("created_at", 0.0),
    )


# Parts ------------------------------------------------------------------------------------------


def _limits(fields: Fields) -> Limits:
    raw = fields.raw("limits", None)
    if raw is None:
        return Limits()
    inner = Fields(raw, "limits", path="limits.")

    def count(name: str) -> int | None:
        return None if inner.raw(name, None) is None else inner.integer(name, high=10**12)

    def money(name: str) -> float | None:
        return None if inner.raw(name, None) is None else inner.number(name, low=0.0, high=1e12)

    limits = Limits(
        count("requests_per_minute"),
        count("tokens_per_minute"),
        count("concurrent_streams"),
        money("spend_per_month"),
        money("spend_per_day"),
    )
    inner.end()
    return limits


def _grants(fields: Fields) -> tuple[Grant, ...]:
    grants = []
    for entry in fields.items("grants", (), max_entries=MAX_ENTRIES):
        inner = Fields(entry, "a grant", path="grants.")
        role = check_name(inner.text("role", low=1), "grants.role")
        grants.append(Grant(role, check_scope(inner.text("scope", low=1), "grants.scope")))
        inner.end()
    return tuple(dict.fromkeys(grants))


def _grant_of(entry: Any) -> Grant:
    fields = Fields(entry, "a grant", path="grants.")
    return Grant(fields.text("role"), fields.text("scope"), fields.text("granted_by", ""))


def _rule(entry: Any) -> Rule:
    fields = Fields(entry, "a rule", path="rules.")
    effect = fields.choice("effect", Effect, Effect.ALLOW.value)
    verbs = tuple(check_text(v, "rules.verbs", max_length=20) for v in fields.items("verbs"))
    kinds = tuple(
        check_text(k, "rules.resources", max_length=200) for k in fields.items("resources")
    )
    fields.end()
    for verb in verbs:
        if verb != "*" and verb not in _VERBS:
            raise InvalidRequest(
                f"unknown verb {verb!r}; there are *, {', '.join(sorted(_VERBS))}",
                param="rules.verbs",
            )
    for kind in kinds:
        word, _, name = kind.partition(":")
        if (kind != "*" and word not in _KINDS) or "*" in name[:-1]:
            raise InvalidRequest(
                f"unknown resource {kind!r}; use *, a kind ({', '.join(sorted(_KINDS))}), or "
                "kind:name where the name may end in '*'",
                param="rules.resources",
            )
    return Rule(verbs, kinds, effect)


def _models_of(fields: Fields) -> list[Any]:
    return fields.items("models", ("*",), max_entries=MAX_ENTRIES)


def _patterns(fields: Fields) -> tuple[str, ...]:
    names = tuple(
        check_text(one, "models", low=1, max_length=MAX_TITLE) for one in _models_of(fields)
    )
    for name in names:
        if "*" in name[:-1]:
            raise InvalidRequest(
                f"models: {name!r} may hold '*' at its end only, such as 'bank-*'", param="models"
            )
    return names


def _optional_scope(fields: Fields) -> str:
    scope = fields.text("scope", "", max_length=MAX_TITLE)
    return check_scope(scope) if scope else ""


def _optional_name(fields: Fields, name: str) -> str:
    text = fields.text(name, "", max_length=MAX_NAME)
    return check_name(text, name) if text else ""


def _optional_seconds(fields: Fields, name: str) -> float | None:
    if fields.raw(name, None) is None:
        return None
    return fields.number(name, low=1.0, high=1e10)
