"""``cloudlm simulate``: what policies would have done with recorded or drawn traffic.

Runs the production deciders in virtual time (``cloudlm.sim``); starts and pays for nothing. Also
fits a replica's figures to measurements, and writes this machine's ledger in a form that can be
replayed.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from cloudlm.cli.catalogue import Folder, chosen_catalogue
from cloudlm.cli.connect import open_local_state
from cloudlm.cli.options import Json, seconds_of
from cloudlm.cli.screen import print_across, print_json, print_text, say
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.tenant import LedgerRow

_LEDGER_PAGE = 10_000


def simulate(
    scenario: Annotated[
        str | None, typer.Argument(help="YAML file of traffic, replicas, faults and policies.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Seed, instead of the scenario's.")
    ] = None,
    html: Annotated[
        str | None, typer.Option("--html", help="Write a page with plots to this file.")
    ] = None,
    catalogue: Folder = None,
    fit: Annotated[
        str | None,
        typer.Option("--fit", help="CSV file of measurements: print a replica's figures instead."),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="With --fit: the figures' name.")] = "mine",
    export_ledger: Annotated[
        str | None,
        typer.Option(
            "--export-ledger",
            help="Write this installation's ledger as CSV that a scenario can replay; - prints it.",
        ),
    ] = None,
    since: Annotated[
        str, typer.Option("--since", help="With --export-ledger: how far back, 12h or 7d.")
    ] = "7d",
    json_output: Json = False,
) -> None:
    """Compare policies on traffic without running anything."""
    wanted = [one for one in (scenario, fit, export_ledger) if one is not None]
    if len(wanted) != 1:
        raise typer.BadParameter("name a scenario, or give one of --fit and --export-ledger")
    if scenario is not None:
        _compare(Path(scenario), seed, html, catalogue, json_output)
    elif fit is not None:
        _fit(Path(fit), name)
    else:
        assert export_ledger is not None
        asyncio.run(_export(export_ledger, seconds_of(since) or 0.0))


def _compare(
    path: Path, seed: int | None, html: str | None, catalogue: Path | None, json_output: bool
) -> None:
    from cloudlm.sim.page import page
    from cloudlm.sim.report import measured_rows, report_body
    from cloudlm.sim.report_machines import chosen_text, machine_columns, machine_rows
    from cloudlm.sim.report_rollouts import rollout_columns, rollout_reasons, rollout_rows
    from cloudlm.sim.scenario import read_scenario
    from cloudlm.sim.simulation import simulate

    deciders = logging.getLogger("cloudlm.control")
    if not deciders.handlers:  # what they log in virtual time is in the report
        deciders.addHandler(logging.NullHandler())
    scenario = read_scenario(path, seed=seed, market=lambda: chosen_catalogue(catalogue))
    results = []
    for policy in scenario.policies:
        began = time.perf_counter()
        result = simulate(policy, scenario.setting, scenario.arrivals())
        took_s = time.perf_counter() - began
        say(f"{policy.name}: {result.requests:,} requests simulated in {took_s:.1f} s")
        if policy.placed is not None:
            say(f"{policy.name}: placed on {chosen_text(policy.placed)}")
        results.append(result)
    if html is not None:
        notes = [
            f"{results[0].requests:,} requests",
            f"seed {scenario.setting.seed}",
            f"replicas as {scenario.setting.figures.name} was measured",
            f"{len(scenario.setting.faults)} faults",
        ]
        placed = [(one.name, one.placed) for one in scenario.policies if one.placed is not None]
        notes += [f"{name}: {chosen_text(where)}" for name, where in placed]
        _write(Path(html), page(scenario.name, notes, results))
        say(f"wrote {html}")
    if json_output:
        print_json(report_body(scenario.name, scenario.setting.seed, results))
    else:
        print_across(("MEASURE", *(result.policy for result in results)), measured_rows(results))
        if columns := machine_columns(results):
            print_text("")
            print_across(("MACHINES", *columns), machine_rows(results))
        if columns := rollout_columns(results):
            print_text("")
            print_across(("ROLL-OUT", *columns), rollout_rows(results))
            for reason in rollout_reasons(results):
                print_text(reason)


def _fit(path: Path, name: str) -> None:
    import yaml

    from cloudlm.sim.figures import figures_body, fitted
    from cloudlm.sim.fit import read_measurements

    today = time.strftime("%Y-%m-%d")
    figures = fitted(name, read_measurements(path), measured=today, source=path.name)
    body = {"figures": [figures_body(figures)]}
    print_text(yaml.safe_dump(body, sort_keys=False, default_flow_style=None, width=100), end="")


async def _export(target: str, back_s: float) -> None:
    from cloudlm.sim.traces import ledger_csv

    state, _ = await open_local_state()
    try:
        rows: dict[str, LedgerRow] = {}
        since = time.time() - back_s
        while True:
            page = await state.list_ledger(since=since, limit=_LEDGER_PAGE)
            fresh = [row for row in page if row.id not in rows]
            rows.update({row.id: row for row in fresh})
            if len(page) < _LEDGER_PAGE or not fresh:
                break
            since = page[-1].started_at
    finally:
        await state.close()
    if target == "-":
        ledger_csv(rows.values(), sys.stdout.write)
        return
    lines: list[str] = []
    count = ledger_csv(rows.values(), lines.append)
    _write(Path(target), "".join(lines))
    say(f"wrote {count:,} rows to {target}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error}") from None
