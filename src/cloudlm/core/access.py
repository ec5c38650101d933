"""The words of who may do what: tenants, projects, principals, grants and roles. Plain facts.

A *tenant* holds *projects*; a *principal* (a person or a service) belongs to a project and holds
*grants*, each a role within a scope; a key speaks for one principal. A *role* is a set of rules
over (verb, resource). What follows from these facts is decided in ``security.access``; nothing here
decides. Built-in roles are in ``security.roles``.

A scope is a text: ``*`` the whole installation, ``acme`` a tenant, ``acme/web`` a project of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.model import check_name

EVERYWHERE = "*"
DEFAULT_TENANT = "default"
DEFAULT_PROJECT = "default"
ROOT = "root"
"""The principal of the installation itself: owner everywhere, never disabled or removed."""


class Verb(StrEnum):
    """What can be done to a resource."""

    READ = "read"
    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"
    USE = "use"
    LEAD = "lead"


class Resource(StrEnum):
    """Kinds of things. Models, jobs, drivers, and deployments that name no tenant belong to the
    installation and are guarded in the scope of the default tenant; ``inference`` is named by the
    model used."""

    TENANTS = "tenants"
    PROJECTS = "projects"
    PRINCIPALS = "principals"
    ROLES = "roles"
    KEYS = "keys"
    AUDIT = "audit"
    USAGE = "usage"
    MODELS = "models"
    DEPLOYMENTS = "deployments"
    JOBS = "jobs"
    DRIVERS = "drivers"
    LOGS = "logs"
    INFERENCE = "inference"


class Effect(StrEnum):
    """Whether a rule gives or takes; what is taken cannot be given."""

    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True, slots=True)
class Rule:
    """Verbs on resources. ``*`` is every verb or every resource. A resource is a kind, or a kind
    and a name: ``inference:bank``, ``inference:bank-*``; ``keys:@self`` are the holder's own."""

    verbs: tuple[str, ...]
    resources: tuple[str, ...]
    effect: Effect = Effect.ALLOW


@dataclass(frozen=True, slots=True)
class CustomRole:
    """A role that somebody made. ``scope`` is where it can be granted: ``*`` or one tenant."""

    scope: str
    name: str
    rules: tuple[Rule, ...]
    created_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be used at most; None is no limit of one's own. Tenant, project, principal and key
    each have theirs, and all of them hold at once.

    ``requests_per_minute`` counts accepted requests, ``tokens_per_minute`` prompt and completion
    tokens, ``concurrent_streams`` requests in flight (streamed or not), ``spend_per_month`` and
    ``spend_per_day`` are money in the price table's currency per calendar month and day (UTC).
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_streams: int | None = None
    spend_per_month: float | None = None
    spend_per_day: float | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """A customer or department; nothing of one is visible to another. ``disabled_at`` stops all."""

    name: str
    title: str = ""
    limits: Limits = field(default_factory=Limits)
    created_at: float = 0.0
    disabled_at: float | None = None


@dataclass(frozen=True, slots=True)
class Project:
    """A part of a tenant that is granted and accounted for by itself."""

    tenant: str
    name: str
    title: str = ""
    limits: Limits = field(default_factory=Limits)
    created_at: float = 0.0

    @property
    def scope(self) -> str:
        return scope_of(self.tenant, self.name)


class PrincipalKind(StrEnum):
    """Who stands behind a principal."""

    PERSON = "person"
    SERVICE = "service"


@dataclass(frozen=True, slots=True)
class Grant:
    """A role within a scope. It counts only as far as ``granted_by``, a principal's id, may do the
    same at that moment; empty is the installation itself."""

    role: str
    scope: str
    granted_by: str = ""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who acts. ``subject`` is ``issuer#sub`` of a person who signs in, else empty."""

    id: str
    name: str
    kind: PrincipalKind
    tenant: str = DEFAULT_TENANT
    project: str = DEFAULT_PROJECT
    grants: tuple[Grant, ...] = ()
    subject: str = ""
    limits: Limits = field(default_factory=Limits)
    created_at: float = 0.0
    disabled_at: float | None = None

    @property
    def scope(self) -> str:
        return scope_of(self.tenant, self.project)


Identity = Tenant | Project | Principal | CustomRole


@dataclass(frozen=True, slots=True)
class Identities:
    """All identities of one moment, each kind sorted by its key."""

    tenants: tuple[Tenant, ...] = ()
    projects: tuple[Project, ...] = ()
    principals: tuple[Principal, ...] = ()
    roles: tuple[CustomRole, ...] = ()


FIRST_IDENTITIES = Identities(
    tenants=(Tenant(DEFAULT_TENANT),),
    projects=(Project(DEFAULT_TENANT, DEFAULT_PROJECT),),
    principals=(Principal(ROOT, ROOT, PrincipalKind.SERVICE, grants=(Grant("owner", "*"),)),),
)
"""What every state holds from its first moment."""


def scope_of(tenant: str, project: str = "") -> str:
    """The scope of a tenant, or of one of its projects."""
    return f"{tenant}/{project}" if project else tenant


def tenant_of(scope: str) -> str:
    """The tenant of a scope, ``*`` for the whole installation."""
    return scope.partition("/")[0]


def check_scope(scope: str, param: str = "scope") -> str:
    """Return ``scope`` if it has the form of one. Raises InvalidRequest."""
    if scope == EVERYWHERE:
        return scope
    tenant, slash, project = scope.partition("/")
    try:
        check_name(tenant)
        if slash:
            check_name(project)
    except InvalidRequest:
        raise InvalidRequest(
            f"{param} {scope[:80]!r} is not valid: use '*' for the whole installation, a tenant's "
            "name, or tenant/project",
            param=param,
        ) from None
    return scope
