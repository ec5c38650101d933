"""``cloudlm usage``: what was used and what it cost, as a table, JSON or CSV."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cloudlm.cli.connect import control_client
from cloudlm.cli.options import Json
from cloudlm.cli.screen import print_json, print_table
from cloudlm.core.usage import GROUPS, check_groups, csv_of, money, usage_body


def show(
    by: Annotated[
        str, typer.Option("--by", help=f"What to sum by: {', '.join(GROUPS)}; several with commas.")
    ] = "day",
    since: Annotated[
        str | None, typer.Option("--since", help="First day (UTC), 2026-01-31; 30 days back.")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", help="Last day (UTC), included; today.")
    ] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant's.")] = None,
    project: Annotated[str | None, typer.Option("--project", help="Only this project's.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    json_output: Json = False,
) -> None:
    """Show tokens and costs."""
    groups = check_groups(filter(None, (part.strip() for part in by.split(","))))
    with control_client() as client:
        rows = client.usage(groups, since=since, until=until, tenant=tenant, project=project)
    if json_output:
        print_json([usage_body(row) for row in rows])
    elif csv:
        sys.stdout.write(csv_of(groups, rows))
    else:
        columns = ("REQUESTS", "PROMPT", "CACHED", "COMPLETION", "COST")
        table = [
            (
                *(getattr(row, name) for name in groups),
                row.requests,
                row.prompt_tokens,
                row.cached_tokens,
                row.completion_tokens,
                money(row.cost).rstrip("0").rstrip("."),
            )
            for row in rows
        ]
        print_table((*(name.upper() for name in groups), *columns), table, "nothing was used")
