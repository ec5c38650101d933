"""Decides who may do what. Pure: facts in, verdicts out; no clock, no I/O.

Default deny; a deny beats every allow; an unknown verb, resource or role gives nothing. A key may
do what its own role allows within its scope, *and* its principal may do now, *and* every key that
it descends from may do. A principal's grant counts only as far as the one who granted it may do the
same now. So no child exceeds its maker, at issue (``excess``) or at use (``allows``), also when a
role changes or its maker loses it later.

Policies (``security.policies``) stand beside roles: they forbid whatever roles allow, and permit as
a grant of the installation would.

One question serves both: an ``Ask`` may hold patterns, and "may do all of this pattern" is the test
at issue. Names are exact or beginnings ending in ``*``, so that two of them nest or are disjoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

from cloudlm.core.access import (
    EVERYWHERE,
    CustomRole,
    Effect,
    Grant,
    Identities,
    Principal,
    Project,
    Resource,
    Rule,
    Tenant,
    Verb,
    scope_of,
    tenant_of,
)
from cloudlm.core.tenant import SESSION, KeyRecord, Role
from cloudlm.security.roles import BUILT_IN

SELF = "@self"
_MAX_REMEMBERED = 50_000
_USE = Verb.USE
_VERBS = frozenset(verb.value for verb in Verb)
_RESOURCES = frozenset(kind.value for kind in Resource)


class Ask(NamedTuple):
    """May somebody do ``verb`` to the ``resource`` of that name in that scope?"""

    verb: str
    resource: str
    name: str = ""
    scope: str = EVERYWHERE


class Powers(NamedTuple):
    """A role within a scope, spelled out: one entry per verb and kind."""

    allowed: tuple[Ask, ...]
    denied: tuple[Ask, ...]


_NONE = Powers((), ())


def covers_name(pattern: str, name: str) -> bool:
    """Whether everything that ``name`` matches, ``pattern`` matches too."""
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else pattern == name


def covers_scope(outer: str, inner: str) -> bool:
    """Whether ``inner`` lies within ``outer``."""
    return outer in (EVERYWHERE, inner) or inner.startswith(f"{outer}/")


def covers(outer: Ask, inner: Ask) -> bool:
    """Whether ``outer`` holds all of ``inner``."""
    return (
        outer.verb == inner.verb
        and outer.resource == inner.resource
        and covers_name(outer.name, inner.name)
        and covers_scope(outer.scope, inner.scope)
    )


def shared(one: Ask, other: Ask) -> Ask | None:
    """What both hold, None if nothing."""
    if (one.verb, one.resource) != (other.verb, other.resource):
        return None
    name = _meet(one.name, other.name, covers_name)
    scope = _meet(one.scope, other.scope, covers_scope)
    if name is None or scope is None:
        return None
    return Ask(one.verb, one.resource, name, scope)


def _meet(one: str, other: str, covering: Callable[[str, str], bool]) -> str | None:
    if covering(one, other):
        return other
    return one if covering(other, one) else None


def spell_out(rules: Iterable[Rule], scope: str, holder: str) -> Powers:
    """A role's rules within ``scope`` for the principal ``holder``."""
    allowed: list[Ask] = []
    denied: list[Ask] = []
    for rule in rules:
        into = denied if rule.effect is Effect.DENY else allowed
        into.extend(_entries(rule, scope, holder))
    return Powers(tuple(allowed), tuple(denied))


def _entries(rule: Rule, scope: str, holder: str) -> Iterator[Ask]:
    verbs = sorted(_VERBS) if "*" in rule.verbs else [v for v in rule.verbs if v in _VERBS]
    for resource in rule.resources:
        kind, _, name = resource.partition(":")
        name = holder if name == SELF else name or "*"
        for one in sorted(_RESOURCES) if kind == "*" else [kind]:
            if one in _RESOURCES:
                yield from (Ask(verb, one, name, scope) for verb in verbs)


def _within(ask: Ask, models: Sequence[str]) -> list[Ask]:
    """What is left of ``ask`` for a key that may use these models."""
    if ask.resource != Resource.INFERENCE:
        return [ask]
    names = (_meet(ask.name, pattern, covers_name) for pattern in models)
    return [ask._replace(name=name) for name in names if name is not None]


def permits(powers: Powers, ask: Ask, excused: Sequence[Ask] = ()) -> bool:
    """Whether these powers alone allow all of ``ask``, but for what ``excused`` leaves out."""
    return any(covers(one, ask) for one in powers.allowed) and not forbids(powers, ask, excused)


def forbids(powers: Powers, ask: Ask, excused: Sequence[Ask] = ()) -> bool:
    """Whether these powers deny some of ``ask`` that is not ``excused``."""
    for one in powers.denied:
        part = shared(one, ask)
        if part is not None and not any(covers(other, part) for other in excused):
            return True
    return False


def session_of(principal: Principal, expires_at: float | None = None) -> KeyRecord:
    """What a person who signed in acts with, in place of a key: all that the principal may do, and
    no more. It is made anew for each request; keys made with it descend from the principal."""
    return KeyRecord(
        id=SESSION + principal.id,
        name="signed in",
        role=Role.OWNER,
        digest="",
        last4="",
        tenant=principal.tenant,
        project=principal.project,
        principal=principal.id,
        scope=EVERYWHERE,
        created_at=principal.created_at,
        expires_at=expires_at,
    )


class Policies(Protocol):
    """Rules beside roles (``security.policies``)."""

    def decide(self, principal: Principal, ask: Ask) -> bool | None:
        """True permits, as a grant of the installation would; False forbids, whatever roles say;
        None leaves it to roles. The same question always gets the same answer."""
        ...


class Directory:
    """Who there is at one moment. Never changes; make another when the facts change."""

    def __init__(
        self,
        identities: Identities,
        keys: Iterable[KeyRecord] = (),
        policies: Policies | None = None,
    ) -> None:
        self.identities = identities
        self._policies = policies
        self._tenants = {one.name: one for one in identities.tenants}
        self._projects = {one.scope: one for one in identities.projects}
        self._principals = {one.id: one for one in identities.principals}
        self._subjects = {one.subject: one for one in identities.principals if one.subject}
        self._roles = {(one.scope, one.name): one for one in identities.roles}
        self._keys = {one.id: one for one in keys}
        self._powers: dict[tuple[str, str, str], Powers] = {}
        self._verdicts: dict[tuple[str, Ask], bool] = {}
        self._uses: dict[tuple[str, str], bool] = {}  # by key and model: asked for every request

    # Looking up -----------------------------------------------------------------------------------

    def tenant(self, name: str) -> Tenant | None:
        return self._tenants.get(name)

    def project(self, tenant: str, name: str) -> Project | None:
        return self._projects.get(scope_of(tenant, name))

    def principal(self, principal_id: str) -> Principal | None:
        return self._principals.get(principal_id)

    def key(self, key_id: str) -> KeyRecord | None:
        return self._keys.get(key_id)

    def holder(self, key_id: str) -> KeyRecord | None:
        """The key of that id, or the session of whoever signed in under it."""
        if key_id.startswith(SESSION):
            principal = self._principals.get(key_id.removeprefix(SESSION))
            return session_of(principal) if principal is not None else None
        return self._keys.get(key_id)

    @cached_property
    def keys(self) -> tuple[KeyRecord, ...]:
        """All keys, oldest first."""
        return tuple(sorted(self._keys.values(), key=lambda one: (one.created_at, one.id)))

    def role(self, name: str, scope: str) -> CustomRole | None:
        """The custom role that ``name`` means within ``scope``: the tenant's own, else the
        installation's."""
        own = self._roles.get((tenant_of(scope), name))
        return own or self._roles.get((EVERYWHERE, name))

    def role_exists(self, name: str, scope: str) -> bool:
        return name in BUILT_IN or self.role(name, scope) is not None

    def of_subject(self, subject: str) -> Principal | None:
        """The person with this ``issuer#sub``."""
        return self._subjects.get(subject)

    # At use ---------------------------------------------------------------------------------------

    def alive(self, record: KeyRecord, now: float) -> bool:
        """Whether a key and what it stands on are there, not revoked, expired or disabled."""
        return record.usable(now) and self.stands(record)

    def stands(self, record: KeyRecord) -> bool:
        """Whether a key was not revoked and its tenant and principal are there and not disabled."""
        principal = self._principals.get(record.principal)
        tenant = self._tenants.get(record.tenant)
        return (
            record.revoked_at is None
            and tenant is not None
            and tenant.disabled_at is None
            and principal is not None
            and self._is_active(principal)
        )

    def may_infer(self, record: KeyRecord, model: str, verb: str = Verb.USE) -> bool:
        """Whether a living key may use a model, or (``lead``) go ahead of others with it."""
        if verb is not _USE:
            return self._may_infer(record, model, verb)
        asked = (record.id, model)
        verdict = self._uses.get(asked)
        if verdict is None:
            verdict = self._may_infer(record, model, verb)
            if len(self._uses) >= _MAX_REMEMBERED:
                self._uses.clear()
            self._uses[asked] = verdict
        return verdict

    def _may_infer(self, record: KeyRecord, model: str, verb: str) -> bool:
        scope = scope_of(record.tenant, record.project)
        return self.allows(record, Ask(verb, Resource.INFERENCE, model, scope))

    def allows(self, record: KeyRecord, ask: Ask) -> bool:
        """Whether a living key may do this. Verdicts are remembered, for gateways ask often."""
        asked = (record.id, ask)
        verdict = self._verdicts.get(asked)
        if verdict is None:
            verdict = self._decide(record, ask, (), at_use=True)
            if len(self._verdicts) >= _MAX_REMEMBERED:
                self._verdicts.clear()
            self._verdicts[asked] = verdict
        return verdict

    def reaches(self, record: KeyRecord, verb: str, resource: str) -> bool:
        """Whether a key's own role speaks of this kind at all, for some name in some scope."""
        powers = self._of(record.role, record.scope, record.principal)
        return any((one.verb, one.resource) == (verb, resource) for one in powers.allowed)

    # At issue -------------------------------------------------------------------------------------

    def excess(
        self,
        maker: KeyRecord,
        role: str,
        scope: str,
        holder: str,
        models: Sequence[str] = ("*",),
    ) -> Ask | None:
        """The first thing that ``role`` within ``scope``, narrowed to ``models``, would let the
        principal ``holder`` do and the key ``maker`` may not; None if it exceeds in nothing."""
        return self.excess_of(maker, self._of(role, scope, holder), models)

    def excess_of(
        self, maker: KeyRecord, powers: Powers, models: Sequence[str] = ("*",)
    ) -> Ask | None:
        """As ``excess``, of powers."""
        for ask in powers.allowed:
            for part in _within(ask, models):
                if any(covers(one, part) for one in powers.denied):
                    continue
                if not self._decide(maker, part, powers.denied):
                    return part
        return None

    # How ------------------------------------------------------------------------------------------

    def _decide(
        self, record: KeyRecord, ask: Ask, excused: Sequence[Ask], *, at_use: bool = False
    ) -> bool:
        if ask.verb not in _VERBS or ask.resource not in _RESOURCES:
            return False
        seen: set[str] = set()
        link: KeyRecord | None = record
        while link is not None:
            if link.id in seen:
                return False
            seen.add(link.id)
            if not self._link_allows(link, ask, excused, at_use):
                return False
            if not link.made_with:
                return True
            link = self.holder(link.made_with)
        return False

    def _link_allows(self, link: KeyRecord, ask: Ask, excused: Sequence[Ask], at_use: bool) -> bool:
        if ask.resource == Resource.INFERENCE and not any(
            covers_name(pattern, ask.name) for pattern in link.models
        ):
            return False
        powers = self._of(link.role, link.scope, link.principal)
        return permits(powers, ask, excused) and self._holds(link.principal, ask, excused, at_use)

    def _holds(self, principal_id: str, ask: Ask, excused: Sequence[Ask], at_use: bool) -> bool:
        """Whether a chain of grants leads from the installation itself to this principal. Policies
        speak of single things, so they are asked at use alone: of whoever stands in the chain."""
        seen: set[str] = set()
        waiting = [principal_id]
        while waiting:
            principal = self._principals.get(waiting.pop())
            if principal is None or principal.id in seen or not self._is_active(principal):
                continue
            seen.add(principal.id)
            verdict = self._policies.decide(principal, ask) if at_use and self._policies else None
            if verdict is False:
                continue
            powers = [(grant, self._granted(grant, principal)) for grant in principal.grants]
            if any(forbids(one, ask, excused) for _, one in powers):
                continue
            if verdict:
                return True
            for grant, one in powers:
                if any(covers(allowed, ask) for allowed in one.allowed):
                    if not grant.granted_by:
                        return True
                    waiting.append(grant.granted_by)
        return False

    def _is_active(self, principal: Principal) -> bool:
        tenant = self._tenants.get(principal.tenant)
        return principal.disabled_at is None and tenant is not None and tenant.disabled_at is None

    def _granted(self, grant: Grant, principal: Principal) -> Powers:
        return self._of(grant.role, grant.scope, principal.id)

    def _of(self, role: str, scope: str, holder: str) -> Powers:
        asked = (role, scope, holder)
        powers = self._powers.get(asked)
        if powers is None:
            rules = BUILT_IN.get(role)
            if rules is None:
                custom = self.role(role, scope)
                rules = custom.rules if custom is not None else None
            powers = _NONE if rules is None else spell_out(rules, scope, holder)
            self._powers[asked] = powers
        return powers
