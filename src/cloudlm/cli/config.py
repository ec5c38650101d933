"""``cloudlm config``: every setting with its value and where the value came from."""

from __future__ import annotations

from cloudlm.cli.options import Json
from cloudlm.cli.screen import print_json, print_table, say
from cloudlm.state.home import load_settings


def show(
    json_output: Json = False,
) -> None:
    """Show every setting and where its value comes from. File < environment < flag."""
    _, rows = load_settings()
    shown = [
        (row.name, "***" if row.secret and row.value else row.value, row.source, row.environment)
        for row in rows
    ]
    if json_output:
        keys = ("name", "value", "source", "environment")
        print_json([dict(zip(keys, row, strict=True)) for row in shown])
        return
    print_table(("NAME", "VALUE", "SOURCE"), [row[:3] for row in shown], "no settings")
    say("in the environment a setting is CLOUDLM_ and its name in capitals, with _ for each point")
