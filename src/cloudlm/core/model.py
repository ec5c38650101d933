"""Model names, versions and manifests.

A *version* is a set of bytes with a number; a *manifest* describes it; an *alias* is a name for a
version that may move. ``models:/name/3`` addresses a version, ``models:/name@champion`` an alias,
``models:/name`` the newest version.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from cloudlm.core.errors import BrokenModel, InvalidRequest

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?", re.ASCII)
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,62}", re.ASCII)
ADAPTER = "adapter"
"""The task of a version that is no model of its own, but a LoRA adapter for one."""
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
MANIFEST_FORMAT = 1


def check_name(name: str, what: str = "name") -> str:
    """Return ``name`` if it may name a model, deployment or group; raise InvalidRequest if not."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            f"{what} {name[:80]!r} is not valid: use 1 to 64 lower-case letters, digits, '.', '_' "
            "or '-', beginning and ending with a letter or digit",
            param=what,
        )
    return name


def check_alias(alias: str) -> str:
    """Return ``alias`` if it may name a version; raise InvalidRequest if not."""
    if not _ALIAS.fullmatch(alias):
        raise InvalidRequest(
            f"alias {alias[:80]!r} is not valid: use lower-case letters, digits, '_' or '-', "
            "beginning with a letter",
            param="alias",
        )
    return alias


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A parsed ``models:/`` address; at most one of ``version`` and ``alias`` is set."""

    name: str
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        if self.version is not None:
            return f"models:/{self.name}/{self.version}"
        if self.alias is not None:
            return f"models:/{self.name}@{self.alias}"
        return f"models:/{self.name}"


class AddressKind(StrEnum):
    """Where a model address points."""

    REGISTRY = "registry"
    FOLDER = "folder"
    HUB = "hub"
    OBJECT_STORE = "object_store"


def parse_ref(text: str) -> ModelRef:
    """Parse ``models:/name``, ``models:/name/3`` or ``models:/name@alias`` (also without the
    ``models:/`` prefix). Raises InvalidRequest."""
    rest = text.removeprefix("models:/")
    if "@" in rest:
        name, _, alias = rest.partition("@")
        return ModelRef(check_name(name, "model"), alias=check_alias(alias))
    name, slash, number = rest.partition("/")
    check_name(name, "model")
    if not slash:
        return ModelRef(name)
    if not re.fullmatch(r"[1-9][0-9]{0,8}", number, re.ASCII):
        raise InvalidRequest(
            f"{text[:120]!r} is not a model version: expected models:/name/3, models:/name@alias "
            "or models:/name",
            param="model",
        )
    return ModelRef(name, version=int(number))


_OBJECT_SCHEMES = ("s3://", "gs://", "az://", "oss://", "http://", "https://")


def address_kind(address: str) -> AddressKind:
    """Say where ``address`` points, by its form alone (no disk, no network).

    ``models:/…`` and bare names are the registry's; ``/…``, ``./…``, ``../…``, ``~…``, ``file://``,
    ``name/`` and ``a/b/c`` are folders; ``hf://org/name`` and bare ``org/name`` are hub ids;
    ``s3://`` and the like object stores. Raises InvalidRequest for anything else.
    """
    if address.startswith("models:/"):
        return AddressKind.REGISTRY
    if address.startswith(("/", "./", "../", "~", "file://")) or address in (".", ".."):
        return AddressKind.FOLDER
    if address.startswith(_OBJECT_SCHEMES):
        return AddressKind.OBJECT_STORE
    if address.startswith("hf://"):
        return AddressKind.HUB
    if "://" in address:
        raise InvalidRequest(
            f"{address[:120]!r} is not a model address: expected models:/name/3, a folder, "
            "org/name, hf://org/name, s3://, gs://, az://, oss:// or https://",
            param="model",
        )
    if re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}(@[\w./-]{1,96})?", address, re.ASCII):
        return AddressKind.HUB
    if address.endswith("/") or address.count("/") > 1:
        return AddressKind.FOLDER
    parse_ref(address)
    return AddressKind.REGISTRY


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a version: relative POSIX path, size in bytes, SHA-256 in lower-case hex."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that is known of a version without reading its weights.

    ``task`` is ``generate`` for decoders, ``adapter`` for a LoRA adapter. ``parameters`` counts
    weights. ``lineage`` says where the bytes came from (``source`` address, ``revision``,
    ``parent`` version, ``imported_by``) and, of an adapter, for what it was made (``base``).
    ``weights_format`` is ``safetensors`` or ``gguf``; ``quantisation`` says how the weights are
    quantised (``gptq int4``), empty if they are not.
    """

    name: str
    version: int
    files: tuple[ModelFile, ...]
    task: str
    architecture: str
    precision: str
    parameters: int
    context_length: int
    licence: str | None = None
    lineage: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    created_at: float = 0.0
    weights_format: str = "safetensors"
    quantisation: str = ""

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def ref(self) -> str:
        return f"models:/{self.name}/{self.version}"

    def body(self) -> dict[str, Any]:
        """The manifest as JSON; ``manifest_from_body`` reads it back."""
        return {
            "format": MANIFEST_FORMAT,
            "name": self.name,
            "version": self.version,
            "task": self.task,
            "architecture": self.architecture,
            "precision": self.precision,
            "weights_format": self.weights_format,
            "quantisation": self.quantisation,
            "parameters": self.parameters,
            "context_length": self.context_length,
            "licence": self.licence,
            "lineage": dict(self.lineage),
            "description": self.description,
            "created_at": self.created_at,
            "size_bytes": self.size_bytes,
            "files": [
                {"path": f.path, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in self.files
            ],
        }


def check_file_path(path: str) -> str:
    """Return ``path`` if it stays inside a version's folder; raise BrokenModel if not."""
    parts = path.split("/")
    bad = (
        not path
        or path.startswith("/")
        or "\\" in path
        or "\0" in path
        or any(part in ("", ".", "..") for part in parts)
        or len(path) > 255
    )
    if bad:
        raise BrokenModel(
            f"file path {path[:120]!r} in a manifest would leave the version's folder"
        )
    return path


def manifest_from_body(body: Any) -> Manifest:
    """Read a manifest back, checking every field. Raises BrokenModel naming the fault."""
    try:
        if body["format"] != MANIFEST_FORMAT:
            raise BrokenModel(f"manifest format {body['format']!r} is not {MANIFEST_FORMAT}")
        files = tuple(_file_from_body(entry) for entry in body["files"])
        return Manifest(
            name=check_name(str(body["name"]), "model"),
            version=int(body["version"]),
            files=files,
            task=str(body["task"]),
            architecture=str(body["architecture"]),
            precision=str(body["precision"]),
            parameters=int(body["parameters"]),
            context_length=int(body["context_length"]),
            licence=None if body.get("licence") is None else str(body["licence"]),
            lineage={str(k): str(v) for k, v in body.get("lineage", {}).items()},
            description=str(body.get("description", "")),
            created_at=float(body.get("created_at", 0.0)),
            weights_format=str(body.get("weights_format", "safetensors")),
            quantisation=str(body.get("quantisation", "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BrokenModel(
            f"the manifest is not readable: {type(error).__name__}: {error}"
        ) from None


def _file_from_body(entry: Any) -> ModelFile:
    digest = str(entry["sha256"])
    size = int(entry["size_bytes"])
    if not _DIGEST.fullmatch(digest) or size < 0:
        raise BrokenModel(
            f"the manifest's entry for {entry['path']!r} has no valid SHA-256 or size"
        )
    return ModelFile(check_file_path(str(entry["path"])), size, digest)
