"""``cloudlm tenants`` and ``cloudlm projects``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cloudlm.cli.connect import control_client
from cloudlm.cli.options import (
    Concurrent,
    Json,
    RequestsPerMinute,
    Spend,
    SpendDay,
    Tenant,
    TokensPerMinute,
    date_text,
    limits_of,
    limits_text,
)
from cloudlm.cli.screen import print_json, print_table, say
from cloudlm.core import access
from cloudlm.core.wire_access import project_body, tenant_body

tenants = typer.Typer(no_args_is_help=True, help="Tenants: create, list, change, remove.")
projects = typer.Typer(no_args_is_help=True, help="Projects of a tenant: create, list, remove.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="Its name.")]
Title = Annotated[str, typer.Option("--title", help="What people call it.")]


@tenants.command("create")
def create_tenant(
    name: Name,
    title: Title = "",
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent_streams: Concurrent = None,
    spend_per_month: Spend = None,
    spend_per_day: SpendDay = None,
    json_output: Json = False,
) -> None:
    """Make a tenant, with a project 'default'."""
    limits = limits_of(
        requests_per_minute, tokens_per_minute, concurrent_streams, spend_per_month, spend_per_day
    )
    with control_client() as client:
        made = client.tenants.create(name, title=title, limits=limits)
    _tell("made", made, tenant_body(made), json_output)


@tenants.command("list")
def list_tenants(json_output: Json = False) -> None:
    """List the tenants that you may see."""
    with control_client() as client:
        found = client.tenants.list()
    if json_output:
        print_json([tenant_body(one) for one in found])
        return
    rows = [
        (
            one.name,
            one.title,
            limits_text(one.limits),
            date_text(one.created_at),
            date_text(one.disabled_at),
        )
        for one in found
    ]
    print_table(("NAME", "TITLE", "LIMITS", "CREATED", "DISABLED"), rows, "no tenants")


@tenants.command("change")
def change_tenant(
    name: Name,
    title: Annotated[str | None, typer.Option("--title", help="What people call it.")] = None,
    disabled: Annotated[
        bool | None,
        typer.Option("--disable/--enable", help="Refuse, or accept again, all its keys."),
    ] = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent_streams: Concurrent = None,
    spend_per_month: Spend = None,
    spend_per_day: SpendDay = None,
    json_output: Json = False,
) -> None:
    """Change a tenant; limits are given together."""
    limits = limits_of(
        requests_per_minute, tokens_per_minute, concurrent_streams, spend_per_month, spend_per_day
    )
    changes: dict[str, Any] = {} if title is None else {"title": title}
    if disabled is not None:
        changes["disabled"] = disabled
    if limits != access.Limits():
        changes["limits"] = limits
    with control_client() as client:
        changed = client.tenants.change(name, **changes)
    _tell("changed", changed, tenant_body(changed), json_output)


@tenants.command("remove")
def remove_tenant(name: Name, json_output: Json = False) -> None:
    """Remove an empty tenant."""
    with control_client() as client:
        client.tenants.remove(name)
    _tell_removed("tenant", name, json_output)


@projects.command("create")
def create_project(
    name: Name,
    tenant: Tenant = None,
    title: Title = "",
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent_streams: Concurrent = None,
    spend_per_month: Spend = None,
    spend_per_day: SpendDay = None,
    json_output: Json = False,
) -> None:
    """Make a project."""
    limits = limits_of(
        requests_per_minute, tokens_per_minute, concurrent_streams, spend_per_month, spend_per_day
    )
    with control_client() as client:
        made = client.projects.create(name, tenant=tenant, title=title, limits=limits)
    _tell("made", made, project_body(made), json_output)


@projects.command("list")
def list_projects(tenant: Tenant = None, json_output: Json = False) -> None:
    """List the projects that you may see."""
    with control_client() as client:
        found = client.projects.list(tenant)
    if json_output:
        print_json([project_body(one) for one in found])
        return
    rows = [
        (one.tenant, one.name, one.title, limits_text(one.limits), date_text(one.created_at))
        for one in found
    ]
    print_table(("TENANT", "NAME", "TITLE", "LIMITS", "CREATED"), rows, "no projects")


@projects.command("remove")
def remove_project(name: Name, tenant: Tenant = None, json_output: Json = False) -> None:
    """Remove an empty project."""
    with control_client() as client:
        client.projects.remove(name, tenant=tenant)
    _tell_removed("project", name, json_output)


def _tell_removed(what: str, name: str, json_output: bool) -> None:
    if json_output:
        print_json({"removed": name})
    else:
        say(f"removed {what} {name}")


def _tell(
    done: str, fact: access.Tenant | access.Project, body: dict[str, Any], json_output: bool
) -> None:
    if json_output:
        print_json(body)
    else:
        say(f"{done} {type(fact).__name__.lower()} {fact.name}")
