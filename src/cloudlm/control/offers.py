"""Which machines of the catalogue can carry a deployment, and why the others cannot. Pure.

One offer at a time, without regard to its price or to others: ``place`` chooses among what is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from cloudlm.control.catalogue.words import GIB, Catalogue, Device, Kind, Offer, Region
from cloudlm.control.needs import Batch, Need, need_of, usable_bytes
from cloudlm.control.speed import Capacity, Speed, alone, capacity, speed_of
from cloudlm.core.figures import ModelFigures
from cloudlm.core.placement import Placement, ServiceLevel, Traffic, Users

# Light in glass covers some 100 km there and back in a millisecond; cables make detours, and the
# last mile takes its time. An estimate: what users measured (``latencies``) counts before it.
KM_PER_MS = 100.0
DETOUR = 1.5
LAST_MILE_MS = 5.0
_EARTH_RADIUS_KM = 6371.0


class Reason(StrEnum):
    """Why an offer or a plan lost."""

    PROVIDER = "provider not allowed"
    REGION = "region not allowed"
    LATENCY = "too far from the users"
    SPOT_ONLY = "sold on spot alone"
    MEMORY = "too little memory"
    UNKNOWN = "speed not known"
    SLOW = "too slow"
    ZONES = "too few zones"
    BUDGET = "over budget"


@dataclass(frozen=True, slots=True)
class Lost:
    """What cannot be had, by name, and why."""

    name: str
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Machine:
    """An offer as replicas use it: ``replicas`` on ``pieces`` devices each, with ``sequences`` at
    once at most. ``requests_per_s`` is what it is planned with, its headroom left."""

    offer: Offer
    pieces: int
    replicas: int
    sequences: int
    requests_per_s: float
    at_limit: Capacity
    network_ms: float
    estimated: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """A deployment's wishes with the traffic and the figures that they are judged by."""

    figures: ModelFigures
    placement: Placement
    traffic: Traffic
    batch: Batch
    min_replicas: int = 0

    @property
    def need(self) -> Need:
        return need_of(self.figures, self.placement, self.traffic, self.batch)


def judge(offer: Offer, catalogue: Catalogue, asked: Asked) -> Machine | Lost:
    """The offer as a machine that keeps the service level, or why it does not."""
    wishes = asked.placement
    region = catalogue.regions.get(offer.place)
    lost = _forbidden(offer, wishes) or _elsewhere(offer, region, wishes)
    if lost is None and offer.on_demand is None:
        lost = Lost(offer.key, Reason.SPOT_ONLY, "no price on demand: nothing would back it")
    if lost is not None:
        return lost
    network_ms = _network_ms(offer, region, wishes)
    if wishes.max_latency_ms and network_ms is None:
        return Lost(offer.key, Reason.LATENCY, f"where {offer.place} lies is not known")
    if wishes.max_latency_ms and network_ms is not None and network_ms > wishes.max_latency_ms:
        detail = f"{network_ms:.0f} ms there and back; {wishes.max_latency_ms:g} ms asked"
        return Lost(offer.key, Reason.LATENCY, detail)
    return _quickest(offer, catalogue.devices[offer.device], asked, network_ms or 0.0)


def in_area(offer: Offer, region: Region | None, wanted: str) -> bool:
    """Whether an offer is in an area (``eu``), a region, or a provider's region."""
    wanted = wanted.lower()
    if wanted in (offer.region.lower(), offer.place.lower()):
        return True
    area = "" if region is None else region.area.lower()
    return area == wanted or area.startswith(f"{wanted}/")


def distance_km(region: Region, one: Users) -> float | None:
    """Along the great circle (haversine); None if the region's place is not known."""
    if region.latitude is None or region.longitude is None:
        return None
    here, there = math.radians(region.latitude), math.radians(one.latitude)
    across = math.radians(one.longitude - region.longitude)
    half = math.sin((there - here) / 2) ** 2
    half += math.cos(here) * math.cos(there) * math.sin(across / 2) ** 2
    return 2 * _EARTH_RADIUS_KM * math.asin(math.sqrt(min(1.0, half)))


def _forbidden(offer: Offer, wishes: Placement) -> Lost | None:
    if wishes.providers and offer.provider not in wishes.providers:
        return Lost(offer.key, Reason.PROVIDER, f"allowed: {', '.join(wishes.providers)}")
    if offer.provider in wishes.forbidden_providers:
        return Lost(offer.key, Reason.PROVIDER, f"{offer.provider} is forbidden")
    return None


def _elsewhere(offer: Offer, region: Region | None, wishes: Placement) -> Lost | None:
    if not wishes.regions or any(in_area(offer, region, one) for one in wishes.regions):
        return None
    detail = (
        f"{offer.place} is in {region.area}" if region else f"{offer.place} is in no known area"
    )
    return Lost(offer.key, Reason.REGION, f"{detail}; allowed: {', '.join(wishes.regions)}")


def _network_ms(offer: Offer, region: Region | None, wishes: Placement) -> float | None:
    """There and back as measured, else the mean over users by distance; None if not known."""
    users = wishes.users
    for measured in wishes.latencies:
        if in_area(offer, region, measured.region):
            return measured.ms
    if not users or region is None:
        return None
    total = 0.0
    for one in users:
        km = distance_km(region, one)
        if km is None:
            return None
        total += one.share * (km / KM_PER_MS * DETOUR + LAST_MILE_MS)
    return total / sum(one.share for one in users)


def _quickest(offer: Offer, device: Device, asked: Asked, network_ms: float) -> Machine | Lost:
    """The way to cut the machine into replicas that bears the most requests."""
    losses: list[Lost] = []
    best: Machine | None = None
    for pieces in _cuts(offer, device):
        found = _cut(offer, device, pieces, asked, network_ms)
        if isinstance(found, Lost):
            losses.append(found)
        elif best is None or found.requests_per_s > best.requests_per_s:
            best = found
    if best is not None:
        return best
    order = list(Reason)  # the cut that came furthest says best what is wrong
    return max(reversed(losses), key=lambda lost: order.index(lost.reason))


def _cuts(offer: Offer, device: Device) -> Iterator[int]:
    """How many devices a replica may have: powers of two, as heads are shared out; all of a
    machine's processors, since they share its memory."""
    if device.kind is Kind.CPU:
        yield offer.count
        return
    pieces = 1
    while pieces <= offer.count:
        yield pieces
        pieces *= 2


def _cut(
    offer: Offer, device: Device, pieces: int, asked: Asked, network_ms: float
) -> Machine | Lost:
    need, level = asked.need, asked.placement.level
    memory = usable_bytes(offer, device, pieces)
    fits = need.sequences_in(memory, device.kind, pieces)
    if fits < need.least:
        wanted = need.bytes_for(need.least, device.kind, pieces) / GIB
        detail = f"{wanted:.1f} GiB needed on {pieces} x {device.name}; {memory / GIB:.1f} usable"
        return Lost(offer.key, Reason.MEMORY, detail)
    speed = speed_of(asked.figures, device, pieces, asked.traffic, asked.placement.measured)
    if speed is None:
        detail = f"bandwidth or compute of {device.name} is not in the catalogue"
        return Lost(offer.key, Reason.UNKNOWN, detail)
    sequences = max(need.least, min(fits, asked.batch.sequences))
    at_limit = capacity(speed, asked.traffic, level, sequences, network_ms)
    if at_limit is None:
        return Lost(offer.key, Reason.SLOW, _how_slow(speed, pieces, asked, network_ms))
    replicas = offer.count // pieces
    rate = at_limit.requests_per_s * replicas * level.headroom
    return Machine(offer, pieces, replicas, sequences, rate, at_limit, network_ms, speed.estimated)


def _how_slow(speed: Speed, pieces: int, asked: Asked, network_ms: float) -> str:
    level: ServiceLevel = asked.placement.level
    found = alone(speed, asked.traffic, network_ms)
    parts = []
    if level.ttft_ms and found.ttft_ms > level.ttft_ms:
        parts.append(f"first token after {found.ttft_ms:.0f} ms, {level.ttft_ms:g} asked")
    if level.tpot_ms and found.tpot_ms > level.tpot_ms:
        parts.append(f"{found.tpot_ms:.1f} ms between tokens, {level.tpot_ms:g} asked")
    return f"one request alone on {pieces} of it: {'; '.join(parts)}"
