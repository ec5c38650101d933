"""``/api/v1/audit``: the log, for those who may read it."""

from __future__ import annotations

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cloudlm.control.api.caller import caller_of
from cloudlm.control.api.services import Services
from cloudlm.core.access import EVERYWHERE, Resource, Verb
from cloudlm.security.audit import record_body

MAX_RECORDS = 1000


def routes(services: Services) -> APIRouter:
    """The routes of this noun."""
    router = APIRouter(prefix="/audit", tags=["audit"])

    @router.get("", summary="Read the audit log")
    async def list_audit(
        request: Request,
        after: int = Query(0, ge=0),
        limit: int = Query(100, ge=1, le=MAX_RECORDS),
        tenant: str | None = Query(None, max_length=64),
    ) -> Response:
        """Whoever may read the whole installation's log sees all of it, others their tenant's."""
        caller = caller_of(request)
        everywhere = caller.may(Verb.READ, Resource.AUDIT, "", EVERYWHERE)
        wanted = tenant if everywhere else tenant or caller.tenant
        if wanted is not None:
            caller.demand(Verb.READ, Resource.AUDIT, "", wanted)
        records = await services.state.list_audit(after=after, limit=limit, tenant=wanted)
        return JSONResponse({"data": [dict(record_body(one)) for one in records]})

    return router
