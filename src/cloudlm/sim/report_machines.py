"""What was rented, as rows of a table and as JSON: for policies that production has placed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cloudlm.sim.placing import Placed
from cloudlm.sim.simulation import Result

MEASURES = (
    "replicas planned",
    "machines planned",
    "planned, USD/h",
    "machine-hours on spot",
    "machine-hours on demand",
    "cost on spot, USD",
    "cost on demand, USD",
    "cost, USD/h",
    "all on demand, USD/h",
    "machines ordered",
    "taken away",
    "orders refused",
)


def machine_columns(results: Sequence[Result]) -> list[str]:
    """The policies whose machines were chosen out of the catalogue."""
    return [one.policy for one in results if one.rent is not None]


def machine_rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """A row per measure: its name, and the number of each policy with machines."""
    numbers = [_numbers(one) for one in results if one.rent is not None]
    return [(name, *row) for name, row in zip(MEASURES, zip(*numbers, strict=True), strict=True)]


def chosen_text(placed: Placed) -> str:
    """What production chose, for people: ``3 x aws/eu-north-1/g6.xlarge (1 replica each)``."""
    parts = []
    for kind in placed.kinds:
        count = kind.machine.replicas
        each = f"{count} replica{'' if count == 1 else 's'} each"
        parts.append(f"{kind.count} x {kind.offer.key} ({each})")
    return " + ".join(parts)


def machines_body(result: Result) -> dict[str, Any] | None:
    """The same as JSON; None for a policy in zones of the scenario's own."""
    if result.placed is None or result.rent is None:
        return None
    choice = result.placed.choice
    return {
        "chosen": [
            {"offer": one.offer.key, "count": one.count, "replicas_each": one.machine.replicas}
            for one in result.placed.kinds
        ],
        "planned_usd_per_h": choice.usd_per_h,
        "planned_usd_per_h_at_most": choice.usd_per_h_at_most,
        "usd_per_h": _per_hour(result),
        **asdict(result.rent),
    }


def _numbers(result: Result) -> tuple[str, ...]:
    placed, rent = result.placed, result.rent
    assert placed is not None
    assert rent is not None
    return (
        str(placed.choice.replicas),
        str(sum(one.count for one in placed.kinds)),
        f"{placed.choice.usd_per_h:.2f}",
        f"{rent.spot_h:.2f}",
        f"{rent.on_demand_h:.2f}",
        f"{rent.spot_usd:.2f}",
        f"{rent.on_demand_usd:.2f}",
        f"{_per_hour(result):.2f}",
        f"{placed.choice.usd_per_h_at_most:.2f}",
        str(rent.ordered),
        str(rent.lost),
        str(rent.refused),
    )


def _per_hour(result: Result) -> float:
    assert result.rent is not None
    return result.rent.usd / (result.ended_at / 3600.0) if result.ended_at else 0.0
