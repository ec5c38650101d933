"""``/api/v1/roles``: the built-in roles and those that a tenant or the installation made.

A role may never hold more than the one who writes it: whoever was granted it would get that too.
"""

from __future__ import annotations

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cloudlm.control.api.caller import Caller, caller_of
from cloudlm.control.api.schemas import ROLE, ROLE_CHANGE
from cloudlm.control.api.services import Services, body_of, read_object
from cloudlm.core.access import CustomRole, Resource, Verb
from cloudlm.core.errors import Conflict, NotFound
from cloudlm.core.wire_access import role_body, role_from_body
from cloudlm.security.access import spell_out
from cloudlm.security.roles import BUILT_IN


def routes(services: Services) -> APIRouter:
    """The routes of this noun."""
    router = APIRouter(prefix="/roles", tags=["roles"])
    state, clock = services.state, services.clock

    @router.get("", summary="List roles")
    async def list_roles(request: Request) -> Response:
        caller = caller_of(request)
        own = [
            role_body(one)
            for one in caller.directory.identities.roles
            if caller.may(Verb.READ, Resource.ROLES, one.name, one.scope)
        ]
        return JSONResponse({"data": [*(_built_in(name) for name in BUILT_IN), *own]})

    @router.post("", status_code=201, summary="Make a role", openapi_extra=body_of(ROLE))
    async def create_role(request: Request) -> Response:
        caller = caller_of(request)
        made = role_from_body(await read_object(request), caller.tenant, clock.now())
        caller.demand(Verb.CREATE, Resource.ROLES, made.name, made.scope)
        _check(caller, made)
        await state.put_identity(made)
        return JSONResponse(role_body(made), status_code=201)

    @router.get("/{role}", summary="Show a role")
    async def show_role(
        role: str, request: Request, scope: str | None = Query(None, max_length=64)
    ) -> Response:
        if role in BUILT_IN:
            return JSONResponse(_built_in(role))
        return JSONResponse(role_body(_found(caller_of(request), role, scope, Verb.READ)))

    @router.put("/{role}", summary="Replace a role's rules", openapi_extra=body_of(ROLE_CHANGE))
    async def change_role(
        role: str, request: Request, scope: str | None = Query(None, max_length=64)
    ) -> Response:
        caller = caller_of(request)
        found = _found(caller, role, scope, Verb.UPDATE)
        body = await read_object(request)
        read = role_from_body(body, found.scope, found.created_at, name=role)
        if read.scope != found.scope:
            raise Conflict(f"role {role!r} belongs to {found.scope!r}; that cannot change")
        _check(caller, read)
        _check(caller, found)  # to narrow what is above one is to take it away
        await state.put_identity(read, replaces=found)
        return JSONResponse(role_body(read))

    @router.delete("/{role}", summary="Remove a role that nobody has")
    async def remove_role(
        role: str, request: Request, scope: str | None = Query(None, max_length=64)
    ) -> Response:
        found = _found(caller_of(request), role, scope, Verb.DELETE)
        await state.remove_identity(found)
        return JSONResponse(role_body(found))

    return router


def _built_in(name: str) -> dict[str, object]:
    return role_body(CustomRole("*", name, BUILT_IN[name]), built_in=True)


def _found(caller: Caller, name: str, scope: str | None, verb: Verb) -> CustomRole:
    where = scope or caller.tenant
    missing = NotFound(f"role {name[:80]!r} does not exist in {where[:80]!r}")
    if name in BUILT_IN:
        raise Conflict(f"role {name!r} is built in; make one of another name")
    found = caller.directory.role(name, where)
    if found is None:
        raise missing
    caller.demand_seen(verb, Resource.ROLES, found.name, found.scope, missing)
    return found


def _check(caller: Caller, role: CustomRole) -> None:
    """Raise Conflict for a built-in name, PermissionDenied for more than the caller has."""
    if role.name in BUILT_IN:
        raise Conflict(f"role {role.name!r} is built in; choose another name")
    powers = spell_out(role.rules, role.scope, caller.key.principal)
    caller.demand_covers_powers(powers, role.name, role.scope)
