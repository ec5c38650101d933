"""People who sign in: from an issuer's token to a principal that is known and can be stopped.

The first good token of a person makes a principal, if a rule of the mapping fits; later ones keep
its grants at what the claims say. Grants given by others stay. Must not decide what a grant allows.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cloudlm.core.access import Grant, Principal, PrincipalKind
from cloudlm.core.clock import Clock
from cloudlm.core.errors import Conflict, NotFound, PermissionDenied
from cloudlm.core.settings import OidcSettings
from cloudlm.security.access import Directory
from cloudlm.security.claims import ClaimRule, Mapped, map_claims, name_of, read_rules, subject_of
from cloudlm.security.issuer import Issuer, open_issuer
from cloudlm.state.base import State
from cloudlm.state.home import read_yaml
from cloudlm.telemetry.logs import get_logger

_MAX_REMEMBERED = 10_000
_log = get_logger(__name__)


class People:
    """Makes principals of people, and keeps them as their issuer describes them."""

    def __init__(
        self, issuer: Issuer, rules: Sequence[ClaimRule], state: State, clock: Clock
    ) -> None:
        self.claims = issuer.claims
        self._rules = rules
        self._state = state
        self._clock = clock
        self._writing = asyncio.Lock()
        self._latest: dict[str, float] = {}

    async def settle(self, claims: Mapping[str, Any], directory: Directory) -> bool:
        """See to it that whoever these claims speak of is known as they say; whether anything was
        written. An older token does not undo what a newer one said. Raises PermissionDenied if no
        rule lets them in."""
        subject, mapped = subject_of(claims), map_claims(self._rules, claims)
        found = directory.of_subject(subject)
        if found is None:
            if mapped is None:
                raise PermissionDenied(
                    "you are signed in, but no rule of this installation lets you in: ask its "
                    "operator for one (oidc.mapping), or for a principal of your own"
                )
            await self._make(subject, mapped, claims)
            return True
        if claims["iat"] < self._latest.get(subject, 0.0):
            return False
        if len(self._latest) >= _MAX_REMEMBERED:
            self._latest.clear()
        self._latest[subject] = claims["iat"]
        # Rules for one tenant give nothing to a principal that lies in another's hands.
        applies = mapped is not None and mapped.tenant == found.tenant
        wanted = _with_grants(found, mapped.grants if mapped is not None and applies else ())
        if wanted == found:
            return False
        try:
            await self._state.put_identity(wanted, replaces=found)
        except Conflict:  # somebody else wrote: what it is now, the next request sees
            return False
        _log.info("grants_follow_claims", extra={"fields": {"principal": found.id}})
        return True

    async def _make(self, subject: str, mapped: Mapped, claims: Mapping[str, Any]) -> None:
        made = Principal(
            id=f"p-{secrets.token_hex(6)}",
            name=name_of(claims),
            kind=PrincipalKind.PERSON,
            tenant=mapped.tenant,
            project=mapped.project,
            grants=mapped.grants,
            subject=subject,
            created_at=self._clock.now(),
        )
        async with self._writing:
            try:
                await self._state.put_identity(made)
            except Conflict:  # two first requests at once: the other was first
                return
            except NotFound as error:
                raise PermissionDenied(
                    f"you are signed in, but your place is missing: {error.message}; ask the "
                    "operator to make it or to mend oidc.mapping"
                ) from None
        _log.info("person_made", extra={"fields": {"principal": made.id}})


def _with_grants(found: Principal, wanted: tuple[Grant, ...]) -> Principal:
    """``found`` with these grants of the installation, and those that others gave."""
    given = tuple(grant for grant in found.grants if grant.granted_by)
    return replace(found, grants=(*wanted, *given))


def open_people(settings: OidcSettings, state: State, clock: Clock) -> People | None:
    """What the settings ask for, None for no sign-in. Raises BadSetting, MissingExtra."""
    issuer = open_issuer(settings, clock)
    if issuer is None:
        return None
    rules: tuple[ClaimRule, ...] = ()
    if settings.mapping:
        path = Path(settings.mapping).expanduser()
        rules = read_rules(read_yaml(path, "file of oidc.mapping"), f"oidc.mapping {path}")
    return People(issuer, rules, state, clock)
