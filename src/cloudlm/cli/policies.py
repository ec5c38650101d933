"""``cloudlm policies``: check Cedar policies before they hold, and see what they may speak of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloudlm.cli.options import Json
from cloudlm.cli.screen import out, print_json, print_text
from cloudlm.security.policies import check_policies, read_policy_file, schema

app = typer.Typer(no_args_is_help=True, help="Cedar policies beside roles: check, schema.")


@app.command("check")
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of policies.")],
    json_output: Json = False,
) -> None:
    """Check files of policies as a start would."""
    counts = {str(path): check_policies(read_policy_file(path), str(path)) for path in files}
    if json_output:
        print_json(counts)
        return
    for path, count in counts.items():
        out.print(f"{path}: {count} policies, all good")


@app.command("schema")
def show_schema(json_output: Json = False) -> None:
    """Print the schema that policies are checked against."""
    if json_output:
        print_json({"schema": schema()})
    else:
        print_text(schema(), end="")
