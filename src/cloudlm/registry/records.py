"""The registry's own small objects and where everything lies in a store.

    manifests/<name>/<version>.json     a version; written last, so it exists only when complete
    aliases/<name>/<alias>.json         a name for a version
    files/<name>/<upload>/<path>        the bytes of one import
    uploads/<name>/<upload>.json        an import that has begun and not ended

A removed version leaves a manifest that says so, because its number is never given again.
Must not touch a store: it only forms keys and reads and writes JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloudlm.core.errors import BrokenModel, CorruptModel
from cloudlm.core.model import Manifest, ModelFile, manifest_from_body

MANIFESTS = "manifests"
ALIASES = "aliases"
FILES = "files"
UPLOADS = "uploads"
_UPLOAD = re.compile(r"[0-9a-f]{32}", re.ASCII)


def manifest_key(name: str, version: int) -> str:
    return f"{MANIFESTS}/{name}/{version}.json"


def alias_key(name: str, alias: str) -> str:
    return f"{ALIASES}/{name}/{alias}.json"


def files_prefix(name: str, upload: str) -> str:
    return f"{FILES}/{name}/{upload}/"


def upload_key(name: str, upload: str) -> str:
    return f"{UPLOADS}/{name}/{upload}.json"


def name_and_stem(key: str) -> tuple[str, str] | None:
    """``<kind>/<name>/<stem>.json`` taken apart; None for a key of another form."""
    match = re.fullmatch(r"[a-z]+/([^/]+)/([^/]+)\.json", key)
    return (match[1], match[2]) if match else None


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """What lies under a manifest key: the manifest (None once removed) and where its files are."""

    manifest: Manifest | None
    upload: str

    def encode(self) -> bytes:
        body: dict[str, Any] = {"removed": True}
        if self.manifest is not None:
            body = self.manifest.body()
        body["upload"] = self.upload
        body["digest"] = _digest(body)
        return json.dumps(body, indent=1, ensure_ascii=False).encode()


def read_stored_version(raw: bytes, key: str) -> StoredVersion:
    """Read it back. Raises CorruptModel if a bit changed, BrokenModel if a field is wrong."""
    body = _object(raw, key)
    digest = body.pop("digest", None)
    if digest != _digest(body):
        raise CorruptModel(f"{key}: the manifest differs from its own digest; restore or remove it")
    upload = str(body.get("upload"))
    if not _UPLOAD.fullmatch(upload):
        raise BrokenModel(f"{key}: 'upload' {upload[:60]!r} is not valid")
    if body.get("removed") is True:
        return StoredVersion(None, upload)
    manifest = manifest_from_body(body)
    if key != manifest_key(manifest.name, manifest.version):
        raise CorruptModel(f"{key}: holds the manifest of {manifest.ref}")
    return StoredVersion(manifest, upload)


@dataclass(frozen=True, slots=True)
class Upload:
    """An import that has begun: who does it and when it last gave a sign of life (Unix, s)."""

    owner: str
    refreshed_at: float

    def encode(self) -> bytes:
        return json.dumps({"owner": self.owner, "refreshed_at": self.refreshed_at}).encode()


def read_upload(raw: bytes) -> Upload | None:
    """None if it is not readable."""
    try:
        body = json.loads(raw)
        return Upload(str(body["owner"]), float(body["refreshed_at"]))
    except (ValueError, KeyError, TypeError):
        return None


def encode_alias(version: int, set_at: float) -> bytes:
    return json.dumps({"version": version, "set_at": set_at}).encode()


def read_alias(raw: bytes, key: str) -> int:
    """The version that an alias names. Raises CorruptModel."""
    version = _object(raw, key).get("version")
    if type(version) is not int or version < 1:
        raise CorruptModel(f"{key}: names no version; set the alias again")
    return version


def files_digest(files: tuple[ModelFile, ...]) -> str:
    """One SHA-256 for a set of files: equal if and only if paths and bytes are equal."""
    lines = sorted(f"{file.sha256} {file.size_bytes} {file.path}" for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _object(raw: bytes, key: str) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise CorruptModel(f"{key}: is not a JSON object")
    return body
