"""Reads the catalogue: from a folder that the user names, from the home folder where ``cloudlm
catalogue import`` put newer offers, or as it was shipped. What a folder lacks is taken from the
shipped one. Must not judge an offer.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from cloudlm.control.catalogue.words import (
    OFFER_COLUMNS,
    Catalogue,
    Offer,
    offer_cells,
    read_devices,
    read_offers,
    read_regions,
)
from cloudlm.core.errors import InvalidRequest, NotFound

DEVICES = "devices.csv"
OFFERS = "offers.csv"
REGIONS = "regions.csv"


def shipped() -> Path:
    """The folder that came with the package."""
    return Path(str(files("cloudlm.control.catalogue")))


def home_folder(home: Path) -> Path:
    """Where an installation keeps offers of its own."""
    return home / "catalogue"


def load_catalogue(folder: Path | None = None) -> Catalogue:
    """The catalogue of ``folder``, of the shipped rows if None. Raises NotFound (no such folder)
    and InvalidRequest naming file, line and fault."""
    if folder is not None and not folder.is_dir():
        raise NotFound(
            f"{folder} is no folder; a catalogue is a folder with {OFFERS} and, if they differ "
            f"from the shipped ones, {DEVICES} and {REGIONS}"
        )
    devices = read_devices(*_text(folder, DEVICES))
    return Catalogue(
        devices=devices,
        offers=read_offers(*_text(folder, OFFERS), devices),
        regions=read_regions(*_text(folder, REGIONS)),
    )


def write_offers(offers: Iterable[Offer], folder: Path) -> Path:
    """Write offers so that ``load_catalogue(folder)`` finds them; appears whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(OFFER_COLUMNS)
    writer.writerows(offer_cells(offer) for offer in offers)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / OFFERS
    draft = path.with_suffix(".draft")
    draft.write_text(text.getvalue(), "utf-8")
    draft.replace(path)
    return path


def _text(folder: Path | None, name: str) -> tuple[str, str]:
    """A file's text and the name that its faults go by."""
    path = shipped() / name
    if folder is not None and (folder / name).exists():
        path = folder / name
    try:
        return path.read_text("utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from None
