"""``/api/v1/usage``: what was used and what it cost, out of the ledger, as JSON or CSV.

A caller sees the rows of the tenants and projects whose usage it may read, and no others.
"""

from __future__ import annotations

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cloudlm.control.api.caller import Caller, caller_of
from cloudlm.control.api.services import Services
from cloudlm.core.access import EVERYWHERE, Resource, Verb, scope_of
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.usage import (
    UsageQuery,
    UsageRow,
    check_groups,
    csv_of,
    merged,
    span_of,
    usage_body,
)

_FORMATS = ("json", "csv")


def routes(services: Services) -> APIRouter:
    """The routes of this noun."""
    router = APIRouter(prefix="/usage", tags=["usage"])
    clock = services.clock

    @router.get("", summary="Sums of tokens and costs")
    async def usage(
        request: Request,
        group_by: str = Query("day", max_length=64),
        since: str | None = Query(None, max_length=10),
        until: str | None = Query(None, max_length=10),
        tenant: str | None = Query(None, max_length=64),
        project: str | None = Query(None, max_length=64),
        format: str = Query("json", max_length=8),
    ) -> Response:
        caller = caller_of(request)
        if format not in _FORMATS:
            raise InvalidRequest(f"format must be one of {', '.join(_FORMATS)}", param="format")
        groups = check_groups(filter(None, (part.strip() for part in group_by.split(","))))
        begin, end = span_of(since, until, clock.now())
        found = await _seen(caller, services, UsageQuery(begin, end, groups, tenant, project))
        if format == "csv":
            return Response(csv_of(groups, found), media_type="text/csv; charset=utf-8")
        return JSONResponse({"data": [usage_body(row) for row in found]})

    return router


async def _seen(caller: Caller, services: Services, query: UsageQuery) -> list[UsageRow]:
    """The sums over all that the caller may read."""
    if caller.may(Verb.READ, Resource.USAGE, "", EVERYWHERE):
        return await services.state.usage(query)
    if query.tenant is None:
        query = UsageQuery(query.since, query.until, query.group_by, caller.tenant, query.project)
    assert query.tenant is not None
    if caller.may(Verb.READ, Resource.USAGE, "", query.tenant):
        return await services.state.usage(query)
    names = [
        one.name
        for one in caller.directory.identities.projects
        if one.tenant == query.tenant and query.project in (None, one.name)
    ]
    may = [n for n in names if caller.may(Verb.READ, Resource.USAGE, "", scope_of(query.tenant, n))]
    if not may:
        caller.demand(Verb.READ, Resource.USAGE, "", query.tenant)
    parts = [
        await services.state.usage(
            UsageQuery(query.since, query.until, query.group_by, query.tenant, name)
        )
        for name in may
    ]
    return merged(query.group_by, [row for part in parts for row in part])
