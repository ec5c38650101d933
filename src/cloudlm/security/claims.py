"""What a person may do by what an issuer says of them: claims in, grants out. Pure.

Rules are read from a file. All rules whose claims all fit give their grants; the first of them
says where the person belongs. Who fits none is nobody. Must not look anything up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloudlm.core.access import (
    DEFAULT_PROJECT,
    DEFAULT_TENANT,
    Grant,
    check_scope,
    scope_of,
)
from cloudlm.core.errors import BadSetting, InvalidRequest
from cloudlm.core.fields import Fields
from cloudlm.core.model import check_name

MAX_RULES = 1000
_MAX_NAME = 64


@dataclass(frozen=True, slots=True)
class ClaimRule:
    """Claims that must all fit, and what follows: where one belongs, and a role within a scope."""

    claims: tuple[tuple[str, str | bool | int], ...]
    tenant: str
    project: str
    role: str
    scope: str

    def fits(self, said: Mapping[str, Any]) -> bool:
        """Whether every claim is the wanted one or, if it is a list, holds it. An ``email`` counts
        only if the issuer has verified it: others let people write what they like there."""
        if (
            any(name == "email" for name, _ in self.claims)
            and said.get("email_verified") is not True
        ):
            return False
        return all(_holds(said.get(name), wanted) for name, wanted in self.claims)


def _holds(said: Any, wanted: str | bool | int) -> bool:
    if isinstance(said, list):
        return any(_holds(one, wanted) for one in said if not isinstance(one, list))
    return type(said) is type(wanted) and said == wanted


@dataclass(frozen=True, slots=True)
class Mapped:
    """What rules make of somebody's claims."""

    tenant: str
    project: str
    grants: tuple[Grant, ...]


def map_claims(rules: Sequence[ClaimRule], said: Mapping[str, Any]) -> Mapped | None:
    """Where somebody belongs and what they are granted, None if no rule fits. Grants are the
    installation's own: nobody else gave them."""
    fitting = [rule for rule in rules if rule.fits(said)]
    if not fitting:
        return None
    grants = dict.fromkeys(Grant(rule.role, rule.scope) for rule in fitting)
    return Mapped(fitting[0].tenant, fitting[0].project, tuple(grants))


def subject_of(said: Mapping[str, Any]) -> str:
    """``issuer#sub``: who a token speaks of, one and the same for ever."""
    return f"{said['iss']}#{said['sub']}"


def name_of(said: Mapping[str, Any]) -> str:
    """What to call somebody: the first claim that names them."""
    for claim in ("email", "preferred_username", "name", "sub"):
        value = said.get(claim)
        if isinstance(value, str) and value.strip():
            shown = "".join(one for one in value if one.isprintable())[:_MAX_NAME].strip()
            if shown:
                return shown
    return "somebody"


def read_rules(tree: Any, source: str) -> tuple[ClaimRule, ...]:
    """Rules out of the content of a file, a list. Raises BadSetting naming ``source`` and the
    rule."""
    if not isinstance(tree, list) or len(tree) > MAX_RULES:
        raise BadSetting(
            f"{source} must hold a list of at most {MAX_RULES} rules, each such as "
            "{claims: {groups: bank-admins}, tenant: acme, role: admin}",
            param="oidc.mapping",
        )
    rules = []
    for number, one in enumerate(tree, 1):
        try:
            rules.append(_read_rule(one))
        except InvalidRequest as error:
            raise BadSetting(
                f"{source}, rule {number}: {error.message}", param="oidc.mapping"
            ) from None
    return tuple(rules)


def _read_rule(body: Any) -> ClaimRule:
    fields = Fields(body, "a rule")
    claims = fields.mapping("claims")
    if not claims:
        raise InvalidRequest("a rule needs claims: without any it would fit everybody")
    for name, value in claims.items():
        if not isinstance(name, str) or not isinstance(value, str | bool | int):
            raise InvalidRequest(f"claim {str(name)[:80]!r} must be a text, a number or true/false")
    tenant = check_name(fields.text("tenant", DEFAULT_TENANT, low=1), "tenant")
    project = check_name(fields.text("project", DEFAULT_PROJECT, low=1), "project")
    role = check_name(fields.text("role", low=1), "role")
    scope = check_scope(fields.text("scope", scope_of(tenant, project), low=1))
    fields.end()
    return ClaimRule(tuple(claims.items()), tenant, project, role, scope)
