"""``cloudlm drivers``: the installed drivers and what each can do."""

from __future__ import annotations

from cloudlm.cli.options import Json
from cloudlm.cli.screen import print_json, print_table
from cloudlm.core import plugins
from cloudlm.core.errors import CloudlmError


def show(
    json_output: Json = False,
) -> None:
    """List the drivers and their abilities."""
    rows = []
    for plugin in plugins.installed("cloudlm.drivers"):
        try:
            driver = plugins.load("cloudlm.drivers", plugin.name)
            abilities, fault = sorted(str(word) for word in driver.abilities), ""
        except CloudlmError as error:
            abilities, fault = [], error.message
        rows.append(
            {
                "name": plugin.name,
                "package": plugin.package,
                "abilities": abilities,
                "fault": fault,
            }
        )
    if json_output:
        print_json(rows)
        return
    print_table(
        ("NAME", "PACKAGE", "ABILITIES"),
        [
            (row["name"], row["package"], row["fault"] or ", ".join(row["abilities"]))
            for row in rows
        ],
        "no drivers installed",
    )
