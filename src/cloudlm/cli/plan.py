"""``cloudlm plan``: which machines a deployment should run on and what they cost. Spends nothing
and asks no control: the model's figures come from the registry or from the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloudlm.cli.catalogue import Folder, chosen_catalogue
from cloudlm.cli.connect import local_registry
from cloudlm.cli.options import Json
from cloudlm.cli.plan_text import decision_body, print_decision
from cloudlm.cli.screen import print_json, print_text, say
from cloudlm.cli.specs import read_specs
from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.figures import ModelFigures, figures_of
from cloudlm.core.model import AddressKind, address_kind

if TYPE_CHECKING:
    from cloudlm.control.offers import Asked
    from cloudlm.control.place import Choice


def plan(
    file: Annotated[
        Path, typer.Option("-f", "--file", help="YAML, a deployment per document; - is stdin.")
    ],
    catalogue: Folder = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Show every choice and every offer that lost.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Choose machines for the deployments in a file, and say why. Nothing is rented."""
    from cloudlm.control.asking import asked_of
    from cloudlm.control.place import place

    specs = read_specs(file)
    market = chosen_catalogue(catalogue)
    found = []
    for spec in specs:
        asked = asked_of(spec, _registered_figures)
        found.append((spec, asked, place(asked, market)))
    if json_output:
        print_json([decision_body(*one) for one in found])
        return
    for number, (spec, asked, decision) in enumerate(found):
        print_text("", end="\n" if number else "")
        print_decision(spec, asked, decision, everything=everything)
        for hint in hints(spec, asked, decision.best) if decision.best else ():
            say(f"note: {hint}")


def _registered_figures(spec: DeploymentSpec) -> ModelFigures:
    if address_kind(spec.model) is not AddressKind.REGISTRY:
        raise InvalidRequest(
            f"{spec.name}: {spec.model} is not in the registry; import it with 'cloudlm models "
            "pull', or give its numbers as placement.figures",
            param="model",
        )
    precision = spec.options.get("precision")
    with local_registry() as registry:
        manifest = registry.resolve(spec.model)
        config = registry.configuration(manifest.ref)
    return figures_of(manifest, config, None if precision is None else str(precision))


def hints(spec: DeploymentSpec, asked: Asked, best: Choice) -> list[str]:
    """What a user should know before renting what the plan says."""
    found = []
    if best.estimated:
        found.append(
            "speeds are estimates by the roofline; measure on one machine and give the figures as "
            "placement.measured before you rent many"
        )
    if best.replicas > spec.max_replicas:
        found.append(
            f"{best.replicas} replicas are planned; max_replicas is {spec.max_replicas}, raise it"
        )
    budget = asked.placement.budget_usd_per_h
    if budget and best.usd_per_h_at_most > budget:
        found.append(f"without spot machines it costs more than the budget of ${budget:.2f}")
    if asked.placement.spot.share and not any(part.spot for part in best.parts):
        found.append(
            "no machine on spot: its price is not known, it saves nothing, or the share of so few "
            "machines is none"
        )
    dates = sorted(part.machine.offer.as_of or part.machine.offer.read_on for part in best.parts)
    found.append(
        f"the oldest price in this plan is of {dates[0]}; 'cloudlm catalogue import' brings newer "
        "ones"
    )
    return found
