"""``cloudlm certificates``: what workers and gateways of this installation show each other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from cloudlm.cli.options import Json, date_text
from cloudlm.cli.screen import print_json, print_table, print_text
from cloudlm.state.home import Home, load_settings

app = typer.Typer(no_args_is_help=True, help="Certificates of gateways and workers.")


@app.command("issue")
def issue(
    purpose: Annotated[str, typer.Argument(metavar="worker|gateway", help="Who will show it.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to write to, for the other machine.")],
    name: Annotated[
        list[str] | None,
        typer.Option("--name", help="Address or host name it is reached by; repeatable."),
    ] = None,
    days: Annotated[int, typer.Option("--days", min=1, max=825, help="How long it is good.")] = 90,
    json_output: Json = False,
) -> None:
    """Make a certificate for another machine."""
    from cloudlm.core.errors import InvalidRequest
    from cloudlm.security.authority import Authority, Purpose, expires_at

    if purpose not in list(Purpose):
        raise InvalidRequest(f"{purpose[:40]!r} is neither 'worker' nor 'gateway'")
    home = Home(load_settings()[0].home).ensure()
    authority = Authority(home.tls)
    now = time.time()
    file = authority.issue(Purpose(purpose), name or (), to, now, days=days)
    authority.ensure(Purpose.GATEWAY, (), now)  # so that a gateway of this home has one to show
    facts = {
        "certificate": str(file),
        "authority": str(to / "ca.pem"),
        "expires_at": expires_at(file),
    }
    if json_output:
        print_json(facts)
        return
    print_text(f"{file}  certificate and private key, until {date_text(expires_at(file))}")
    print_text(f"{to / 'ca.pem'}  the authority of this installation")


@app.command("list")
def show(json_output: Json = False) -> None:
    """List this installation's own certificates and their ends."""
    from cloudlm.security.authority import expires_at

    home = Home(load_settings()[0].home)
    found = [
        (file.name, expires_at(file), str(file))
        for file in sorted(home.tls.glob("*.pem"))
        if file.name != "ca-key.pem"
    ]
    if json_output:
        keys = ("name", "expires_at", "file")
        print_json([dict(zip(keys, row, strict=True)) for row in found])
        return
    rows = [(name, date_text(at), file) for name, at, file in found]
    print_table(("NAME", "UNTIL", "FILE"), rows, "no certificates")
