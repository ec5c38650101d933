"""Where a policy's replicas go: the scenario's own zones, or the machines that production chooses.

Must not choose: ``placing`` asks ``control.place``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cloudlm.control.catalogue.files import load_catalogue
from cloudlm.control.catalogue.words import Catalogue
from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.fields import Fields
from cloudlm.sim.figures import Figures
from cloudlm.sim.ground import Zone
from cloudlm.sim.placing import Placed, placed
from cloudlm.sim.scenario_traffic import named
from cloudlm.sim.simulation import Policy

SPREAD = "spread"
CATALOGUE = "catalogue"
PLACEMENTS = (SPREAD, CATALOGUE)
Market = Callable[[], Catalogue]
"""Reads the catalogue when a policy asks for it."""
Placer = Callable[[Fields, DeploymentSpec], Placed | None]


def wishes_over(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A policy's own deployment over the common one: the wishes of its placement one by one, so
    that policies can differ in a single one."""
    before, after = common.get("placement"), own.get("placement")
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        own = {**own, "placement": {**before, **after}}
    return {**common, **own}


def market_of(top: Fields, folder: Path, market: Market) -> Market:
    """The catalogue in the folder that a scenario names, else the one that counts here."""
    own = top.optional_text("catalogue")
    if own is None:
        return market
    if not (folder / own).is_dir():
        raise InvalidRequest(
            f"catalogue: {folder / own} is no folder; name one with offers.csv, or leave it out",
            param="catalogue",
        )
    return lambda: load_catalogue(folder / own)


def placer_of(usual: Figures, market: Market) -> Placer:
    """What places the deployments of policies. ``usual`` are the figures of the scenario's own
    replica."""
    known: list[Catalogue] = []

    def place(given: Fields, spec: DeploymentSpec) -> Placed | None:
        if named(given, "placement", SPREAD, PLACEMENTS) == SPREAD:
            return None
        known.extend([] if known else [market()])
        try:
            return placed(spec, known[0], usual)
        except InvalidRequest as error:
            said = f"placement: {CATALOGUE}: {error.message}"
            raise type(error)(said, param=error.param) from None

    return place


def zone_names(zones: Sequence[Zone], policies: Sequence[Policy]) -> list[str]:
    """All zones that faults may name: the scenario's own where a policy is there, and those of the
    machines that were chosen."""
    found = [one.name for one in zones] if any(p.placed is None for p in policies) else []
    chosen = [name for one in policies if one.placed is not None for name in one.placed.zones]
    return list(dict.fromkeys([*found, *chosen]))
