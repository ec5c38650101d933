"""``/api/v1/deployments``: what is asked to run. Answers at once; the loop does the rest."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cloudlm.control.api.logs import log_lines
from cloudlm.control.api.schemas import SCALE, SPEC
from cloudlm.control.api.services import Services, body_of, read_object
from cloudlm.core.deployment import Deployment, DeploymentSpec
from cloudlm.core.errors import Conflict, InvalidRequest, NotFound
from cloudlm.core.model import ADAPTER, AddressKind, address_kind, check_name, parse_ref
from cloudlm.core.spec import ENGINES
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

    async def found(name: str) -> Deployment:
        deployment = await state.get_deployment(check_name(name))
        if deployment is None:
            raise NotFound(f"deployment {name!r} does not exist")
        return deployment

    async def put(spec: DeploymentSpec, expected: int | None) -> Response:
        await _check_can_run(services, spec)
        deployment = await state.put_deployment(
            spec, now=services.clock.now(), expected_generation=expected
        )
        services.reconciler.nudge()
        return await answer(deployment, 202)

    @router.get("", summary="List deployments")
    async def list_deployments() -> Response:
        statuses = {status.name: status for status in await state.list_statuses()}
        deployments = await state.list_deployments()
        data = [deployment_body(one, statuses.get(one.spec.name)) for one in deployments]
        return JSONResponse({"data": data})

    @router.post("", status_code=202, summary="Create", openapi_extra=body_of(SPEC))
    async def create(request: Request) -> Response:
        return await put(spec_from_body(await read_object(request)), 0)

    @router.get("/{name}", summary="Show a deployment")
    async def show(name: str) -> Response:
        return await answer(await found(name))

    @router.put(
        "/{name}", status_code=202, summary="Create or replace", openapi_extra=body_of(SPEC)
    )
    async def replace_all(name: str, request: Request) -> Response:
        expected = _generation(request.headers.get("if-match"))
        return await put(spec_from_body(await read_object(request), name=name), expected)

    @router.delete("/{name}", status_code=202, summary="Stop and remove")
    async def delete(name: str, request: Request) -> Response:
        expected = _generation(request.headers.get("if-match"))
        deployment = await found(name)
        if expected is not None and deployment.generation != expected:
            raise Conflict(
                f"deployment {name!r} is at generation {deployment.generation}, not {expected}"
            )
        marked = await state.mark_deleting(name, now=services.clock.now())
        services.reconciler.nudge()
        return await answer(marked or deployment, 202)

    @router.post("/{name}/scale", status_code=202, openapi_extra=body_of(SCALE))
    async def scale(name: str, request: Request) -> Response:
        low, high = scale_from_body(await read_object(request))
        deployment = await found(name)
        if deployment.deleting:
            raise Conflict(f"deployment {name!r} is being deleted; it cannot be scaled")
        spec = replace(deployment.spec, min_replicas=low, max_replicas=high)
        return await put(spec, deployment.generation)

    async def turn(name: str, asleep: bool) -> Response:
        deployment = await found(name)
        if deployment.deleting:
            raise Conflict(f"deployment {name!r} is being deleted")
        return await put(replace(deployment.spec, asleep=asleep), deployment.generation)

    @router.post("/{name}/sleep", status_code=202, summary="Give the replicas' memory back")
    async def sleep(name: str) -> Response:
        return await turn(name, True)

    @router.post("/{name}/wake", status_code=202, summary="Load the model again")
    async def wake(name: str) -> Response:
        return await turn(name, False)

    @router.get("/{name}/logs", summary="Output of the replicas")
    async def logs(
        name: str,
        tail: int = Query(100, ge=0, le=MAX_LOG_LINES),
        follow: bool = Query(False),
        replica: str | None = Query(None, max_length=128),
    ) -> Response:
        deployment = await found(name)
        driver = services.drivers.get(deployment.spec.driver)
        lines = await log_lines(driver, name, replica=replica, tail=tail, follow=follow)
        return StreamingResponse(lines, media_type="text/plain; charset=utf-8")

    return router


async def _check_can_run(services: Services, spec: DeploymentSpec) -> None:
    """Raise InvalidRequest or ModelNotFound for what would only fail later."""
    if address_kind(spec.model) is not AddressKind.REGISTRY:
        raise InvalidRequest(
            f"model {spec.model!r} is not in the registry: import it first (POST /api/v1/models "
            "or 'cloudlm models import'), then deploy models:/name/version",
            param="model",
        )
    if spec.min_replicas == 0:
        raise InvalidRequest(
            "min_replicas must be at least 1: scaling to zero is not available yet",
            param="min_replicas",
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


async def _check_names(services: Services, spec: DeploymentSpec) -> None:
    """Raise Conflict if a name that clients would use means something else already."""
    wanted = {spec.name, *spec.adapters}
    for other in await services.state.list_deployments():
        taken = {other.spec.name, *other.spec.adapters} & wanted
        if other.spec.name != spec.name and taken:
            raise Conflict(
                f"the name {sorted(taken)[0]!r} is taken by the deployment {other.spec.name!r}, as "
                "its own or an adapter's"
            )


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
