"""The catalogue's rows and how they are read from CSV texts, checked row by row. Pure.

A row says where its figure was read (``source``, with the date ``read_on``), and what it does not
know it leaves empty: a missing figure is never guessed here. ``files`` does the reading.
"""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from cloudlm.core.errors import InvalidRequest

DEVICE_COLUMNS = (
    "device",
    "kind",
    "memory_gib",
    "bandwidth_gb_per_s",
    "tflops",
    "figures",
    "source",
    "read_on",
    "note",
)
OFFER_COLUMNS = (
    "provider",
    "instance",
    "device",
    "count",
    "vcpus",
    "ram_gib",
    "region",
    "on_demand_usd_per_h",
    "spot_usd_per_h",
    "source",
    "as_of",
    "read_on",
    "note",
)
REGION_COLUMNS = ("provider", "region", "area", "latitude", "longitude", "source", "read_on")
GIB = 2**30
E = TypeVar("E", bound=StrEnum)


class Kind(StrEnum):
    """A CPU's pieces share the machine's memory; a GPU has its own."""

    GPU = "gpu"
    CPU = "cpu"


class FiguresOf(StrEnum):
    """A vendor's peak, which nobody reaches, or what was measured."""

    PEAK = "peak"
    MEASURED = "measured"


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or one processor of a CPU. ``bandwidth_gb_per_s`` is of its memory (10^9 bytes),
    ``tflops`` dense at 16 bits; 0 where the source does not say. ``memory_gib`` is 0 for CPUs."""

    name: str
    kind: Kind
    memory_gib: float
    bandwidth_gb_per_s: float
    tflops: float
    figures: FiguresOf = FiguresOf.PEAK
    source: str = ""
    read_on: str = ""


@dataclass(frozen=True, slots=True)
class Offer:
    """A machine for rent in a region: ``count`` devices, dollars per hour. ``on_demand`` is None
    where it is sold on spot alone; ``spot`` has a price per zone (the region itself, where zones
    are not told apart), none where there is no spot or no price was found."""

    provider: str
    instance: str
    device: str
    count: int
    region: str
    on_demand: float | None
    spot: Mapping[str, float] = field(default_factory=dict)
    ram_gib: float = 0.0
    vcpus: int = 0
    source: str = ""
    as_of: str = ""
    read_on: str = ""
    note: str = ""

    @property
    def place(self) -> str:
        return f"{self.provider}/{self.region}"

    @property
    def key(self) -> str:
        return f"{self.place}/{self.instance}"

    @property
    def zones(self) -> tuple[str, ...]:
        """Names of the zones that are known; the region itself counts as one."""
        return tuple(sorted(self.spot)) or (self.region,)


@dataclass(frozen=True, slots=True)
class Region:
    """Where a region is: an area such as ``eu/de``, and degrees if known."""

    provider: str
    name: str
    area: str
    latitude: float | None = None
    longitude: float | None = None


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Devices by name, offers, and regions by place (``aws/eu-central-1``)."""

    devices: Mapping[str, Device]
    offers: tuple[Offer, ...]
    regions: Mapping[str, Region]


def read_devices(text: str, name: str) -> dict[str, Device]:
    """Devices by name. Raises InvalidRequest naming file, line and fault."""
    found: dict[str, Device] = {}
    for row in _rows(text, name, DEVICE_COLUMNS):
        kind = row.choice("kind", Kind)
        device = Device(
            name=row.text("device"),
            kind=kind,
            memory_gib=row.number("memory_gib", 0.0 if kind is Kind.CPU else None),
            bandwidth_gb_per_s=row.number("bandwidth_gb_per_s", 0.0),
            tflops=row.number("tflops", 0.0),
            figures=row.choice("figures", FiguresOf),
            source=row.text("source"),
            read_on=row.date("read_on"),
        )
        if device.name in found:
            raise row.fault("device", f"{device.name} is named twice")
        found[device.name] = device
    return found


def read_offers(text: str, name: str, devices: Mapping[str, Device]) -> tuple[Offer, ...]:
    """Offers of known devices. Raises InvalidRequest naming file, line and fault."""
    found: dict[str, Offer] = {}
    for row in _rows(text, name, OFFER_COLUMNS):
        offer = _offer(row)
        device = devices.get(offer.device)
        if device is None:
            raise row.fault("device", f"{offer.device} is not in devices.csv")
        if device.kind is Kind.CPU and not offer.ram_gib:
            raise row.fault("ram_gib", "a machine without GPUs needs its memory")
        if offer.key in found:
            raise row.fault("instance", f"{offer.key} is offered twice")
        found[offer.key] = offer
    return tuple(found.values())


def read_regions(text: str, name: str) -> dict[str, Region]:
    """Regions by place. Raises InvalidRequest naming file, line and fault."""
    found = {}
    for row in _rows(text, name, REGION_COLUMNS):
        known = bool(row.given("latitude"))
        region = Region(
            row.text("provider"),
            row.text("region"),
            row.text("area"),
            row.number("latitude", low=-90.0, high=90.0) if known else None,
            row.number("longitude", low=-180.0, high=180.0) if known else None,
        )
        found[f"{region.provider}/{region.name}"] = region
    return found


def offer_cells(offer: Offer) -> tuple[str, ...]:
    """An offer as a row of CSV; ``read_offers`` reads it back."""
    zones = " ".join(f"{zone}={price:.12g}" for zone, price in sorted(offer.spot.items()))
    return (
        offer.provider,
        offer.instance,
        offer.device,
        str(offer.count),
        str(offer.vcpus or ""),
        f"{offer.ram_gib:.12g}" if offer.ram_gib else "",
        offer.region,
        "" if offer.on_demand is None else f"{offer.on_demand:.12g}",
        f"{offer.spot[offer.region]:.12g}" if list(offer.spot) == [offer.region] else zones,
        offer.source,
        offer.as_of,
        offer.read_on,
        offer.note,
    )


def _offer(row: _Row) -> Offer:
    region = row.text("region")
    price = row.number("on_demand_usd_per_h") if row.given("on_demand_usd_per_h") else None
    spot = _spot(row, region)
    if price is None and not spot:
        raise row.fault("on_demand_usd_per_h", "neither this nor a spot price is given")
    return Offer(
        provider=row.text("provider"),
        instance=row.text("instance"),
        device=row.text("device"),
        count=int(row.number("count", low=1.0)),
        region=region,
        on_demand=price,
        spot=spot,
        ram_gib=row.number("ram_gib", 0.0),
        vcpus=int(row.number("vcpus", 0.0)),
        source=row.text("source"),
        as_of=row.date("as_of") if row.given("as_of") else "",
        read_on=row.date("read_on"),
        note=row.given("note"),
    )


def _spot(row: _Row, region: str) -> dict[str, float]:
    """One price for the region, or ``zone=price`` for each zone."""
    text = row.given("spot_usd_per_h")
    if "=" not in text:
        return {region: row.number("spot_usd_per_h")} if text else {}
    found = {}
    for part in text.split():
        zone, _, price = part.partition("=")
        found[zone] = row.parsed("spot_usd_per_h", price)
    return found


class _Row:
    """One line of a file, whose faults name file, line and column."""

    def __init__(self, cells: Mapping[str, str], name: str, line: int) -> None:
        self._cells = cells
        self._where = f"{name}, line {line}"

    def given(self, column: str) -> str:
        return (self._cells.get(column) or "").strip()

    def text(self, column: str) -> str:
        if not self.given(column):
            raise self.fault(column, "is empty")
        return self.given(column)

    def number(
        self, column: str, default: float | None = None, *, low: float = 0.0, high: float = 1e9
    ) -> float:
        if not self.given(column) and default is not None:
            return default
        return self.parsed(column, self.text(column), low, high)

    def parsed(self, column: str, text: str, low: float = 0.0, high: float = 1e9) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise self.fault(column, f"{text[:40]!r} is no number from {low:g} to {high:g}")
        return value

    def date(self, column: str) -> str:
        text = self.text(column)
        try:
            return datetime.date.fromisoformat(text).isoformat()
        except ValueError:
            raise self.fault(column, f"{text[:40]!r} is no date such as 2026-11-22") from None

    def choice(self, column: str, kind: type[E]) -> E:
        try:
            return kind(self.text(column))
        except ValueError:
            offered = ", ".join(member.value for member in kind)
            raise self.fault(column, f"must be one of {offered}") from None

    def fault(self, column: str, what: str) -> InvalidRequest:
        return InvalidRequest(f"{self._where}: {column}: {what}", param=column)


def _rows(text: str, name: str, columns: tuple[str, ...]) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(text))
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise InvalidRequest(
            f"{name}: the first line has no column {', '.join(missing)}; it must name "
            + ", ".join(columns)
        )
    for cells in reader:
        yield _Row(cells, name, reader.line_num)
