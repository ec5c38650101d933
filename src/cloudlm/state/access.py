"""The part of the state contract that holds identities and keys, and its rules as pure functions
that both twins apply. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol

from cloudlm.core.access import (
    ROOT,
    CustomRole,
    Grant,
    Identities,
    Identity,
    Principal,
    Project,
    Tenant,
)
from cloudlm.core.errors import Conflict, NotFound
from cloudlm.core.tenant import SESSION, KeyRecord


class AccessState(Protocol):
    """Identities and keys. ``replaces`` is what the caller has read: if it is not what is stored,
    the write is refused with Conflict, so that no change is lost."""

    async def list_identities(self) -> Identities:
        """All of them, as of one moment."""
        ...

    async def put_identity(self, fact: Identity, *, replaces: Identity | None = None) -> None:
        """Create (``replaces`` None) or change one. Conflict if it exists or changed meanwhile,
        NotFound if its tenant or project does not exist."""
        ...

    async def remove_identity(self, fact: Tenant | Project | CustomRole) -> None:
        """Forget one. Conflict if it changed meanwhile or is not empty: projects of a tenant,
        principals and living keys of a project, grants and living keys with a role."""
        ...

    async def remove_principal(
        self, principal_id: str, *, heir: str, heir_key: str, now: float
    ) -> Principal | None:
        """Forget a principal and revoke its keys. Its grants to others pass to the principal
        ``heir``, keys made with its keys to the key ``heir_key``, so that both stay bounded by
        somebody. None if there is none."""
        ...

    async def put_key(self, record: KeyRecord) -> None:
        """Store a new key's record; Conflict if the id exists."""
        ...

    async def get_key(self, key_id: str) -> KeyRecord | None: ...

    async def list_keys(self) -> list[KeyRecord]:
        """Sorted by creation."""
        ...

    async def change_key(
        self, wanted: KeyRecord, *, replaces: KeyRecord, successor: KeyRecord | None = None
    ) -> None:
        """Change a key's record and, in the same write, store the key that follows it. Conflict if
        it changed meanwhile; its last use is no change."""
        ...

    async def revoke_key(self, key_id: str, *, now: float) -> KeyRecord | None:
        """Set ``revoked_at`` if it is not set; None if there is no such key."""
        ...

    async def touch_keys(self, used: Mapping[str, float]) -> None:
        """Note when keys were used last; an earlier time than the one noted is passed over. No
        change that gateways must see."""
        ...

    async def last_uses(self) -> dict[str, float]:
        """When each key was used last: as noted, or as the ledger knows. Keys never used are not
        in it."""
        ...


def identity_key(fact: Identity) -> tuple[str, ...]:
    """What makes an identity one and the same within its kind."""
    match fact:
        case Tenant():
            return (fact.name,)
        case Project():
            return (fact.tenant, fact.name)
        case Principal():
            return (fact.id,)
        case CustomRole():
            return (fact.scope, fact.name)


def title_of(fact: Identity) -> str:
    """An identity as messages name it."""
    word = {Tenant: "tenant", Project: "project", Principal: "principal", CustomRole: "role"}
    return f"{word[type(fact)]} {'/'.join(identity_key(fact))[:140]!r}"


def check_replaced(fact: Identity, stored: Identity | None, replaces: Identity | None) -> None:
    """Raise Conflict unless what is stored is what the writer has read."""
    if stored == replaces:
        return
    if replaces is None:
        raise Conflict(f"{title_of(fact)} exists already")
    if stored is None:
        raise Conflict(f"{title_of(fact)} is gone meanwhile")
    raise Conflict(f"{title_of(fact)} changed meanwhile: read it again")


def check_parent(fact: Identity, everything: Identities) -> None:
    """Raise NotFound if what an identity belongs to does not exist, Conflict if another principal
    signs in with its subject."""
    tenants = {one.name for one in everything.tenants}
    projects = {(one.tenant, one.name) for one in everything.projects}
    if isinstance(fact, Project) and fact.tenant not in tenants:
        raise NotFound(f"tenant {fact.tenant[:80]!r} does not exist")
    if isinstance(fact, CustomRole) and fact.scope != "*" and fact.scope not in tenants:
        raise NotFound(f"tenant {fact.scope[:80]!r} does not exist")
    if isinstance(fact, Principal):
        if (fact.tenant, fact.project) not in projects:
            raise NotFound(
                f"project {fact.project[:80]!r} of tenant {fact.tenant[:80]!r} does not exist"
            )
        taken = (one for one in everything.principals if one.id != fact.id)
        if fact.subject and any(one.subject == fact.subject for one in taken):
            raise Conflict("another principal signs in with this subject already")


def check_empty(
    fact: Tenant | Project | CustomRole, everything: Identities, keys: Iterable[KeyRecord]
) -> None:
    """Raise Conflict if something still needs an identity that is to be removed."""
    for what in _needing(fact, everything, keys):
        raise Conflict(f"{title_of(fact)} is still needed by {what}: remove that first")


def _needing(
    fact: Tenant | Project | CustomRole, everything: Identities, keys: Iterable[KeyRecord]
) -> Iterable[str]:
    living = [key for key in keys if key.revoked_at is None]
    if isinstance(fact, CustomRole):
        within = {fact.scope} if fact.scope != "*" else None
        for principal in everything.principals:
            for grant in principal.grants:
                if grant.role == fact.name and _in(grant.scope, within):
                    yield f"a grant of {title_of(principal)}"
        for key in living:
            if key.role == fact.name and _in(key.scope, within):
                yield f"key {key.id!r}"
        return
    if isinstance(fact, Tenant):
        yield from (title_of(one) for one in everything.projects if one.tenant == fact.name)
        yield from (title_of(one) for one in everything.roles if one.scope == fact.name)
        yield from (f"key {key.id!r}" for key in living if key.tenant == fact.name)
        return
    own = (fact.tenant, fact.name)
    yield from (title_of(p) for p in everything.principals if (p.tenant, p.project) == own)
    yield from (f"key {key.id!r}" for key in living if (key.tenant, key.project) == own)


def _in(scope: str, tenants: set[str] | None) -> bool:
    return tenants is None or scope.partition("/")[0] in tenants


def without_principal(
    gone: Principal, principals: Iterable[Principal], heir: str
) -> list[Principal]:
    """The other principals that change when ``gone`` is removed: its grants are the heir's. Raises
    Conflict for the installation's own."""
    if gone.id == ROOT:
        raise Conflict(f"the principal {ROOT!r} is the installation itself; it cannot be removed")
    changed = []
    for one in principals:
        if one.id != gone.id and any(grant.granted_by == gone.id for grant in one.grants):
            grants = tuple(
                Grant(grant.role, grant.scope, heir) if grant.granted_by == gone.id else grant
                for grant in one.grants
            )
            changed.append(replace(one, grants=grants))
    return changed


def keys_without_principal(
    gone: Principal, keys: Iterable[KeyRecord], heir_key: str, now: float
) -> list[KeyRecord]:
    """The keys that change when ``gone`` is removed."""
    keys = list(keys)
    own = {key.id for key in keys if key.principal == gone.id} | {SESSION + gone.id}
    changed = []
    for key in keys:
        wanted = key
        if key.id in own and key.revoked_at is None:
            wanted = replace(wanted, revoked_at=now)
        if key.id not in own and key.made_with in own and heir_key not in own:
            wanted = replace(wanted, made_with=heir_key)
        if wanted is not key:
            changed.append(wanted)
    return changed


def check_key_replaced(stored: KeyRecord | None, replaces: KeyRecord) -> KeyRecord:
    """The stored record. Raises NotFound, or Conflict if it is not what the writer has read."""
    if stored is None:
        raise NotFound(f"key {replaces.id[:80]!r} does not exist")
    if replace(stored, last_used_at=None) != replace(replaces, last_used_at=None):
        raise Conflict(f"key {replaces.id[:80]!r} changed meanwhile: read it again")
    return stored


def sorted_identities(facts: Iterable[Identity]) -> Identities:
    """Facts in one order, by kind."""
    found = sorted(facts, key=identity_key)
    return Identities(
        tenants=tuple(one for one in found if isinstance(one, Tenant)),
        projects=tuple(one for one in found if isinstance(one, Project)),
        principals=tuple(one for one in found if isinstance(one, Principal)),
        roles=tuple(one for one in found if isinstance(one, CustomRole)),
    )
