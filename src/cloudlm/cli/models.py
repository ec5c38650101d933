"""``cloudlm models``: the versions in this machine's registry."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloudlm.cli import perplexity
from cloudlm.cli.connect import local_registry, open_local_state
from cloudlm.cli.options import Json
from cloudlm.cli.screen import (
    bytes_bar,
    count_text,
    print_json,
    print_table,
    print_text,
    say,
    size_text,
)
from cloudlm.core.errors import Conflict, CorruptModel, InvalidRequest, NotFound
from cloudlm.core.model import ADAPTER, Manifest, parse_ref

if TYPE_CHECKING:
    from cloudlm.registry.registry import Registry

app = typer.Typer(
    no_args_is_help=True,
    help="Model versions: list, show, pull, import, alias, unalias, rm, perplexity.",
)
perplexity.add_to(app)
Name = Annotated[str | None, typer.Option("--name", help="Name in the registry.")]
Alias = Annotated[str | None, typer.Option("--alias", help="Alias to set on the version.")]
ModelName = Annotated[str, typer.Argument(metavar="NAME", help="A model's name in the registry.")]
AliasName = Annotated[str, typer.Argument(metavar="ALIAS", help="Such as champion.")]
Ref = Annotated[str, typer.Argument(metavar="MODEL", help="models:/name/3, name@alias or name.")]


@app.command("list")
def list_models(json_output: Json = False) -> None:
    """List every version in the registry."""
    registry = local_registry()
    versions = [
        (version, aliases)
        for name in registry.list_models()
        for version, aliases in _with_aliases(registry, name)
    ]
    if json_output:
        print_json([{**version.body(), "aliases": aliases} for version, aliases in versions])
        return
    rows = [
        (
            version.name,
            version.version,
            ", ".join(aliases),
            version.architecture,
            count_text(version.parameters),
            version.precision,
            size_text(version.size_bytes),
        )
        for version, aliases in versions
    ]
    columns = ("NAME", "VERSION", "ALIASES", "ARCHITECTURE", "PARAMETERS", "PRECISION", "SIZE")
    print_table(columns, rows, "no models; 'cloudlm models import FOLDER' adds one")


def _with_aliases(registry: Registry, name: str) -> list[tuple[Manifest, list[str]]]:
    aliases = registry.list_aliases(name)
    return [
        (version, sorted(alias for alias, number in aliases.items() if number == version.version))
        for version in registry.list_versions(name)
    ]


@app.command("show")
def show(model: Ref, json_output: Json = False) -> None:
    """Show one version's manifest."""
    manifest = local_registry().resolve(parse_ref(model))
    if json_output:
        print_json(manifest.body())
        return
    facts = [
        ("version", manifest.ref),
        ("task", manifest.task),
        ("architecture", manifest.architecture),
        ("parameters", count_text(manifest.parameters)),
        ("precision", manifest.precision),
        ("format", manifest.weights_format),
        ("quantisation", manifest.quantisation or "none"),
        ("context", f"{manifest.context_length} tokens"),
        ("size", size_text(manifest.size_bytes)),
        ("licence", manifest.licence or "not stated"),
        *sorted(manifest.lineage.items()),
    ]
    print_table(("FACT", "VALUE"), facts, "")
    print_text("")
    files = [(file.path, size_text(file.size_bytes), file.sha256[:16]) for file in manifest.files]
    print_table(("FILE", "SIZE", "SHA-256"), files, "no files")


@app.command("pull")
def pull(
    source: Annotated[str, typer.Argument(help="org/name, hf://…, s3://…, gs://…, az://…")],
    name: Name = None,
    alias: Alias = None,
    json_output: Json = False,
) -> None:
    """Download a model from the hub or an object store."""
    _import(source, name, alias, json_output)


@app.command("import")
def import_model(
    source: Annotated[
        str,
        typer.Argument(help="A folder with config.json and *.safetensors, or a GGUF file."),
    ],
    name: Name = None,
    alias: Alias = None,
    json_output: Json = False,
) -> None:
    """Import a model's or adapter's folder, or a GGUF file."""
    if Path(source).expanduser().exists():  # "my-model" alone would be a registered name
        source = str(Path(source).expanduser().resolve())
    _import(source, name, alias, json_output)


def _import(source: str, name: str | None, alias: str | None, json_output: bool) -> None:
    from cloudlm.registry.importer import import_address

    with bytes_bar("importing") as progress:
        manifest = import_address(
            local_registry(), source, name=name, alias=alias, progress=progress
        )
    if json_output:
        outcome = {"already_registered": manifest.already_registered, "notes": manifest.notes}
        print_json({**manifest.body(), **outcome})
        return
    print_text(manifest.ref)
    for note in manifest.notes:
        say(note)
    if manifest.already_registered:
        say("these bytes were registered already; nothing was added")
    if manifest.task == ADAPTER:
        adapter = f"{manifest.name}={manifest.ref}"
        say(f"serve it with: cloudlm deploy BASE --name NAME --adapter {adapter}")
    else:
        say(f"deploy it with: cloudlm deploy {manifest.ref} --name {manifest.name}")


@app.command("alias")
def set_alias(
    name: ModelName,
    alias: AliasName,
    version: Annotated[
        int, typer.Argument(metavar="VERSION", min=1, help="The version's number, such as 3.")
    ],
    json_output: Json = False,
) -> None:
    """Point an alias at a version, wherever it pointed before. What runs keeps its version."""
    registry = local_registry()
    name = name.removeprefix("models:/")
    before = _version_of(registry, name, alias)
    manifest = registry.set_alias(name, alias, version)
    if json_output:
        print_json({"name": name, "alias": alias, "version": version, "before": before})
        return
    moved = "" if before in (None, version) else f"; it was version {before}"
    say(f"models:/{name}@{alias} is version {version} now{moved}")
    if before != version:
        say(
            f"what runs keeps its version; roll out with: cloudlm deploy {manifest.ref} --name NAME"
        )


def _version_of(registry: Registry, name: str, alias: str) -> int | None:
    """Where an alias points; None if nowhere, or its record is damaged: it is set anew."""
    with contextlib.suppress(CorruptModel):
        return registry.list_aliases(name).get(alias)
    return None


@app.command("unalias")
def remove_alias(name: ModelName, alias: AliasName, json_output: Json = False) -> None:
    """Remove an alias; its version stays."""
    registry = local_registry()
    name = name.removeprefix("models:/")
    registry.remove_alias(name, alias)
    address = f"models:/{name}@{alias}"
    users = asyncio.run(_deployments_naming(address))
    if json_output:
        print_json({"removed": address, "named_by": users})
        return
    say(f"removed {address}")
    if users:
        say(
            f"deployment {', '.join(users)} still names it: what runs goes on, but nothing new of "
            "it can start; deploy a version instead, or set the alias again"
        )


@app.command("rm")
def remove(model: Ref, json_output: Json = False) -> None:
    """Remove one version that no alias or deployment here uses."""
    registry = local_registry()
    manifest = registry.resolve(parse_ref(model))
    users = asyncio.run(_deployments_of(registry, manifest))
    if users:
        raise Conflict(
            f"{manifest.ref} is used by deployment {', '.join(users)}; "
            f"delete it first: cloudlm delete {users[0]}"
        )
    registry.remove(parse_ref(manifest.ref))
    if json_output:
        print_json({"removed": manifest.ref})
    else:
        say(f"removed {manifest.ref}")


async def _deployments_of(registry: Registry, manifest: Manifest) -> list[str]:
    """Deployments whose model or adapter is this version; an alias or a bare name is resolved."""
    return [
        name
        for name, addresses in (await _addresses()).items()
        if any(_runs(registry, address, manifest) for address in addresses)
    ]


async def _deployments_naming(address: str) -> list[str]:
    """Deployments whose model or adapter has exactly this address."""
    return [name for name, addresses in (await _addresses()).items() if address in addresses]


async def _addresses() -> dict[str, tuple[str, ...]]:
    """The addresses of each deployment's model and adapters, by its name, in this machine's
    state."""
    state, _ = await open_local_state()
    try:
        deployments = await state.list_deployments()
    finally:
        await state.close()
    return {one.spec.name: (one.spec.model, *one.spec.adapters.values()) for one in deployments}


def _runs(registry: Registry, model: str, manifest: Manifest) -> bool:
    """False also for a deployment whose own model is gone."""
    try:
        ref = parse_ref(model)
        return ref.name == manifest.name and registry.resolve(ref).version == manifest.version
    except (InvalidRequest, NotFound):
        return False
