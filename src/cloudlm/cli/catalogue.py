"""``cloudlm catalogue``: the offers that ``cloudlm plan`` chooses among; list, check, import.

Which rows count: those of ``--catalogue``, else those that ``import`` put into home, else the
shipped ones.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloudlm.cli.options import Json
from cloudlm.cli.screen import print_json, print_table, print_text, say
from cloudlm.core.errors import InvalidRequest, StorageFailed
from cloudlm.state.home import Home, load_settings

if TYPE_CHECKING:
    from cloudlm.control.catalogue.words import Catalogue, Offer

app = typer.Typer(no_args_is_help=True, help="Offers of machines for plans: list, check, import.")
Folder = Annotated[
    Path | None,
    typer.Option("--catalogue", help="A folder with offers.csv; home's, else the shipped one."),
]
_STALE_DAYS = 90


def chosen_catalogue(folder: Path | None) -> Catalogue:
    """The catalogue that counts here."""
    from cloudlm.control.catalogue.files import load_catalogue

    return load_catalogue(_chosen(folder))


@app.command("list")
def list_offers(
    provider: Annotated[str | None, typer.Option("--provider", help="Only of this one.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Only with this one.")] = None,
    catalogue: Folder = None,
    json_output: Json = False,
) -> None:
    """Show offers with their devices, regions, prices and dates."""
    found = [
        offer
        for offer in chosen_catalogue(catalogue).offers
        if provider in (None, offer.provider) and device in (None, offer.device)
    ]
    if json_output:
        from dataclasses import asdict

        print_json([asdict(offer) for offer in found])
        return
    columns = ("MACHINE", "DEVICES", "USD/H", "SPOT FROM", "PRICE OF", "SOURCE")
    numbers = {source: n for n, source in enumerate(dict.fromkeys(o.source for o in found), 1)}
    rows = [_row(offer, numbers[offer.source]) for offer in found]
    print_table(columns, rows, "no such offer", whole={"MACHINE", "PRICE OF"})
    if found:
        print_text("")
        for source, number in numbers.items():
            print_text(f"[{number}] {source}")


@app.command("check")
def check(catalogue: Folder = None, json_output: Json = False) -> None:
    """Read every row and say what is missing or old."""
    market = chosen_catalogue(catalogue)
    today = datetime.datetime.now(tz=datetime.UTC).date()
    old = [offer for offer in market.offers if _days(offer, today) > _STALE_DAYS]
    unknown = sorted(
        name for name, one in market.devices.items() if not (one.tflops and one.bandwidth_gb_per_s)
    )
    nowhere = sorted({offer.place for offer in market.offers} - set(market.regions))
    found: dict[str, Any] = {
        "offers": len(market.offers),
        "devices": len(market.devices),
        "providers": sorted({offer.provider for offer in market.offers}),
        "with_spot": sum(bool(offer.spot) for offer in market.offers),
        "older_than_days": {"days": _STALE_DAYS, "offers": [offer.key for offer in old]},
        "devices_without_speed": unknown,
        "places_not_known": nowhere,
    }
    if json_output:
        print_json(found)
        return
    rows = [
        ("offers", found["offers"]),
        ("devices", found["devices"]),
        ("providers", ", ".join(found["providers"])),
        ("offers with spot", found["with_spot"]),
        (f"offers older than {_STALE_DAYS} days", len(old)),
        ("devices without speed", ", ".join(unknown) or "none"),
        ("places not known", ", ".join(nowhere) or "none"),
    ]
    print_table(("WHAT", "FOUND"), rows, "")


@app.command("import")
def import_offers(
    file: Annotated[Path, typer.Argument(help="offers.csv's form, or SkyPilot's vms.csv.")],
    provider: Annotated[
        str | None, typer.Option("--provider", help="Whose prices: needed for SkyPilot's form.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="Where the file is from; its name if not given.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Take a provider's offers from a file, in place of its old ones."""
    from cloudlm.control.catalogue.files import home_folder, load_catalogue, write_offers

    settings, _ = load_settings()
    home = Home(settings.home).ensure()
    market = load_catalogue(_chosen(None))
    offers, passed_over = _read(file, provider, source, market)
    replaced = {offer.provider for offer in offers}
    kept = [offer for offer in market.offers if offer.provider not in replaced]
    try:
        path = write_offers([*kept, *offers], home_folder(home.path))
    except OSError as error:
        raise StorageFailed(f"the catalogue could not be written: {error}") from None
    if json_output:
        print_json({"offers": len(offers), "passed_over": passed_over, "file": str(path)})
        return
    say(
        f"{len(offers)} offers of {', '.join(sorted(replaced))} in {path}; "
        f"{passed_over} lines passed over (no known device)"
    )


def _read(
    file: Path, provider: str | None, source: str | None, market: Catalogue
) -> tuple[tuple[Offer, ...], int]:
    """The offers in a file of either form. Raises InvalidRequest naming file and fault."""
    from cloudlm.control.catalogue.skypilot import is_published, read_published
    from cloudlm.control.catalogue.words import read_offers

    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read {file}: {error}") from None
    if not is_published(text):
        return _some(read_offers(text, str(file), market.devices), file), 0
    if not provider:
        raise InvalidRequest(
            f"{file} is in SkyPilot's form, which does not name its provider; add --provider aws",
            param="provider",
        )
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    try:
        found = read_published(
            text, provider, market.devices, source=source or file.name, read_on=today
        )
    except InvalidRequest as error:
        raise InvalidRequest(f"{file}: {error.message}") from None
    return _some(found.offers, file), found.passed_over


def _some(offers: tuple[Offer, ...], file: Path) -> tuple[Offer, ...]:
    if not offers:
        raise InvalidRequest(f"{file} holds no offer of a known device; nothing was changed")
    return offers


def _chosen(folder: Path | None) -> Path | None:
    from cloudlm.control.catalogue.files import OFFERS, home_folder

    if folder is not None:
        return folder
    settings, _ = load_settings()
    own = home_folder(Home(settings.home).path)
    return own if (own / OFFERS).exists() else None


def _days(offer: Offer, today: datetime.date) -> int:
    return (today - datetime.date.fromisoformat(offer.as_of or offer.read_on)).days


def _row(offer: Offer, source: int) -> tuple[Any, ...]:
    return (
        offer.key,
        f"{offer.count} x {offer.device}",
        "-" if offer.on_demand is None else f"{offer.on_demand:.2f}",
        f"{min(offer.spot.values()):.2f}" if offer.spot else "-",
        offer.as_of or offer.read_on,
        f"[{source}]",
    )
