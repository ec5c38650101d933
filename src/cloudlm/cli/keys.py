"""``cloudlm keys``: make, list, change, rotate and revoke API keys.

Through the control API, or with ``--local`` straight in this machine's state: the way back in when
the owner key is lost, for whoever may read the installation's folder.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from typing import Annotated

import typer

from cloudlm.cli.connect import control_client, open_local_state
from cloudlm.cli.keys_text import print_keys, replaced_text
from cloudlm.cli.options import (
    Concurrent,
    Expires,
    Json,
    RequestsPerMinute,
    Spend,
    SpendDay,
    TokensPerMinute,
    limits_of,
    seconds_of,
)
from cloudlm.cli.screen import out, print_json, say
from cloudlm.core.access import EVERYWHERE
from cloudlm.core.audit import AuditEvent, AuditOutcome
from cloudlm.core.errors import NotFound
from cloudlm.core.tenant import KeyRecord, Role
from cloudlm.core.wire_access import (
    KeyRequest,
    key_body,
    key_request_body,
    key_request_from_body,
)

app = typer.Typer(no_args_is_help=True, help="API keys: create, list, change, rotate, revoke.")
Local = Annotated[
    bool, typer.Option("--local", help="Work on this machine's state, without an owner key.")
]
Model = Annotated[
    list[str] | None,
    typer.Option("--model", help="A model that it may use, or a beginning with '*'; repeatable."),
]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="The id, as 'keys list' shows it.")]


@app.command("create")
def create(
    name: Annotated[str, typer.Option("--name", help="What the key is for.")] = "key",
    role: Annotated[
        str, typer.Option("--role", help="What it may do; 'user' is inference only.")
    ] = Role.USER,
    scope: Annotated[
        str, typer.Option("--scope", help="Where: '*', tenant, or tenant/project.")
    ] = "",
    principal: Annotated[
        str, typer.Option("--principal", help="Id of whom it speaks for; you, if not given.")
    ] = "",
    project: Annotated[str, typer.Option("--project", help="What it is accounted to.")] = "",
    model: Model = None,
    expires: Expires = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent_streams: Concurrent = None,
    spend_per_month: Spend = None,
    spend_per_day: SpendDay = None,
    local: Local = False,
    json_output: Json = False,
) -> None:
    """Make a key. It is shown once and stored only as a hash."""
    wanted = KeyRequest(
        name=name,
        role=str(role),
        scope=scope,
        principal=principal,
        project=project,
        models=tuple(model or ("*",)),
        limits=limits_of(
            requests_per_minute,
            tokens_per_minute,
            concurrent_streams,
            spend_per_month,
            spend_per_day,
        ),
        expires_in_s=seconds_of(expires),
    )
    if local:
        text, record = asyncio.run(_create_local(wanted))
    else:
        with control_client() as client:
            text, record = client.keys.create_as(wanted)
    _show_once(text, record, json_output)


@app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant's.")] = None,
    local: Local = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Show principals, last letters and times too.")
    ] = False,
    json_output: Json = False,
) -> None:
    """List keys; secrets are never shown."""
    if local:
        records = [one for one in asyncio.run(_list_local()) if tenant in (None, one.tenant)]
    else:
        with control_client() as client:
            records = client.keys.list(tenant)
    if json_output:
        print_json([key_body(record) for record in records])
        return
    print_keys(records, time.time(), everything=everything)


@app.command("change")
def change(
    key_id: KeyId,
    name: Annotated[str | None, typer.Option("--name", help="What the key is for.")] = None,
    model: Model = None,
    expires: Expires = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent_streams: Concurrent = None,
    spend_per_month: Spend = None,
    spend_per_day: SpendDay = None,
    json_output: Json = False,
) -> None:
    """Change a key; its limits are given together."""
    limits = limits_of(
        requests_per_minute, tokens_per_minute, concurrent_streams, spend_per_month, spend_per_day
    )
    given = {
        "name": name,
        "models": tuple(model) if model else None,
        "limits": limits if limits != limits_of() else None,
        "expires_in_s": seconds_of(expires),
    }
    changes = {field: value for field, value in given.items() if value is not None}
    with control_client() as client:
        record = client.keys.change(key_id, **changes)
    if json_output:
        print_json(key_body(record))
    else:
        say(f"changed {record.id} ({record.name})")


@app.command("rotate")
def rotate(
    key_id: KeyId,
    overlap: Annotated[
        str | None,
        typer.Option("--overlap", help="How long the old one stays good: 30m, 12h, 7d."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Replace a key by one with another secret. The old one is refused at once, or after --overlap.

    The new one has an id of its own.
    """
    with control_client() as client:
        text, record, replaced = client.keys.rotate(key_id, overlap_s=seconds_of(overlap) or 0.0)
    if json_output:
        replaced_body = None if replaced is None else key_body(replaced)
        print_json({"key": text, "record": key_body(record), "replaced": replaced_body})
        return
    _show_once(text, record, json_output)
    if replaced is not None:
        say(replaced_text(replaced))


@app.command("revoke")
def revoke(
    key_id: KeyId,
    descendants: Annotated[
        bool, typer.Option("--descendants", help="Also the keys that were made with it.")
    ] = False,
    local: Local = False,
    json_output: Json = False,
) -> None:
    """Revoke a key: refused within a second."""
    if local:
        record = asyncio.run(_revoke_local(key_id))
    else:
        with control_client() as client:
            record = client.keys.revoke(key_id, descendants=descendants)
    if json_output:
        print_json(key_body(record))
    else:
        say(f"revoked {record.id} ({record.name})")


def _show_once(text: str, record: KeyRecord, json_output: bool) -> None:
    if json_output:
        print_json({"key": text, "record": key_body(record)})
        return
    out.print(text)
    where = "everywhere" if record.scope == EVERYWHERE else f"within {record.scope}"
    say(f"This key ({record.role} {where}, id {record.id}) is shown once. Keep it safe.")


async def _create_local(wanted: KeyRequest) -> tuple[str, KeyRecord]:
    """A key made by the installation itself: what it may do is bounded by nobody but its
    principal. Without a scope it may do so everywhere, but for inference-only keys."""
    from cloudlm.security.access import Directory
    from cloudlm.security.keys import mint
    from cloudlm.security.scopes import demand_scope, paying_project

    wanted = key_request_from_body(key_request_body(wanted))  # control's rules
    state, home = await open_local_state()
    try:
        directory = Directory(await state.list_identities())
        holder = directory.principal(wanted.principal or "root")
        if holder is None:
            raise NotFound(f"principal {wanted.principal[:80]!r} does not exist")
        usual = holder.tenant if wanted.role == Role.USER else EVERYWHERE
        scope = wanted.scope or usual
        if not directory.role_exists(wanted.role, scope):
            raise NotFound(f"there is no role {wanted.role!r} within {scope!r}")
        demand_scope(directory, scope)
        now = time.time()
        minted = mint(
            wanted.name,
            wanted.role,
            home.pepper(),
            now,
            tenant=holder.tenant,
            project=paying_project(directory, holder, scope, wanted.project),
            principal=holder.id,
            scope=scope,
            models=wanted.models,
            limits=wanted.limits,
            expires_at=None if wanted.expires_in_s is None else now + wanted.expires_in_s,
        )
        await state.append_audit([_local_deed("create keys", minted.record, now)])
        await state.put_key(minted.record)
        return minted.text, minted.record
    finally:
        await state.close()


async def _list_local() -> list[KeyRecord]:
    state, _ = await open_local_state()
    try:
        used = await state.last_uses()
        return [replace(one, last_used_at=used.get(one.id)) for one in await state.list_keys()]
    finally:
        await state.close()


async def _revoke_local(key_id: str) -> KeyRecord:
    state, _ = await open_local_state()
    try:
        found = await state.get_key(key_id)
        if found is not None:
            await state.append_audit([_local_deed("delete keys", found, time.time())])
        record = await state.revoke_key(key_id, now=time.time())
    finally:
        await state.close()
    if record is None:
        raise NotFound(f"no key has the id {key_id[:80]!r}; 'cloudlm keys list --local' shows all")
    return record


def _local_deed(action: str, record: KeyRecord, now: float) -> AuditEvent:
    """What the audit log says of a change that no control saw: whose process it was."""
    return AuditEvent(
        at=now,
        server="cli",
        actor=f"uid:{os.getuid()}",
        key_id="",
        tenant=record.tenant,
        action=action,
        target=f"key {record.id} ({record.role}@{record.scope})",
        source="this machine",
        outcome=AuditOutcome.BEGUN,
    )
