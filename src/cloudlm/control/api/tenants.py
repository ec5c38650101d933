"""``/api/v1/tenants`` and ``/api/v1/projects``."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cloudlm.control.api.caller import Caller, caller_of, note_made
from cloudlm.control.api.schemas import PROJECT, PROJECT_CHANGE, TENANT, TENANT_CHANGE
from cloudlm.control.api.services import Services, body_of, read_object
from cloudlm.core.access import DEFAULT_PROJECT, DEFAULT_TENANT, Project, Resource, Tenant, Verb
from cloudlm.core.errors import Conflict, NotFound
from cloudlm.core.wire_access import (
    change_from_body,
    project_body,
    project_from_body,
    tenant_body,
    tenant_from_body,
)

_TENANT_FIELDS = frozenset(("title", "limits", "disabled"))
_PROJECT_FIELDS = frozenset(("title", "limits"))


def routes(services: Services) -> APIRouter:
    """The routes of both nouns."""
    router = APIRouter()
    router.include_router(_tenants(services), prefix="/tenants", tags=["tenants"])
    router.include_router(_projects(services), prefix="/projects", tags=["projects"])
    return router


def _tenants(services: Services) -> APIRouter:
    router = APIRouter()
    state, clock = services.state, services.clock

    @router.get("", summary="List tenants")
    async def list_tenants(request: Request) -> Response:
        caller = caller_of(request)
        seen = [
            tenant_body(one)
            for one in caller.directory.identities.tenants
            if caller.may(Verb.READ, Resource.TENANTS, one.name, one.name)
        ]
        return JSONResponse({"data": seen})

    @router.post("", status_code=201, summary="Make a tenant", openapi_extra=body_of(TENANT))
    async def create_tenant(request: Request) -> Response:
        caller = caller_of(request)
        made = tenant_from_body(await read_object(request), clock.now())
        caller.demand(Verb.CREATE, Resource.TENANTS, made.name, made.name)
        await state.put_identity(made)
        note_made(request, made.name)
        # Principals and keys always belong to a project; a tenant is usable at once.
        await state.put_identity(Project(made.name, DEFAULT_PROJECT, created_at=clock.now()))
        return JSONResponse(tenant_body(made), status_code=201)

    @router.get("/{tenant}", summary="Show a tenant")
    async def show_tenant(tenant: str, request: Request) -> Response:
        return JSONResponse(tenant_body(_tenant(caller_of(request), tenant, Verb.READ)))

    @router.patch("/{tenant}", summary="Change a tenant", openapi_extra=body_of(TENANT_CHANGE))
    async def change_tenant(tenant: str, request: Request) -> Response:
        found = _tenant(caller_of(request), tenant, Verb.UPDATE)
        body = await read_object(request)
        changes = change_from_body(body, "tenant", names=_TENANT_FIELDS)
        disabled = changes.pop("disabled", found.disabled_at is not None)
        if disabled and tenant == DEFAULT_TENANT:
            raise Conflict("the default tenant is the installation's own; it cannot be disabled")
        stopped = (found.disabled_at or clock.now()) if disabled else None
        wanted = replace(found, **changes, disabled_at=stopped)
        await state.put_identity(wanted, replaces=found)
        return JSONResponse(tenant_body(wanted))

    @router.delete("/{tenant}", summary="Remove an empty tenant")
    async def remove_tenant(tenant: str, request: Request) -> Response:
        caller = caller_of(request)
        found = _tenant(caller, tenant, Verb.DELETE)
        if tenant == DEFAULT_TENANT:
            raise Conflict("the default tenant is the installation's own; it cannot be removed")
        for one in await state.list_deployments():
            if one.spec.tenant == tenant:
                raise Conflict(
                    f"tenant {tenant!r} is still needed by deployment {one.spec.name!r}: remove "
                    "that first"
                )
        own = caller.directory.project(tenant, DEFAULT_PROJECT)
        projects = [one for one in caller.directory.identities.projects if one.tenant == tenant]
        if own is not None and projects == [own]:
            await state.remove_identity(own)
        await state.remove_identity(found)
        return JSONResponse(tenant_body(found))

    return router


def _projects(services: Services) -> APIRouter:
    router = APIRouter()
    state = services.state

    @router.get("", summary="List projects")
    async def list_projects(
        request: Request, tenant: str | None = Query(None, max_length=64)
    ) -> Response:
        caller = caller_of(request)
        seen = [
            project_body(one)
            for one in caller.directory.identities.projects
            if tenant in (None, one.tenant)
            and caller.may(Verb.READ, Resource.PROJECTS, one.name, one.scope)
        ]
        return JSONResponse({"data": seen})

    @router.post("", status_code=201, summary="Make a project", openapi_extra=body_of(PROJECT))
    async def create_project(request: Request) -> Response:
        caller = caller_of(request)
        made = project_from_body(await read_object(request), caller.tenant, services.clock.now())
        caller.demand(Verb.CREATE, Resource.PROJECTS, made.name, made.scope)
        await state.put_identity(made)
        return JSONResponse(project_body(made), status_code=201)

    @router.get("/{project}", summary="Show a project")
    async def show_project(
        project: str, request: Request, tenant: str | None = Query(None, max_length=64)
    ) -> Response:
        return JSONResponse(project_body(_project(caller_of(request), tenant, project, Verb.READ)))

    @router.patch("/{project}", summary="Change a project", openapi_extra=body_of(PROJECT_CHANGE))
    async def change_project(
        project: str, request: Request, tenant: str | None = Query(None, max_length=64)
    ) -> Response:
        found = _project(caller_of(request), tenant, project, Verb.UPDATE)
        body = await read_object(request)
        wanted = replace(found, **change_from_body(body, "project", names=_PROJECT_FIELDS))
        await state.put_identity(wanted, replaces=found)
        return JSONResponse(project_body(wanted))

    @router.delete("/{project}", summary="Remove an empty project")
    async def remove_project(
        project: str, request: Request, tenant: str | None = Query(None, max_length=64)
    ) -> Response:
        found = _project(caller_of(request), tenant, project, Verb.DELETE)
        if project == DEFAULT_PROJECT:
            raise Conflict("a tenant's default project goes with its tenant; remove that")
        await state.remove_identity(found)
        return JSONResponse(project_body(found))

    return router


def _tenant(caller: Caller, name: str, verb: Verb) -> Tenant:
    missing = NotFound(f"tenant {name[:80]!r} does not exist")
    found = caller.directory.tenant(name)
    if found is None:
        raise missing
    caller.demand_seen(verb, Resource.TENANTS, found.name, found.name, missing)
    return found


def _project(caller: Caller, tenant: str | None, name: str, verb: Verb) -> Project:
    where = tenant or caller.tenant
    missing = NotFound(f"project {name[:80]!r} of tenant {where[:80]!r} does not exist")
    found = caller.directory.project(where, name)
    if found is None:
        raise missing
    caller.demand_seen(verb, Resource.PROJECTS, found.name, found.scope, missing)
    return found
