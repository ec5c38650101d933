"""``cloudlm plan``: which machines a deployment should run on and what they cost. Spends nothing
and asks no control: the model's figures come from the registry or from the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloudlm.cli.catalogue import Folder, chosen_catalogue
from cloudlm.cli.connect import local_registry
from cloudlm.cli.deployments import read_specs
from cloudlm.cli.options import Json
from cloudlm.cli.plan_text import decision_body, print_decision
from cloudlm.cli.screen import print_json, print_text, say
from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.figures import ModelFigures, figures_of
from cloudlm.core.model import AddressKind, address_kind
from cloudlm.core.spec import VLLM

if TYPE_CHECKING:
    from cloudlm.control.needs import Batch
    from cloudlm.control.offers import Asked
    from cloudlm.control.place import Choice

# Tokens and sequences of a step where the deployment's options do not say: our engine's, and
# vLLM's own defaults.
_BATCH = {VLLM: (2048, 256)}
_OWN_BATCH = (1024, 64)


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
    from cloudlm.control.place import place

    specs = read_specs(file)
    market = chosen_catalogue(catalogue)
    found = []
    for spec in specs:
        asked = asked_of(spec)
        found.append((spec, asked, place(asked, market)))
    if json_output:
        print_json([decision_body(*one) for one in found])
        return
    for number, (spec, asked, decision) in enumerate(found):
        print_text("", end="\n" if number else "")
        print_decision(spec, asked, decision, everything=everything)
        for hint in hints(spec, asked, decision.best) if decision.best else ():
            say(f"note: {hint}")


def asked_of(spec: DeploymentSpec) -> Asked:
    """What placement is asked for a deployment. Raises InvalidRequest naming what is missing."""
    from cloudlm.control.offers import Asked

    if spec.placement is None or spec.placement.traffic is None:
        raise InvalidRequest(
            f"{spec.name}: placement.traffic is missing; say for how much to plan, such as "
            "placement: {traffic: {requests_per_s: 2, prompt_tokens: 800, output_tokens: 200}}",
            param="placement.traffic",
        )
    traffic = spec.placement.traffic
    figures = spec.placement.figures or _registered_figures(spec)
    longest = traffic.prompt_tokens + traffic.output_tokens
    if 0 < figures.context_length < longest:
        raise InvalidRequest(
            f"{spec.name}: requests of {longest} tokens are longer than the model's "
            f"{figures.context_length}; lower placement.traffic.prompt_tokens or output_tokens",
            param="placement.traffic",
        )
    return Asked(
        figures=figures,
        placement=spec.placement,
        traffic=traffic,
        batch=_batch(spec),
        min_replicas=spec.min_replicas,
    )


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


def _batch(spec: DeploymentSpec) -> Batch:
    from cloudlm.control.needs import Batch

    tokens, sequences = _BATCH.get(spec.engine, _OWN_BATCH)
    names = ("max_batch_tokens", "max_batch_sequences")
    if spec.engine == VLLM:
        names = ("max_num_batched_tokens", "max_num_seqs")
    return Batch(_whole(spec, names[0], tokens), _whole(spec, names[1], sequences))


def _whole(spec: DeploymentSpec, option: str, default: int) -> int:
    value = spec.options.get(option, default)
    if type(value) is not int or value < 1:
        raise InvalidRequest(
            f"{spec.name}: option {option} must be a whole number above 0, not {value!r}",
            param=f"options.{option}",
        )
    return value


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
