"""``cloudlm principals``: people and services, and what they were granted; ``cloudlm whoami``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cloudlm.cli.connect import control_client
from cloudlm.cli.options import Grants, Json, Tenant, date_text, grants_of, grants_text
from cloudlm.cli.screen import out, print_json, print_table, say
from cloudlm.core.access import DEFAULT_PROJECT, Principal, PrincipalKind
from cloudlm.core.tenant import SESSION
from cloudlm.core.wire_access import key_body, principal_body

app = typer.Typer(no_args_is_help=True, help="People and services: create, list, change, remove.")
Id = Annotated[str, typer.Argument(metavar="ID", help="The id, as 'principals list' shows it.")]


def whoami(json_output: Json = False) -> None:
    """Show whom your key speaks for, and its role."""
    with control_client() as client:
        key, principal = client.whoami()
    if json_output:
        print_json({"key": key_body(key), "principal": principal_body(principal)})
        return
    out.print(f"{principal.name} ({principal.id}), tenant {principal.tenant}")
    if key.id.startswith(SESSION):
        out.print(f"signed in until {date_text(key.expires_at)}: {grants_text(principal.grants)}")
    else:
        out.print(f"key {key.id} ({key.name}): {key.role}@{key.scope}")


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What people call it.")],
    grant: Grants = None,
    tenant: Tenant = None,
    project: Annotated[str, typer.Option("--project", help="Its project.")] = DEFAULT_PROJECT,
    person: Annotated[
        bool, typer.Option("--person/--service", help="A person, or a service.")
    ] = False,
    subject: Annotated[
        str, typer.Option("--subject", help="issuer#sub of a person who signs in.")
    ] = "",
    json_output: Json = False,
) -> None:
    """Make a principal. Grant no more than you have yourself."""
    kind = PrincipalKind.PERSON if person or subject else PrincipalKind.SERVICE
    with control_client() as client:
        where = tenant or client.whoami().key.tenant
        wanted = Principal("", name, kind, where, project, grants_of(grant), subject)
        made = client.principals.create(wanted)
    if json_output:
        print_json(principal_body(made))
        return
    out.print(made.id)
    say(f"made {made.kind} {made.name} of {made.scope}")


@app.command("list")
def list_principals(tenant: Tenant = None, json_output: Json = False) -> None:
    """List the principals that you may see."""
    with control_client() as client:
        found = client.principals.list(tenant)
    if json_output:
        print_json([principal_body(one) for one in found])
        return
    rows = [
        (
            one.id,
            one.name,
            one.kind,
            one.scope,
            grants_text(one.grants),
            date_text(one.created_at),
            date_text(one.disabled_at),
        )
        for one in found
    ]
    columns = ("ID", "NAME", "KIND", "PROJECT", "GRANTS", "CREATED", "DISABLED")
    print_table(columns, rows, "no principals")


@app.command("change")
def change(
    principal_id: Id,
    name: Annotated[str | None, typer.Option("--name", help="What people call it.")] = None,
    grant: Grants = None,
    no_grants: Annotated[bool, typer.Option("--no-grants", help="Take all grants away.")] = False,
    disabled: Annotated[
        bool | None,
        typer.Option("--disable/--enable", help="Refuse, or accept again, it and what it granted."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Change a principal; --grant replaces all its grants."""
    changes: dict[str, Any] = {} if name is None else {"name": name}
    if grant or no_grants:
        changes["grants"] = grants_of(grant)
    if disabled is not None:
        changes["disabled"] = disabled
    with control_client() as client:
        changed = client.principals.change(principal_id, **changes)
    if json_output:
        print_json(principal_body(changed))
    else:
        say(f"changed {changed.id} ({changed.name}): {grants_text(changed.grants) or 'no grants'}")


@app.command("remove")
def remove(principal_id: Id, json_output: Json = False) -> None:
    """Remove a principal and revoke its keys.

    What it granted to others is yours from then on."""
    with control_client() as client:
        client.principals.remove(principal_id)
    if json_output:
        print_json({"removed": principal_id})
    else:
        say(f"removed {principal_id}")
