"""``/api/v1/keys``: a new key's text is in the answer that makes it and nowhere else."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cloudlm.control.api.caller import Caller, caller_of, key_scope, note_made
from cloudlm.control.api.schemas import KEY, KEY_CHANGE, ROTATION
from cloudlm.control.api.services import Services, body_of, read_object
from cloudlm.core.access import EVERYWHERE, ROOT, Principal, Resource, Verb
from cloudlm.core.errors import Conflict, InvalidRequest, NotFound
from cloudlm.core.tenant import KeyRecord, Role
from cloudlm.core.wire_access import (
    KeyRequest,
    key_body,
    key_change_from_body,
    key_request_from_body,
    rotation_from_body,
)
from cloudlm.security.access import Directory
from cloudlm.security.keys import MintedKey, mint, successor
from cloudlm.security.scopes import demand_scope, paying_project


def routes(services: Services) -> APIRouter:
    """The routes of this noun."""
    router = APIRouter(prefix="/keys", tags=["keys"])
    state, clock = services.state, services.clock
    revoking = asyncio.Lock()  # two at once must not take each other for the one that stays

    @router.get("", summary="List keys")
    async def list_keys(
        request: Request, tenant: str | None = Query(None, max_length=64)
    ) -> Response:
        caller = caller_of(request)
        used = await state.last_uses()
        seen = [
            key_body(replace(one, last_used_at=used.get(one.id)))
            for one in caller.directory.keys
            if tenant in (None, one.tenant) and _may(caller, Verb.READ, one)
        ]
        return JSONResponse({"data": seen})

    @router.post("", status_code=201, summary="Make a key", openapi_extra=body_of(KEY))
    async def create_key(request: Request) -> Response:
        caller = caller_of(request)
        wanted = key_request_from_body(await read_object(request))
        minted = _mint(services, caller, wanted)
        await state.put_key(minted.record)
        note_made(request, minted.record.id)
        return _shown_once(minted)

    @router.get("/{key_id}", summary="Show a key")
    async def show_key(key_id: str, request: Request) -> Response:
        found = _found(caller_of(request), key_id, Verb.READ)
        used = await state.last_uses()
        return JSONResponse(key_body(replace(found, last_used_at=used.get(found.id))))

    @router.patch("/{key_id}", summary="Change a key", openapi_extra=body_of(KEY_CHANGE))
    async def change_key(key_id: str, request: Request) -> Response:
        caller = caller_of(request)
        found = _living(caller, key_id, Verb.UPDATE)
        changes = key_change_from_body(await read_object(request))
        if "expires_in_s" in changes:
            expires_in_s = changes.pop("expires_in_s")
            changes["expires_at"] = None if expires_in_s is None else clock.now() + expires_in_s
        wanted = replace(found, **changes)
        _demand_covers(caller, wanted)
        if wanted.expires_at is not None:
            _demand_another_owner(caller.directory, found)
        await state.change_key(wanted, replaces=found)
        return JSONResponse(key_body(wanted))

    @router.post(
        "/{key_id}/rotate", status_code=201, summary="Replace", openapi_extra=body_of(ROTATION)
    )
    async def rotate_key(key_id: str, request: Request) -> Response:
        caller = caller_of(request)
        found = _living(caller, key_id, Verb.UPDATE)
        _demand_covers(caller, found)
        overlap_s = rotation_from_body(await read_object(request))
        now = clock.now()
        until = (
            now + overlap_s if found.expires_at is None else min(now + overlap_s, found.expires_at)
        )
        minted = successor(found, services.pepper, now)
        retired = replace(found, expires_at=until) if overlap_s else replace(found, revoked_at=now)
        await state.change_key(retired, replaces=found, successor=minted.record)
        note_made(request, minted.record.id)
        return _shown_once(minted, replaced=key_body(retired))

    @router.delete("/{key_id}", summary="Revoke a key")
    async def revoke_key(
        key_id: str, request: Request, descendants: bool = Query(False)
    ) -> Response:
        async with revoking:
            caller = caller_of(request)
            found = _found(caller, key_id, Verb.DELETE)
            _demand_covers(caller, found)
            directory = await services.callers.directory()
            _demand_another_owner(directory, found)
            record = await state.revoke_key(key_id, now=clock.now())
            if descendants:
                for one in _descendants(directory.keys, key_id):
                    await state.revoke_key(one, now=clock.now())
        if record is None:
            raise _missing(key_id)
        return JSONResponse(key_body(record))

    return router


def _mint(services: Services, caller: Caller, wanted: KeyRequest) -> MintedKey:
    """A new key within what the caller and the principal have. Raises PermissionDenied, NotFound,
    InvalidRequest."""
    holder = _holder(caller, wanted.principal or caller.key.principal)
    own = caller.key.scope if caller.key.scope != EVERYWHERE else holder.tenant
    scope = wanted.scope or own
    project = paying_project(caller.directory, holder, scope, wanted.project)
    if not caller.directory.role_exists(wanted.role, scope):
        raise InvalidRequest(
            f"there is no role {wanted.role!r} within {scope!r}; 'cloudlm roles list' shows those "
            "there are",
            param="role",
        )
    now = services.clock.now()
    minted = mint(
        wanted.name,
        wanted.role,
        services.pepper,
        now,
        tenant=holder.tenant,
        project=project,
        principal=holder.id,
        scope=scope,
        models=wanted.models,
        limits=wanted.limits,
        expires_at=None if wanted.expires_in_s is None else now + wanted.expires_in_s,
        made_with=caller.key.id,
    )
    caller.demand(Verb.CREATE, Resource.KEYS, holder.id, key_scope(minted.record))
    _demand_covers(caller, minted.record)
    demand_scope(caller.directory, scope)  # last: to others it would tell which tenants there are
    return minted


def _holder(caller: Caller, principal_id: str) -> Principal:
    """The principal that a new key is to speak for: the caller's own, or one that it sees."""
    found = caller.directory.principal(principal_id)
    own = principal_id == caller.key.principal
    if found is None or not (
        own or caller.may(Verb.READ, Resource.PRINCIPALS, found.id, found.scope)
    ):
        raise NotFound(f"principal {principal_id[:80]!r} does not exist")
    return found


def _may(caller: Caller, verb: Verb, record: KeyRecord) -> bool:
    return caller.may(verb, Resource.KEYS, record.principal, key_scope(record))


def _found(caller: Caller, key_id: str, verb: Verb) -> KeyRecord:
    found = caller.directory.key(key_id)
    if found is None:
        raise _missing(key_id)
    caller.demand_seen(verb, Resource.KEYS, found.principal, key_scope(found), _missing(key_id))
    return found


def _living(caller: Caller, key_id: str, verb: Verb) -> KeyRecord:
    found = _found(caller, key_id, verb)
    if found.revoked_at is not None:
        raise Conflict(f"key {key_id[:80]!r} is revoked; make a new one")
    return found


def _missing(key_id: str) -> NotFound:
    return NotFound(f"key {key_id[:80]!r} does not exist")


def _demand_covers(caller: Caller, record: KeyRecord) -> None:
    caller.demand_covers(record.role, record.scope, record.principal, record.models)


def _demand_another_owner(directory: Directory, leaving: KeyRecord) -> None:
    """Raise Conflict if, without this key, nobody could make another owner."""
    lasting = {
        one.id
        for one in directory.keys
        if one.role == Role.OWNER
        and one.scope == EVERYWHERE
        and one.principal == ROOT
        and one.expires_at is None
        and one.revoked_at is None
    }
    if lasting == {leaving.id}:
        raise Conflict(
            "this is the last owner key that does not expire: without it nobody could make "
            "another. Make one first ('cloudlm keys create --role owner --scope \"*\"'), then "
            "revoke this"
        )


def _descendants(keys: tuple[KeyRecord, ...], key_id: str) -> list[str]:
    """The keys that this one made, and those that they made."""
    found = [key_id]
    for parent in found:
        found.extend(one.id for one in keys if one.made_with == parent and one.id not in found)
    return found[1:]


def _shown_once(minted: MintedKey, **more: Any) -> Response:
    body: dict[str, Any] = {"key": minted.text, "record": key_body(minted.record), **more}
    return JSONResponse(body, status_code=201, headers={"cache-control": "no-store"})
