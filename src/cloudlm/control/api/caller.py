"""Who asks control for something, and what that one may do: the routes' way to ask ``security``.

An object that the caller may not read does not exist for it (404); one that it sees but may not
change is refused (403). Must not read or write the state but to learn who there is.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request

from cloudlm.control.people import People
from cloudlm.core.access import Principal, Resource, Verb, scope_of
from cloudlm.core.clock import Clock
from cloudlm.core.errors import CloudlmError, NotFound, PermissionDenied
from cloudlm.core.tenant import KeyRecord
from cloudlm.security.access import Ask, Directory, Policies, Powers, session_of
from cloudlm.security.claims import subject_of
from cloudlm.security.keys import bearer, invalid_key, key_id, verify
from cloudlm.security.tokens import bad_token, looks_signed
from cloudlm.state.base import State
from cloudlm.telemetry.logs import get_logger

_TOUCH_EVERY_S = 60.0
_log = get_logger(__name__)


class Callers:
    """Finds out who asks. Reads identities again whenever the state's version has grown, so that a
    revoked key is refused by the very next request."""

    def __init__(
        self,
        state: State,
        pepper: bytes,
        clock: Clock,
        people: People | None = None,
        policies: Policies | None = None,
    ) -> None:
        self._state = state
        self._pepper = pepper
        self._clock = clock
        self._people = people
        self._policies = policies
        self._read: tuple[int, Directory] | None = None
        self._touched: dict[str, float] = {}

    async def directory(self) -> Directory:
        """Who there is now."""
        version = await self._state.version()
        if self._read is None or self._read[0] != version:
            # The version is read first: a change made meanwhile grows it and is read next time.
            identities = await self._state.list_identities()
            keys = await self._state.list_keys()
            self._read = version, Directory(identities, keys, self._policies)
        return self._read[1]

    async def of(self, authorization: str | None, api_key: str | None) -> Caller:
        """Whose key or sign-in token this is. Raises AuthenticationFailed; for tokens also
        PermissionDenied, Unavailable."""
        text = bearer(authorization, api_key)
        if self._people is not None and looks_signed(text):
            return await self._signed_in(self._people, text)
        found = key_id(text)
        directory = await self.directory()
        now = self._clock.now()
        record = verify(text, None if found is None else directory.key(found), self._pepper, now)
        if not directory.alive(record, now):
            raise invalid_key()
        await self._touch(record, now)
        return Caller(record, directory)

    async def _signed_in(self, people: People, text: str) -> Caller:
        claims = await people.claims(text)
        directory = await self.directory()
        if await people.settle(claims, directory):
            directory = await self.directory()
        principal = directory.of_subject(subject_of(claims))
        if principal is None:
            raise bad_token()  # removed at this very moment
        session = session_of(principal, claims["exp"])
        if not directory.stands(session):
            raise bad_token()
        return Caller(session, directory)

    async def _touch(self, record: KeyRecord, now: float) -> None:
        if now - self._touched.get(record.id, -_TOUCH_EVERY_S) < _TOUCH_EVERY_S:
            return
        self._touched[record.id] = now
        try:
            await self._state.touch_keys({record.id: now})
        except CloudlmError as error:  # nobody is refused because a date could not be written
            _log.warning("key_use_not_noted", extra={"fields": {"reason": error.message}})


class Caller:
    """One request's key, among those who were there when it came."""

    def __init__(self, key: KeyRecord, directory: Directory) -> None:
        self.key = key
        self.directory = directory

    @property
    def tenant(self) -> str:
        """Where this caller looks when it does not say where."""
        return self.key.tenant

    def may(self, verb: Verb, resource: Resource, name: str, scope: str) -> bool:
        return self.directory.allows(self.key, Ask(verb, resource, name, scope))

    def demand(self, verb: Verb, resource: Resource, name: str, scope: str) -> None:
        """Raise PermissionDenied unless the caller may do this."""
        self.demand_ask(Ask(verb, resource, name, scope))

    def demand_ask(self, ask: Ask) -> None:
        if not self.directory.allows(self.key, ask):
            raise _denied(self.key, ask)

    def demand_seen(
        self, verb: Verb, resource: Resource, name: str, scope: str, missing: NotFound
    ) -> None:
        """Raise ``missing`` if the caller may not even read it, else as ``demand``."""
        if not self.may(Verb.READ, resource, name, scope):
            raise missing
        self.demand(verb, resource, name, scope)

    def demand_covers(
        self, role: str, scope: str, holder: str, models: Sequence[str] = ("*",)
    ) -> None:
        """Raise PermissionDenied if a role within a scope is more than the caller has."""
        excess = self.directory.excess(self.key, role, scope, holder, models)
        if excess is not None:
            raise _exceeds(role, scope, excess)

    def demand_covers_powers(self, powers: Powers, what: str, scope: str) -> None:
        """As ``demand_covers``, of powers."""
        excess = self.directory.excess_of(self.key, powers)
        if excess is not None:
            raise _exceeds(what, scope, excess)

    def demand_not_below(self, principal: Principal) -> None:
        """Raise PermissionDenied if the principal may do more than the caller: nobody takes away,
        or takes over, what is above them."""
        for grant in principal.grants:
            self.demand_covers(grant.role, grant.scope, principal.id)


def caller_of(request: Request) -> Caller:
    """The caller that the edge has found out."""
    caller: Caller = request.state.caller
    return caller


def note_made(request: Request, what: str) -> None:
    """Let the audit log know the id of what a route made."""
    request.state.made = what


def key_scope(record: KeyRecord) -> str:
    """Where a key is kept."""
    return scope_of(record.tenant, record.project)


def _denied(key: KeyRecord, ask: Ask) -> PermissionDenied:
    where = "the whole installation" if ask.scope == "*" else ask.scope
    return PermissionDenied(
        f"this key (role {str(key.role)!r} within {key.scope!r}) may not {ask.verb} "
        f"{ask.resource} in {where!r}; ask for a grant that allows it"
    )


def _exceeds(role: str, scope: str, excess: Ask) -> PermissionDenied:
    name = f" {excess.name!r}" if excess.name not in ("", "*") else ""
    return PermissionDenied(
        f"role {str(role)!r} within {scope!r} is more than you have: it may {excess.verb} "
        f"{excess.resource}{name} in {excess.scope!r}, and you may not"
    )
