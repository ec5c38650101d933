"""``/api/v1/deployments``: what is asked to run. Answers at once; the loop does the rest."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cloudlm.control.api.caller import caller_of
from cloudlm.control.api.logs import log_lines
from cloudlm.control.api.schemas import SCALE, SPEC
from cloudlm.control.api.services import Services, body_of, read_object
from cloudlm.control.external import check_secrets
from cloudlm.core.access import DEFAULT_TENANT, Resource, Verb
from cloudlm.core.deployment import Deployment, DeploymentSpec
from cloudlm.core.errors import Conflict, InvalidRequest, NotFound
from cloudlm.core.external import EXTERNAL
from cloudlm.core.model import ADAPTER, AddressKind, address_kind, check_name, parse_ref
from cloudlm.core.spec import ENGINES, check_spec
from cloudlm.core.wire import deployment_body, scale_from_body, spec_from_body

MAX_LOG_LINES = 10_000


def routes(services: Services) -> APIRouter:
    """The routes of this noun."""
    router = APIRouter(prefix="/deployments", tags=["deployments"])
    state = services.state

    async def answer(deployment: Deployment, status_code: int = 200) -> Response:
        status = await state.get_status(deployment.spec.name)
        return JSONResponse(
            deployment_body(deployment, status),
            status_code=status_code,
            headers={"etag": f'"{deployment.generation}"'},
        )

    async def found(
        request: Request, name: str, verb: Verb, resource: Resource = Resource.DEPLOYMENTS
    ) -> Deployment:
        return await deployment_of(services, request, name, verb, resource)

    async def wanted(request: Request, name: str | None, verb: Verb) -> DeploymentSpec:
        """The spec in the body, if the caller may put it where it says, and over what is there."""
        caller = caller_of(request)
        spec = spec_from_body(await read_object(request), name=name)
        if spec.tenant and caller.directory.tenant(spec.tenant) is None:
            raise InvalidRequest(f"there is no tenant {spec.tenant!r}", param="tenant")
        caller.demand(verb, Resource.DEPLOYMENTS, spec.name, _scope(spec))
        before = await state.get_deployment(spec.name)
        if before is not None and _scope(before.spec) != _scope(spec):
            scope = _scope(before.spec)
            taken = Conflict(f"the name {spec.name!r} is taken")
            if not caller.may(Verb.READ, Resource.DEPLOYMENTS, spec.name, scope):
                raise taken
            caller.demand(verb, Resource.DEPLOYMENTS, spec.name, scope)
        return spec

    async def put(request: Request, spec: DeploymentSpec, expected: int | None) -> Response:
        await check_can_run(services, spec)
        deployment = await state.put_deployment(
            spec,
            now=services.clock.now(),
            expected_generation=expected,
            by=caller_of(request).key.principal,
        )
        services.reconciler.nudge()
        return await answer(deployment, 202)

    @router.get("", summary="List deployments")
    async def list_deployments(request: Request) -> Response:
        caller = caller_of(request)
        statuses = {status.name: status for status in await state.list_statuses()}
        deployments = await state.list_deployments()
        data = [
            deployment_body(one, statuses.get(one.spec.name))
            for one in deployments
            if caller.may(Verb.READ, Resource.DEPLOYMENTS, one.spec.name, _scope(one.spec))
        ]
        size_bytes = 0 if services.memory is None else services.memory.size_bytes
        return JSONResponse({"data": data, "memory_budget_bytes": size_bytes or None})

    @router.post("", status_code=202, summary="Create", openapi_extra=body_of(SPEC))
    async def create(request: Request) -> Response:
        return await put(request, await wanted(request, None, Verb.CREATE), 0)

    @router.get("/{name}", summary="Show a deployment")
    async def show(name: str, request: Request) -> Response:
        return await answer(await found(request, name, Verb.READ))

    @router.put(
        "/{name}", status_code=202, summary="Create or replace", openapi_extra=body_of(SPEC)
    )
    async def replace_all(name: str, request: Request) -> Response:
        expected = _generation(request.headers.get("if-match"))
        return await put(request, await wanted(request, name, Verb.UPDATE), expected)

    @router.delete("/{name}", status_code=202, summary="Stop and remove")
    async def delete(name: str, request: Request) -> Response:
        expected = _generation(request.headers.get("if-match"))
        deployment = await found(request, name, Verb.DELETE)
        if expected is not None and deployment.generation != expected:
            raise Conflict(
                f"deployment {name!r} is at generation {deployment.generation}, not {expected}"
            )
        marked = await state.mark_deleting(name, now=services.clock.now())
        services.reconciler.nudge()
        return await answer(marked or deployment, 202)

    @router.post("/{name}/scale", status_code=202, openapi_extra=body_of(SCALE))
    async def scale(name: str, request: Request) -> Response:
        deployment = await found(request, name, Verb.UPDATE)
        low, high = scale_from_body(await read_object(request))
        if deployment.deleting:
            raise Conflict(f"deployment {name!r} is being deleted; it cannot be scaled")
        spec = replace(deployment.spec, min_replicas=low, max_replicas=high)
        return await put(request, spec, deployment.generation)

    async def turn(request: Request, name: str, asleep: bool) -> Response:
        deployment = await found(request, name, Verb.UPDATE)
        if deployment.deleting:
            raise Conflict(f"deployment {name!r} is being deleted")
        return await put(request, replace(deployment.spec, asleep=asleep), deployment.generation)

    @router.post("/{name}/sleep", status_code=202, summary="Give the replicas' memory back")
    async def sleep(name: str, request: Request) -> Response:
        return await turn(request, name, True)

    @router.post("/{name}/wake", status_code=202, summary="Load the model again")
    async def wake(name: str, request: Request) -> Response:
        return await turn(request, name, False)

    @router.get("/{name}/logs", summary="Output of the replicas")
    async def logs(
        name: str,
        request: Request,
        tail: int = Query(100, ge=0, le=MAX_LOG_LINES),
        follow: bool = Query(False),
        replica: str | None = Query(None, max_length=128),
    ) -> Response:
        deployment = await found(request, name, Verb.READ, Resource.LOGS)
        own = services.drivers.get(deployment.spec.driver)
        others = [one for one in services.drivers.in_use().values() if one is not own]
        lines = await log_lines([own, *others], name, replica=replica, tail=tail, follow=follow)
        return StreamingResponse(lines, media_type="text/plain; charset=utf-8")

    return router


async def deployment_of(
    services: Services,
    request: Request,
    name: str,
    verb: Verb,
    resource: Resource = Resource.DEPLOYMENTS,
) -> Deployment:
    """The deployment in the path, if the caller may do that with it. Raises NotFound,
    PermissionDenied."""
    missing = NotFound(f"deployment {name[:80]!r} does not exist")
    deployment = await services.state.get_deployment(check_name(name))
    caller = caller_of(request)
    scope = _scope(deployment.spec) if deployment is not None else DEFAULT_TENANT
    caller.demand_seen(verb, resource, name, scope, missing)
    if deployment is None:
        raise missing
    return deployment


def _scope(spec: DeploymentSpec) -> str:
    """Where a deployment is guarded: in its tenant, or with the installation."""
    return spec.tenant or DEFAULT_TENANT


async def check_can_run(services: Services, spec: DeploymentSpec) -> None:
    """Raise InvalidRequest or ModelNotFound for what would only fail later."""
    if spec.driver == EXTERNAL:
        if check_spec(spec) != spec:
            raise InvalidRequest(
                f"{spec.name!r} has a replica for each of its endpoints, {len(spec.endpoints)}: "
                "change its endpoints instead",
                param="min_replicas",
            )
        services.drivers.get(spec.driver)
        await asyncio.to_thread(check_secrets, spec, services.credentials)
        await _check_names(services, spec)
        return
    if address_kind(spec.model) is not AddressKind.REGISTRY:
        raise InvalidRequest(
            f"model {spec.model!r} is not in the registry: import it first (POST /api/v1/models "
            "or 'cloudlm models import'), then deploy models:/name/version",
            param="model",
        )
    if spec.engine not in ENGINES:
        raise InvalidRequest(
            f"unknown engine {spec.engine!r}; there is: {', '.join(ENGINES)}", param="engine"
        )
    services.drivers.get(spec.driver)
    base = await asyncio.to_thread(services.registry.resolve, parse_ref(spec.model))
    if base.task == ADAPTER:
        raise InvalidRequest(
            f"{base.ref} is a LoRA adapter and cannot be deployed alone: deploy the model that it "
            f"was made for ({base.lineage.get('base') or 'unknown'}) with it under 'adapters'",
            param="model",
        )
    for name, address in spec.adapters.items():
        adapter = await asyncio.to_thread(services.registry.resolve, parse_ref(address))
        if adapter.task != ADAPTER:
            raise InvalidRequest(
                f"adapter {name!r}: {adapter.ref} is a model, not a LoRA adapter", param="adapters"
            )
    await _check_names(services, spec)
    if services.memory is not None:
        others = await services.state.list_deployments()
        await services.memory.check(spec, others, services.drivers)


async def _check_names(services: Services, spec: DeploymentSpec) -> None:
    """Raise Conflict if a name that clients would use means something else already."""
    wanted = {spec.name, *spec.adapters}
    for other in await services.state.list_deployments():
        taken = {other.spec.name, *other.spec.adapters} & wanted
        if other.spec.name != spec.name and taken:
            same = other.spec.tenant in ("", spec.tenant)
            whose = f" by the deployment {other.spec.name!r}, as its own or an adapter's"
            raise Conflict(f"the name {sorted(taken)[0]!r} is taken{whose if same else ''}")


def _generation(if_match: str | None) -> int | None:
    """The generation in ``If-Match``: a number, quoted or not; ``*`` and none are any."""
    if if_match is None or if_match.strip() == "*":
        return None
    text = if_match.strip().removeprefix("W/").strip('"')
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidRequest(
            f"If-Match must be a generation such as 3, not {if_match[:40]!r}", param="If-Match"
        )
    return int(text)
