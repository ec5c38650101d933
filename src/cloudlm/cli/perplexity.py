"""``cloudlm models perplexity``: what quantisation costs in quality, measured on a text."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloudlm.cli.options import Json
from cloudlm.cli.screen import print_json, print_table, say, share_bar
from cloudlm.cli.serve import default_name
from cloudlm.cli.specs import read_options
from cloudlm.core.errors import BadSetting, InvalidRequest
from cloudlm.core.model import AddressKind, address_kind
from cloudlm.state.home import Home, load_settings
from cloudlm.telemetry.logs import setup_logging

if TYPE_CHECKING:
    from cloudlm.worker.measure import Measured

BASE = "bfloat16"
_USUAL = (BASE, "int8", "int4")
_MAX_TEXT_BYTES = 16 << 20
_OWN_TEXT = Path(__file__).parent / "perplexity_text.txt"


def add_to(app: typer.Typer) -> None:
    app.command("perplexity")(perplexity)


def perplexity(
    model: Annotated[str, typer.Argument(help="A folder, models:/name/3, name, org/name…")],
    precision: Annotated[
        list[str] | None,
        typer.Option("--precision", help="Precision to measure beside bfloat16; may be repeated."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="UTF-8 text to score; else one of our own."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Engine setting.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Measure a model's perplexity per precision; lower is better. A PC's CPU takes minutes."""
    from cloudlm.worker.config import WorkerConfig
    from cloudlm.worker.measure import measure_precisions

    content = _read_text(text or _OWN_TEXT)
    wanted = tuple(dict.fromkeys((BASE, *(precision or _USUAL))))
    settings, _ = load_settings()
    setup_logging(settings.log, "perplexity")
    home = Home(settings.home).ensure()
    config = WorkerConfig(
        model=_address(model),
        served_model_name=default_name(model),
        home=home.path,
        registry_url=home.registry_url(settings),
        options=read_options(option or []),
        settings=settings,
    )
    rows: list[Measured] = []
    with contextlib.ExitStack() as while_measuring:
        tell = while_measuring.enter_context(share_bar("perplexity"))
        for row in measure_precisions(config, content, wanted, tell):
            if row.refused and (row.precision == BASE or precision):
                raise BadSetting(row.refused, param="precision")
            rows.append(row)
    _show(model, text, rows, json_output)


def _address(model: str) -> str:
    """An existing file or folder by its full path: ``model.gguf`` would be a registered name."""
    path = Path(model).expanduser()
    if address_kind(model) is AddressKind.REGISTRY and path.exists():
        return str(path.resolve())
    return model


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise InvalidRequest(f"{path} is larger than {_MAX_TEXT_BYTES} bytes", param="text")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest(f"{path} is not UTF-8 text", param="text") from None
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}", param="text") from None


def _show(model: str, text: Path | None, rows: list[Measured], json_output: bool) -> None:
    done = [row for row in rows if not row.refused]
    base = done[0].perplexity
    if json_output:
        results = [
            {
                "precision": row.precision,
                "held_in": row.held_in,
                "perplexity": row.perplexity,
                "ratio": row.perplexity / base,
                "tokens": row.tokens,
                "elapsed_s": row.elapsed_s,
            }
            for row in done
        ]
        refused = {row.precision: row.refused for row in rows if row.refused}
        source = "built in" if text is None else str(text)
        print_json({"model": model, "text": source, "results": results, "refused": refused})
        return
    columns = ("PRECISION", "HELD IN", "PERPLEXITY", f"RATIO TO {BASE.upper()}", "TOKENS", "TIME")
    cells = [
        (
            row.precision,
            row.held_in,
            f"{row.perplexity:.4f}",
            f"{row.perplexity / base:.4f}",
            row.tokens,
            f"{row.elapsed_s:.1f} s",
        )
        for row in done
    ]
    print_table(columns, cells, "nothing was measured")
    for row in rows:
        if row.refused:
            say(f"{row.precision} was left out: {row.refused}")
