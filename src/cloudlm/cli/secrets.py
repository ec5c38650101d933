"""``cloudlm secrets``: the keys of services that are not ours, kept in this installation's home."""

from __future__ import annotations

import asyncio
import getpass
import os
import sys
import time
from typing import Annotated

import typer

from cloudlm.cli.connect import open_local_state
from cloudlm.cli.options import Json, date_text
from cloudlm.cli.screen import print_json, print_table, say
from cloudlm.core.access import DEFAULT_TENANT
from cloudlm.core.audit import AuditEvent, AuditOutcome
from cloudlm.core.errors import InvalidRequest, NotFound
from cloudlm.core.external import check_secret_name, check_url, origin_of
from cloudlm.core.model import check_name
from cloudlm.security.credentials import Credential, Credentials, check_key
from cloudlm.state.home import Home, load_settings

app = typer.Typer(no_args_is_help=True, help="Keys of external endpoints: keep, list, remove.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="What deployments call it.")]
_MOST_READ = 65_536


@app.command("set")
def put(
    name: Name,
    url: Annotated[
        str, typer.Option("--for", metavar="URL", help="The service; it is sent nowhere else.")
    ],
    tenant: Annotated[
        str, typer.Option("--tenant", help="Only for this tenant's own deployments.")
    ] = "",
    json_output: Json = False,
) -> None:
    """Keep a key, read from standard input. It is shown nowhere again."""
    check_secret_name(name)
    origin = origin_of(check_url(url.rstrip("/"), "--for"))
    if tenant:
        check_name(tenant, "tenant")
    key = _key()
    if not key:
        raise InvalidRequest(
            f"no key came in: pipe it, such as 'cloudlm secrets set {name} --for {url} < key.txt'"
        )
    kept = Credential(name, origin, key, tenant, time.time())
    check_key(key)
    asyncio.run(_note("create secrets", kept))
    Credentials(_home().credentials, {}).put(kept)
    if json_output:
        print_json(_shown(kept))
        return
    say(f"kept the secret {name} for {origin}")


@app.command("list")
def show(json_output: Json = False) -> None:
    """List the names of secrets and where each may be sent, never a key."""
    home = Home(load_settings()[0].home)
    kept = Credentials(home.credentials, os.environ)
    found = [one for name in kept.names() if (one := kept.find(name)) is not None]
    if json_output:
        print_json([_shown(one) for one in found])
        return
    rows = [(one.name, one.origin, one.tenant, date_text(one.set_at)) for one in found]
    print_table(("NAME", "FOR", "TENANT", "SET"), rows, "no secrets")


@app.command("delete")
def delete(name: Name, json_output: Json = False) -> None:
    """Remove a secret. Endpoints that name it are asked no more."""
    credentials = Credentials(_home().credentials, {})
    if check_secret_name(name) not in credentials.names():
        raise NotFound(f"there is no secret {name!r} in this home")
    asyncio.run(_note("delete secrets", Credential(name, "", "")))
    credentials.remove(name)
    if json_output:
        print_json({"deleted": name})
        return
    say(f"removed the secret {name}")


def _home() -> Home:
    return Home(load_settings()[0].home).ensure()


async def _note(action: str, secret: Credential) -> None:
    """Have the audit log say what is about to change, and whose process does it."""
    state, _ = await open_local_state()
    event = AuditEvent(
        at=time.time(),
        server="cli",
        actor=f"uid:{os.getuid()}",
        key_id="",
        tenant=secret.tenant or DEFAULT_TENANT,
        action=action,
        target=f"secret {secret.name}" + (f" for {secret.origin}" if secret.origin else ""),
        source="this machine",
        outcome=AuditOutcome.BEGUN,
    )
    try:
        await state.append_audit([event])
    finally:
        await state.close()


def _key() -> str:
    """The key from standard input; asked for without an echo where a person sits."""
    if sys.stdin.isatty():
        return getpass.getpass("key: ").strip()
    return sys.stdin.read(_MOST_READ).strip()


def _shown(one: Credential) -> dict[str, object]:
    return {"name": one.name, "for": one.origin, "tenant": one.tenant, "set_at": one.set_at}
