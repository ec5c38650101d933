"""Registers a model from anywhere: a folder, the hub, an object store.

Whatever comes over a network is first brought into a local folder and checked there like any
other folder. Must not publish anything itself: that is the registry's.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cloudlm.core.errors import (
    BrokenModel,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    NotSupported,
    Unavailable,
)
from cloudlm.core.model import AddressKind, address_kind, check_file_path, check_name
from cloudlm.registry.gguf.folder import companions, write_model_folder
from cloudlm.registry.hub import Download, fetch_from_hub, parse_hub_address
from cloudlm.registry.inspect import judged_files
from cloudlm.registry.model_json import MAX_LARGE_JSON_BYTES, read_object
from cloudlm.registry.opening import open_store
from cloudlm.registry.policy import Verdict, judge
from cloudlm.registry.publish import ImportedManifest
from cloudlm.registry.registry import Registry
from cloudlm.registry.stores.base import Store
from cloudlm.registry.stores.failures import storage_failures
from cloudlm.registry.stores.file import folder_of
from cloudlm.registry.verify import Progress

_CHUNK_BYTES = 4 << 20
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_USUAL_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "special_tokens_map.json", "chat_template.jinja", "README.md", "LICENSE",
    "model.safetensors", _INDEX, _ADAPTER, "adapter_model.safetensors",
)  # fmt: skip


def import_address(
    registry: Registry,
    address: str,
    name: str | None = None,
    *,
    alias: str | None = None,
    licence: str | None = None,
    imported_by: str | None = None,
    progress: Progress | None = None,
    download: Download | None = None,
) -> ImportedManifest:
    """Register the model at ``address`` as the next version of ``name``.

    ``address``: a folder, ``hf://org/name[@revision]`` or ``org/name``, ``s3://``, ``gs://``,
    ``az://``, ``oss://`` or ``https://`` with a prefix; a GGUF file, a folder with one, or
    ``hf://org/name/file.gguf``. ``name`` is derived from the address if
    None. ``download`` replaces the hub library's ``snapshot_download``. Raises InvalidRequest for
    an address that is no source, and what ``Registry.import_folder`` and the hub raise.
    """
    kind = address_kind(address)
    if kind is AddressKind.REGISTRY:
        raise InvalidRequest(
            f"{address[:120]!r} is a registered model already; to import, give a folder "
            "(./name), org/name, hf://, s3://, gs://, az://, oss:// or https://",
            param="model",
        )
    name = check_name(name, "name") if name is not None else name_from_address(address)
    lineage = {"source": address}
    if imported_by:
        lineage["imported_by"] = imported_by
    with ExitStack() as while_importing:
        if kind is AddressKind.FOLDER:
            found = folder_of(address)
            lineage["source"] = found.as_uri()
        elif kind is AddressKind.HUB:
            hub = parse_hub_address(address)
            snapshot = fetch_from_hub(hub, progress, download)
            found = snapshot.folder if hub.file is None else snapshot.folder / hub.file
            lineage["source"] = str(hub)
            if snapshot.commit:
                lineage["revision"] = snapshot.commit
        else:
            downloaded = _downloaded(registry.cache_dir, address, progress)
            found = while_importing.enter_context(downloaded)
        gguf = find_gguf(found)
        if gguf is not None:
            incoming = _incoming_folder(registry.cache_dir / "incoming")
            found = while_importing.enter_context(incoming)
            stated = write_model_folder(gguf.source, found, gguf.beside, gguf.source.name)
            licence = licence or stated
        return registry.import_folder(
            found, name, alias=alias, lineage=lineage, licence=licence, progress=progress
        )


@dataclass(frozen=True, slots=True)
class FoundGguf:
    """A GGUF file that has to be made a model folder, and the texts that belong to it."""

    source: Path
    beside: Mapping[str, Path]


def find_gguf(path: Path) -> FoundGguf | None:
    """The GGUF file at ``path`` or in that folder, None for a folder of another kind (which may be
    none at all). Raises BrokenModel if there are several."""
    if path.suffix.lower() == ".gguf" and path.is_file():
        return FoundGguf(path, {})
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = judged_files(path)
    weights = files[Verdict.WEIGHTS]
    ggufs = [file for file in weights if file.path.lower().endswith(".gguf")]
    if not ggufs or len(ggufs) < len(weights):
        return None
    if len(ggufs) > 1:
        names = ", ".join(sorted(file.path for file in ggufs)[:8])
        raise BrokenModel(f"{path} holds {len(ggufs)} GGUF files ({names}); import one by its path")
    texts = {file.path: file.source for file in files[Verdict.TAKE]}
    return FoundGguf(ggufs[0].source, {name: texts[name] for name in companions(list(texts))})


def name_from_address(address: str) -> str:
    """A model name from the last part of an address. Raises InvalidRequest if there is none."""
    if address_kind(address) is AddressKind.HUB:
        hub = parse_hub_address(address)
        last = hub.file or hub.repo
    elif address_kind(address) is AddressKind.FOLDER:
        last = str(folder_of(address))
    else:
        last = address.partition("://")[2].partition("?")[0]
    last = last.rstrip("/").rpartition("/")[2].lower().removesuffix(".gguf")
    candidate = re.sub(r"[^a-z0-9._-]+", "-", last)
    candidate = re.sub(r"\.{2,}", ".", candidate)[:64].strip("._-")
    if not candidate:
        raise InvalidRequest(
            f"no model name can be derived from {address[:120]!r}; give one (--name)", param="name"
        )
    return check_name(candidate, "name")


@contextmanager
def _downloaded(cache_dir: Path, address: str, progress: Progress | None) -> Iterator[Path]:
    """A temporary folder with what lies under an object store's prefix."""
    store = open_store(address)
    with _incoming_folder(cache_dir / "incoming") as folder:
        _download_all(store, address, folder, progress)
        try:
            yield folder
        except BrokenModel as error:  # of a folder that nobody knows and that is gone by then
            message = error.message.replace(str(folder), address.rstrip("/"))
            raise type(error)(message, param=error.param) from error


@contextmanager
def _incoming_folder(incoming: Path) -> Iterator[Path]:
    """A new folder that is locked while it is used: the kernel's lock vanishes with its process,
    so the next download knows what a killed one left behind, and removes it."""
    with storage_failures(incoming, "write"):
        incoming.mkdir(parents=True, exist_ok=True)
        with _locked(incoming, wait=True):
            for left in incoming.iterdir():
                _remove_if_abandoned(left)
            folder = Path(tempfile.mkdtemp(dir=incoming))
            lock = _lock(folder, wait=False)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_if_abandoned(folder: Path) -> None:
    with suppress(OSError), _locked(folder, wait=False):  # locked: another download's
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[None]:
    lock = _lock(folder, wait=wait)
    try:
        yield
    finally:
        os.close(lock)


def _lock(folder: Path, *, wait: bool) -> int:
    """A descriptor of ``folder`` that holds its lock. Raises BlockingIOError if ``wait`` is false
    and somebody else holds it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _download_all(store: Store, address: str, folder: Path, progress: Progress | None) -> None:
    try:
        keys = list(store.list(""))
    except (NotSupported, Unavailable):
        if not address.startswith(("http://", "https://")):
            raise
        keys = []  # a plain web server cannot list: ask for the usual names
    if not keys and address.startswith(("http://", "https://")):
        _download_usual(store, address, folder, progress)
        return
    if not keys:
        raise ModelNotFound(f"there is nothing under {address}", param="model")
    done = 0
    for key in keys:
        if judge(key) is Verdict.CODE:  # leave the verdict and its words to the inspection
            _place(folder, key).touch()
        elif judge(key) in (Verdict.TAKE, Verdict.WEIGHTS):
            done = _download(store, key, folder, done, progress)


def _download_usual(store: Store, address: str, folder: Path, progress: Progress | None) -> None:
    done, found = 0, set()
    names = list(_USUAL_FILES)
    for name in names:
        try:
            done = _download(store, name, folder, done, progress)
        except NotFound:
            continue
        found.add(name)
        if name == _INDEX and "model.safetensors" not in found:
            table = read_object(folder / name, name).get("weight_map")
            shards = table.values() if isinstance(table, dict) else ()
            names.extend(sorted({s for s in shards if isinstance(s, str) and _is_shard(s)}))
    if "config.json" not in found and _ADAPTER not in found:
        raise ModelNotFound(f"there is no model under {address}: no config.json", param="model")


def _is_shard(name: str) -> bool:
    return "/" not in name and judge(name) is Verdict.WEIGHTS


def _download(store: Store, key: str, folder: Path, done: int, progress: Progress | None) -> int:
    limit = None if judge(key) is Verdict.WEIGHTS else MAX_LARGE_JSON_BYTES
    target = _place(folder, key)
    size = 0
    with store.open(key) as source:
        first = source.read(_CHUNK_BYTES)  # a missing object shows here at the latest
        with storage_failures(target, "write"), target.open("wb") as sink:
            chunk = first
            while chunk:
                sink.write(chunk)
                size += len(chunk)
                if limit is not None and size > limit:
                    raise BrokenModel(f"{key}: more than {limit} bytes are too many")
                if progress is not None:
                    progress(done + size, 0, f"downloading {key}")
                chunk = source.read(_CHUNK_BYTES)
    return done + size


def _place(folder: Path, key: str) -> Path:
    target = folder / check_file_path(key)
    with storage_failures(target, "write"):
        target.parent.mkdir(parents=True, exist_ok=True)
    return target
