"""Joins the nouns of the control API into one application."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from cloudlm import __version__
from cloudlm.control.api import (
    audit,
    deployments,
    jobs,
    keys,
    models,
    principals,
    roles,
    rollouts,
    tenants,
    usage,
)
from cloudlm.control.api.caller import caller_of
from cloudlm.control.api.edge import Edge, error_response, handle_error
from cloudlm.control.api.services import Services
from cloudlm.core.errors import (
    CloudlmError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    Unavailable,
    UnprocessableRequest,
)
from cloudlm.core.lease import Leader, leader_body
from cloudlm.core.wire import driver_body
from cloudlm.core.wire_access import key_body, principal_body
from cloudlm.security.matrix import PREFIX


def build_app(services: Services) -> FastAPI:
    """The routes without their edge (tests walk them)."""
    app = FastAPI(
        title="cloudlm control API",
        version=__version__,
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,  # its page would load code from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_exception_handler(CloudlmError, handle_error)
    app.add_exception_handler(HTTPException, _framework_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, handle_error)
    for noun in (
        models,
        deployments,
        rollouts,
        tenants,
        principals,
        roles,
        keys,
        usage,
        jobs,
        audit,
    ):
        app.include_router(noun.routes(services), prefix=PREFIX)
    app.include_router(_driver_routes(services), prefix=PREFIX)
    app.include_router(_own_routes(services), prefix=PREFIX)
    app.include_router(_health_routes(services))
    return app


def build_api(services: Services) -> ASGIApp:
    """The whole API, ready to be served."""
    return Edge(build_app(services), services.callers, services.auditor, services.guard)


def _driver_routes(services: Services) -> APIRouter:
    router = APIRouter(tags=["drivers"])

    @router.get("/drivers", summary="List installed drivers")
    async def list_drivers() -> Response:
        entries = await asyncio.to_thread(services.drivers.entries)  # imports plug-ins
        return JSONResponse({"data": [driver_body(one) for one in entries]})

    return router


def _own_routes(services: Services) -> APIRouter:
    router = APIRouter(tags=["keys"])
    oidc = services.oidc

    @router.get("/signin", summary="Where people sign in")
    async def signin() -> Response:
        if not oidc.issuer:
            raise NotFound("nobody signs in here: no issuer is set (oidc.issuer); use an API key")
        return JSONResponse(
            {"issuer": oidc.issuer, "client_id": oidc.client_id, "scopes": oidc.scopes}
        )

    @router.get("/whoami", summary="Who the key speaks for")
    async def whoami(request: Request) -> Response:
        caller = caller_of(request)
        principal = caller.directory.principal(caller.key.principal)
        assert principal is not None  # a key without its principal is refused
        return JSONResponse({"key": key_body(caller.key), "principal": principal_body(principal)})

    @router.get("/leader", summary="Which control leads", tags=["leader"])
    async def leader() -> Response:
        leadership = services.leadership
        lease = None if leadership is None else leadership.leader
        if leadership is None or lease is None:
            raise Unavailable("this control has not seen yet who leads", retry_after_s=1.0)
        here = leadership.term is not None
        return JSONResponse(leader_body(Leader(lease.holder, lease.token, here)))

    return router


def _health_routes(services: Services) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/livez")
    async def livez() -> Response:
        return PlainTextResponse("ok")

    @router.get("/readyz")
    async def readyz() -> Response:
        await services.state.version()  # raises Unavailable if the facts cannot be reached
        if not services.reconciler.has_looked:
            raise Unavailable("control has not looked at everything yet", retry_after_s=1.0)
        return PlainTextResponse("ok")

    @router.get("/metrics")
    async def metrics() -> Response:
        text = services.metrics.exposition()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


async def _framework_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    verdict: CloudlmError
    if error.status_code == 404:
        verdict = NotFound(f"there is nothing at {path}; see {PREFIX}/openapi.json")
    elif error.status_code == 405:
        verdict = MethodNotAllowed(f"{path} does not answer {request.method[:20]}")
    else:
        verdict = InvalidRequest(str(error.detail)[:500])
    answer = error_response(verdict)
    for name, value in (error.headers or {}).items():
        answer.headers[name] = value
    return answer


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = dict(error.errors()[0]) if error.errors() else {}
    param = ".".join(str(part) for part in first.get("loc", ())[1:])
    return error_response(
        UnprocessableRequest(f"{param}: {first.get('msg', 'not valid')}", param=param or None)
    )
