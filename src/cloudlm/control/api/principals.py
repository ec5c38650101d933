"""``/api/v1/principals``: people and services, and what they were granted.

Nobody grants more than they have, and nobody changes a principal that may do more than they.
"""

from __future__ import annotations

import secrets
from dataclasses import replace

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cloudlm.control.api.caller import Caller, caller_of, note_made
from cloudlm.control.api.schemas import PRINCIPAL, PRINCIPAL_CHANGE
from cloudlm.control.api.services import Services, body_of, read_object
from cloudlm.core.access import EVERYWHERE, ROOT, Grant, Principal, Resource, Verb
from cloudlm.core.errors import Conflict, InvalidRequest, NotFound
from cloudlm.core.wire_access import change_from_body, principal_body, principal_from_body

_FIELDS = frozenset(("name", "grants", "limits", "disabled"))


def routes(services: Services) -> APIRouter:
    """The routes of this noun."""
    router = APIRouter(prefix="/principals", tags=["principals"])
    state, clock = services.state, services.clock

    @router.get("", summary="List principals")
    async def list_principals(
        request: Request, tenant: str | None = Query(None, max_length=64)
    ) -> Response:
        caller = caller_of(request)
        seen = [
            principal_body(one)
            for one in caller.directory.identities.principals
            if tenant in (None, one.tenant)
            and caller.may(Verb.READ, Resource.PRINCIPALS, one.id, one.scope)
        ]
        return JSONResponse({"data": seen})

    @router.post("", status_code=201, summary="Make a principal", openapi_extra=body_of(PRINCIPAL))
    async def create_principal(request: Request) -> Response:
        caller = caller_of(request)
        principal_id = f"p-{secrets.token_hex(6)}"
        body = await read_object(request)
        made = principal_from_body(body, principal_id, caller.tenant, clock.now())
        # Who signs in is one person for the whole installation: no tenant claims them for itself.
        scope = EVERYWHERE if made.subject else made.scope
        caller.demand(Verb.CREATE, Resource.PRINCIPALS, made.id, scope)
        made = replace(made, grants=_granted(caller, made, made.grants))
        await state.put_identity(made)
        note_made(request, made.id)
        return JSONResponse(principal_body(made), status_code=201)

    @router.get("/{principal}", summary="Show a principal")
    async def show_principal(principal: str, request: Request) -> Response:
        return JSONResponse(principal_body(_found(caller_of(request), principal, Verb.READ)))

    @router.patch(
        "/{principal}", summary="Change a principal", openapi_extra=body_of(PRINCIPAL_CHANGE)
    )
    async def change_principal(principal: str, request: Request) -> Response:
        caller = caller_of(request)
        found = _found(caller, principal, Verb.UPDATE)
        caller.demand_not_below(found)
        body = await read_object(request)
        changes = change_from_body(body, "principal", names=_FIELDS)
        if "grants" in changes:
            changes["grants"] = _granted(caller, found, changes["grants"])
        disabled = changes.pop("disabled", found.disabled_at is not None)
        if found.id == ROOT and (disabled or "grants" in changes):
            raise Conflict(f"the principal {ROOT!r} is the installation itself; it stays owner")
        stopped = (found.disabled_at or clock.now()) if disabled else None
        wanted = replace(found, **changes, disabled_at=stopped)
        await state.put_identity(wanted, replaces=found)
        return JSONResponse(principal_body(wanted))

    @router.delete("/{principal}", summary="Remove a principal and revoke its keys")
    async def remove_principal(principal: str, request: Request) -> Response:
        caller = caller_of(request)
        found = _found(caller, principal, Verb.DELETE)
        caller.demand_not_below(found)
        if found.id == caller.key.principal:
            raise Conflict("a principal cannot remove itself: somebody must inherit its grants")
        await state.remove_principal(
            found.id, heir=caller.key.principal, heir_key=caller.key.id, now=clock.now()
        )
        return JSONResponse(principal_body(found))

    return router


def _found(caller: Caller, principal_id: str, verb: Verb) -> Principal:
    missing = NotFound(f"principal {principal_id[:80]!r} does not exist")
    found = caller.directory.principal(principal_id)
    if found is None:
        raise missing
    caller.demand_seen(verb, Resource.PRINCIPALS, found.id, found.scope, missing)
    return found


def _granted(caller: Caller, holder: Principal, wanted: tuple[Grant, ...]) -> tuple[Grant, ...]:
    """The grants with who granted them: as before for those that were there, else the caller, who
    must have what it grants. Raises InvalidRequest for an unknown role, PermissionDenied."""
    before = {(one.role, one.scope): one for one in holder.grants if one.granted_by}
    granted = []
    for one in wanted:
        if not caller.directory.role_exists(one.role, one.scope):
            raise InvalidRequest(
                f"there is no role {one.role!r} within {one.scope!r}; 'cloudlm roles list' shows "
                "those there are",
                param="grants.role",
            )
        known = before.get((one.role, one.scope))
        if known is None:
            caller.demand_covers(one.role, one.scope, holder.id)
            known = Grant(one.role, one.scope, caller.key.principal)
        granted.append(known)
    return tuple(granted)
