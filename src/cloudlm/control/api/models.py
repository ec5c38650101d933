"""``/api/v1/models``: versions and aliases of the registry."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cloudlm.control.api.schemas import ALIAS, IMPORT
from cloudlm.control.api.services import Services, body_of, read_object
from cloudlm.core.deployment import Deployment
from cloudlm.core.errors import CloudlmError, Conflict
from cloudlm.core.model import Manifest, ModelRef, check_alias, check_name, parse_ref
from cloudlm.core.wire import ModelEntry, alias_from_body, job_body, model_body


def routes(services: Services) -> APIRouter:
    """The routes of this noun."""
    router = APIRouter(prefix="/models", tags=["models"])
    registry = services.registry

    def entry(name: str) -> ModelEntry:
        return ModelEntry(name, tuple(registry.list_versions(name)), registry.list_aliases(name))

    def entries() -> list[ModelEntry]:
        return [entry(name) for name in registry.list_models()]

    @router.get("", summary="List models")
    async def list_models() -> Response:
        found = await asyncio.to_thread(entries)
        return JSONResponse({"data": [model_body(one) for one in found]})

    @router.post("", status_code=202, summary="Import a model", openapi_extra=body_of(IMPORT))
    async def import_model(request: Request) -> Response:
        job = await services.jobs.submit("import", await read_object(request))
        return JSONResponse({"job": job_body(job)}, status_code=202)

    @router.get("/{name}", summary="Show a model")
    async def get_model(name: str) -> Response:
        found = await asyncio.to_thread(entry, check_name(name, "model"))
        return JSONResponse(model_body(found))

    @router.get("/{name}/versions/{version}", summary="Show a version")
    async def get_version(name: str, version: str) -> Response:
        manifest = await asyncio.to_thread(registry.resolve, _ref(name, version))
        return JSONResponse(manifest.body())

    @router.delete("/{name}/versions/{version}", summary="Remove a version that nothing uses")
    async def remove_version(name: str, version: str) -> Response:
        manifest = await asyncio.to_thread(registry.resolve, _ref(name, version))
        await _demand_unused(services, manifest)
        await asyncio.to_thread(registry.remove, parse_ref(manifest.ref))
        return JSONResponse({"removed": manifest.ref})

    @router.put("/{name}/aliases/{alias}", summary="Set an alias", openapi_extra=body_of(ALIAS))
    async def set_alias(name: str, alias: str, request: Request) -> Response:
        version = alias_from_body(await read_object(request))
        check_name(name, "model")
        await asyncio.to_thread(registry.set_alias, name, check_alias(alias), version)
        return JSONResponse(model_body(await asyncio.to_thread(entry, name)))

    @router.delete("/{name}/aliases/{alias}", summary="Remove an alias")
    async def remove_alias(name: str, alias: str) -> Response:
        check_name(name, "model")
        await asyncio.to_thread(registry.remove_alias, name, check_alias(alias))
        return JSONResponse(model_body(await asyncio.to_thread(entry, name)))

    return router


def _ref(name: str, version: str) -> ModelRef:
    return parse_ref(f"models:/{check_name(name, 'model')}/{version}")


async def _demand_unused(services: Services, manifest: Manifest) -> None:
    """Raise Conflict if an alias, a deployment or a running group uses the version."""
    aliases = await asyncio.to_thread(services.registry.list_aliases, manifest.name)
    pointing = sorted(alias for alias, number in aliases.items() if number == manifest.version)
    if pointing:
        raise Conflict(f"{manifest.ref} has the alias {pointing[0]!r}; move or remove it first")
    for deployment in await services.state.list_deployments():
        if await _resolves_to(services, deployment.spec.model, manifest):
            name = deployment.spec.name
            raise Conflict(f"{manifest.ref} is used by deployment {name!r}; delete that first")
    if manifest.ref in services.reconciler.models_in_use():
        raise Conflict(f"{manifest.ref} still runs in a replica; try again when it has stopped")
    for deployment in await services.state.list_deployments():
        await _demand_not_rolled_out(services, deployment, manifest.ref)


async def _demand_not_rolled_out(services: Services, deployment: Deployment, ref: str) -> None:
    """Raise Conflict if a revision that may run, here or under another control, runs the version
    that its addresses meant then."""
    name = deployment.spec.name
    rollout = await services.state.get_rollout(name)
    needed = {deployment.revision, *((rollout.stable, rollout.target) if rollout else ())}
    for one in await services.state.list_revisions(name):
        if one.number in needed and ref in (one.model, *one.adapters.values()):
            raise Conflict(f"{ref} is used by revision {one.number} of deployment {name!r}")


async def _resolves_to(services: Services, model: str, manifest: Manifest) -> bool:
    try:
        found = await asyncio.to_thread(services.registry.resolve, parse_ref(model))
    except CloudlmError:  # a deployment of something that is gone uses nothing
        return False
    return found.ref == manifest.ref
