"""Reads the price lists that the SkyPilot project publishes (``catalogs/v…/aws/vms.csv``) into
offers: the way to newer prices, with or without a network.

Format: one line per instance type and zone, with ``InstanceType``, ``AcceleratorName``,
``AcceleratorCount``, ``vCPUs``, ``MemoryGiB``, ``Price``, ``SpotPrice``, ``Region`` and, where the
provider has them, ``AvailabilityZone``. Lines without an accelerator, or with one that
``devices.csv`` does not know, are passed over and counted. Google's list prices machines and
accelerators apart, so none of its lines is an offer.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from dataclasses import dataclass, replace

from cloudlm.control.catalogue.words import Offer
from cloudlm.core.errors import InvalidRequest

NEEDED = ("InstanceType", "AcceleratorName", "AcceleratorCount", "Price", "Region")
# The lists name families where boards differ: those of most providers, and Azure's own.
_DEVICES = {
    "A10": "A10",
    "A100": "A100-40GB-SXM",
    "A100-80GB": "A100-80GB-SXM",
    "A10G": "A10G",
    "A6000": "RTX-A6000",
    "B200": "B200-SXM",
    "B300": "B300-SXM",
    "H100": "H100-SXM",
    "H200": "H200-SXM",
    "L4": "L4",
    "L40S": "L40S",
    "T4": "T4",
}
_AZURE_CARDS = {"A100-80GB": "A100-80GB-PCIe", "H100": "H100-NVL"}


@dataclass(frozen=True, slots=True)
class Published:
    """Offers of a list, and how many of its lines were passed over."""

    offers: tuple[Offer, ...]
    passed_over: int


def is_published(text: str) -> bool:
    """Whether this looks like such a list."""
    head = text.split("\n", 1)[0].strip().split(",")
    return all(name in head for name in NEEDED)


def read_published(
    text: str, provider: str, devices: Collection[str], *, source: str, read_on: str
) -> Published:
    """The offers of a list. Raises InvalidRequest if it is none, or a number cannot be read."""
    if not is_published(text):
        raise InvalidRequest(
            "this is no list in SkyPilot's form: its first line must name " + ", ".join(NEEDED)
        )
    found: dict[str, Offer] = {}
    passed_over = 0
    reader = csv.DictReader(io.StringIO(text))
    for line in reader:
        device = _device(provider, line)
        price, spot = _number(line, "Price", reader), _number(line, "SpotPrice", reader)
        count = _number(line, "AcceleratorCount", reader) or 0.0
        whole = count >= 1 and count == int(count)
        if device not in devices or not whole or (price is None and spot is None):
            passed_over += 1
            continue
        offer = Offer(
            provider=provider,
            instance=line["InstanceType"],
            device=device,
            count=int(count),
            region=line["Region"] or "any",
            on_demand=price,
            ram_gib=_number(line, "MemoryGiB", reader) or 0.0,
            vcpus=int(_number(line, "vCPUs", reader) or 0),
            source=source,
            read_on=read_on,
        )
        known = found.get(offer.key, offer)
        zone = line.get("AvailabilityZone") or offer.region
        prices = {**known.spot, **({zone: spot} if spot is not None else {})}
        found[offer.key] = replace(known, spot=prices)
    return Published(tuple(found.values()), passed_over)


def _device(provider: str, line: dict[str, str]) -> str:
    name = line["AcceleratorName"]
    card = provider == "azure" and line["InstanceType"].startswith("Standard_NC")
    return _AZURE_CARDS.get(name, "") if card and name in _AZURE_CARDS else _DEVICES.get(name, "")


def _number(line: dict[str, str], column: str, reader: csv.DictReader[str]) -> float | None:
    text = (line.get(column) or "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise InvalidRequest(f"line {reader.line_num}: {column} is {text[:40]!r}, not a number")
    return value
