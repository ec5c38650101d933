"""``/api/v1/keys``: a new key's text is in the answer that makes it and nowhere else."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cloudlm.control.api.schemas import KEY
from cloudlm.control.api.services import Services, body_of, read_object
from cloudlm.core.errors import Conflict, NotFound
from cloudlm.core.tenant import Role
from cloudlm.core.wire import key_body, key_request_from_body
from cloudlm.security.keys import mint


def routes(services: Services) -> APIRouter:
    """The routes of this noun."""
    router = APIRouter(prefix="/keys", tags=["keys"])
    revoking = asyncio.Lock()  # two at once must not take each other for the one that stays

    @router.get("", summary="List keys")
    async def list_keys() -> Response:
        records = await services.state.list_keys()
        return JSONResponse({"data": [key_body(record) for record in records]})

    @router.post("", status_code=201, summary="Make a key", openapi_extra=body_of(KEY))
    async def create_key(request: Request) -> Response:
        name, role = key_request_from_body(await read_object(request))
        minted = mint(name, role, services.pepper, services.clock.now())
        await services.state.put_key(minted.record)
        return JSONResponse(
            {"key": minted.text, "record": key_body(minted.record)},
            status_code=201,
            headers={"cache-control": "no-store"},
        )

    @router.delete("/{key_id}", summary="Revoke a key")
    async def revoke_key(key_id: str) -> Response:
        async with revoking:
            admins = {
                record.id
                for record in await services.state.list_keys()
                if record.role is Role.ADMIN and record.revoked_at is None
            }
            if admins == {key_id}:
                raise Conflict(
                    "this is the last admin key: without it nobody could make another. Make one "
                    "first, then revoke this"
                )
            record = await services.state.revoke_key(key_id, now=services.clock.now())
        if record is None:
            raise NotFound(f"key {key_id[:80]!r} does not exist")
        return JSONResponse(key_body(record))

    return router
