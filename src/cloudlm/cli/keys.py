"""``cloudlm keys``: make, list and revoke API keys.

Through the control API, or with ``--local`` straight in this machine's state: the way back in when
the admin key is lost, for whoever may read the installation's folder.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer

from cloudlm.cli.connect import control_client, open_local_state
from cloudlm.cli.screen import out, print_json, print_table, say
from cloudlm.core.errors import NotFound
from cloudlm.core.tenant import KeyRecord, Role
from cloudlm.core.wire import key_body, key_request_from_body

app = typer.Typer(no_args_is_help=True, help="API keys: create, list, revoke.")
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Local = Annotated[
    bool, typer.Option("--local", help="Work on this machine's state, without an admin key.")
]


@app.command("create")
def create(
    name: Annotated[str, typer.Option("--name", help="What the key is for.")] = "key",
    role: Annotated[Role, typer.Option("--role", help="admin, or user for inference only.")] = (
        Role.USER
    ),
    local: Local = False,
    json_output: Json = False,
) -> None:
    """Make a key. It is shown once and stored only as a hash."""
    if local:
        text, record = asyncio.run(_create_local(name, role))
    else:
        with control_client() as client:
            text, record = client.keys.create(name, role)
    if json_output:
        print_json({"key": text, "record": key_body(record)})
        return
    out.print(text)
    say(f"This key ({record.role}, id {record.id}) is shown once. Keep it safe.")


@app.command("list")
def list_keys(local: Local = False, json_output: Json = False) -> None:
    """List keys; secrets are never shown."""
    if local:
        records = asyncio.run(_list_local())
    else:
        with control_client() as client:
            records = client.keys.list()
    if json_output:
        print_json([key_body(record) for record in records])
        return
    rows = [
        (
            record.id,
            record.name,
            record.role,
            f"…{record.last4}",
            _date(record.created_at),
            _date(record.revoked_at),
        )
        for record in records
    ]
    print_table(("ID", "NAME", "ROLE", "ENDS IN", "CREATED", "REVOKED"), rows, "no keys")


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The id, as 'keys list' shows it.")],
    local: Local = False,
    json_output: Json = False,
) -> None:
    """Revoke a key. It is refused everywhere within a second."""
    if local:
        record = asyncio.run(_revoke_local(key_id))
    else:
        with control_client() as client:
            record = client.keys.revoke(key_id)
    if json_output:
        print_json(key_body(record))
    else:
        say(f"revoked {record.id} ({record.name})")


def _date(stamp: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(stamp)) if stamp else ""


async def _create_local(name: str, role: Role) -> tuple[str, KeyRecord]:
    from cloudlm.security.keys import mint

    name, role = key_request_from_body({"name": name, "role": role})  # control's rules
    state, home = await open_local_state()
    try:
        minted = mint(name, role, home.pepper(), time.time())
        await state.put_key(minted.record)
        return minted.text, minted.record
    finally:
        await state.close()


async def _list_local() -> list[KeyRecord]:
    state, _ = await open_local_state()
    try:
        return await state.list_keys()
    finally:
        await state.close()


async def _revoke_local(key_id: str) -> KeyRecord:
    state, _ = await open_local_state()
    try:
        record = await state.revoke_key(key_id, now=time.time())
    finally:
        await state.close()
    if record is None:
        raise NotFound(f"no key has the id {key_id[:80]!r}; 'cloudlm keys list --local' shows all")
    return record
