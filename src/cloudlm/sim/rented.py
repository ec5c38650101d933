"""A machine that is rented, and what renting has cost. Must not decide when one is."""

from __future__ import annotations

from dataclasses import dataclass

from cloudlm.sim.placing import Kind, zone_name


@dataclass(slots=True)
class Slot:
    """The place of one replica: at ``loaded_at`` the ``model`` is loaded there."""

    loaded_at: float
    model: str
    unit: str = ""


class Rented:
    """One machine. ``ready`` once it has loaded, ``warned`` once its provider said that it will be
    taken away, ``leaving`` once it is to be given back."""

    __slots__ = (
        "began_at",
        "billed_from",
        "gone",
        "kind",
        "leaving",
        "on_spot",
        "price",
        "ready",
        "slots",
        "warned",
        "zone",
    )

    def __init__(self, kind: Kind, zone: str, slots: list[Slot], now: float, *, on_spot: bool):
        self.kind = kind
        self.zone = zone
        self.slots = slots
        self.on_spot = on_spot
        self.price = kind.offer.spot[zone] if on_spot else kind.on_demand
        self.began_at = self.billed_from = now
        self.ready = self.warned = self.leaving = self.gone = False

    @property
    def place(self) -> str:
        """Its zone, as a scenario names it."""
        return zone_name(self.kind.offer, self.zone)

    @property
    def units(self) -> list[str]:
        """The replicas that are there."""
        return [slot.unit for slot in self.slots if slot.unit]


@dataclass(slots=True)
class Rent:
    """What was rented until now: hours and dollars on spot and on demand, machines ordered, those
    on spot that were taken away, and orders that were refused."""

    spot_h: float = 0.0
    on_demand_h: float = 0.0
    spot_usd: float = 0.0
    on_demand_usd: float = 0.0
    ordered: int = 0
    lost: int = 0
    refused: int = 0

    @property
    def usd(self) -> float:
        return self.spot_usd + self.on_demand_usd
