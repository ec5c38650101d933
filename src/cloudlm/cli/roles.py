"""``cloudlm roles``: what a role may do, roles of one's own, and the matrix of all routes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cloudlm.cli.connect import control_client
from cloudlm.cli.options import Json
from cloudlm.cli.screen import print_json, print_table, say
from cloudlm.core.access import Effect, Rule
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.wire_access import role_body
from cloudlm.core.yaml_text import NotYaml, parse_yaml

app = typer.Typer(no_args_is_help=True, help="Roles: list, create, remove, matrix.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="The role's name.")]
Scope = Annotated[str | None, typer.Option("--scope", help="Where it belongs: '*' or a tenant.")]
File = Annotated[
    Path, typer.Option("--file", "-f", help="YAML or JSON with 'rules' (verbs, resources, effect).")
]


@app.command("list")
def list_roles(json_output: Json = False) -> None:
    """List roles with their rules."""
    with control_client() as client:
        found = client.roles.list()
    if json_output:
        print_json([role_body(one.role, built_in=one.built_in) for one in found])
        return
    rows = [
        (one.role.name, "built in" if one.built_in else one.role.scope, _rules_text(one.role.rules))
        for one in found
    ]
    print_table(("NAME", "SCOPE", "RULES"), rows, "no roles")


@app.command("create")
def create(name: Name, file: File, scope: Scope = None, json_output: Json = False) -> None:
    """Make a role of rules no wider than yours."""
    body: dict[str, Any] = {"name": name, "rules": _rules_in(file)}
    if scope is not None:
        body["scope"] = scope
    with control_client() as client:
        made = client.roles.create(body)
    if json_output:
        print_json(role_body(made))
    else:
        say(f"made role {made.name} of {made.scope}")


@app.command("change")
def change(name: Name, file: File, scope: Scope = None, json_output: Json = False) -> None:
    """Replace a role's rules."""
    with control_client() as client:
        changed = client.roles.change(name, _rules_in(file), scope=scope)
    if json_output:
        print_json(role_body(changed))
    else:
        say(f"changed role {changed.name} of {changed.scope}")


@app.command("remove")
def remove(name: Name, scope: Scope = None, json_output: Json = False) -> None:
    """Remove a role that nobody has."""
    with control_client() as client:
        client.roles.remove(name, scope=scope)
    if json_output:
        print_json({"removed": name})
    else:
        say(f"removed role {name}")


@app.command("matrix")
def matrix(json_output: Json = False) -> None:
    """Show each route with the roles that open it."""
    from cloudlm.security.matrix import as_data

    found = as_data()
    if json_output:
        print_json(found)
        return
    rows = [
        (
            row["server"],
            row["method"],
            row["path"],
            row["holder"] if row["verb"] is None else f"{row['verb']} {row['resource']}",
            " ".join(row["roles"]) if row["verb"] is not None else "",
        )
        for row in found
    ]
    print_table(("SERVER", "METHOD", "PATH", "DEMANDS", "ROLES"), rows, "no routes")


def _rules_text(rules: tuple[Rule, ...]) -> str:
    return "; ".join(
        ("not " if rule.effect is Effect.DENY else "")
        + f"{','.join(rule.verbs)} {','.join(rule.resources)}"
        for rule in rules
    )


def _rules_in(file: Path) -> list[Any]:
    try:
        tree = parse_yaml(file.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from None
    except NotYaml as error:
        raise InvalidRequest(f"{file} is not YAML: {error}") from None
    rules = tree.get("rules") if isinstance(tree, dict) else tree
    if not isinstance(rules, list):
        raise InvalidRequest(
            f"{file} must hold a list 'rules' of {{verbs: [...], resources: [...]}}"
        )
    return rules
