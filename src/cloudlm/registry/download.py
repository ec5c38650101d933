"""Copies the files of a version from a store into a folder, verifying while it writes.

A file that an earlier attempt left half done is hashed and continued. Must not decide where the
folder is or when it may be seen.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from cloudlm.core.errors import CorruptModel
from cloudlm.core.model import Manifest, ModelFile
from cloudlm.registry.stores.base import Store
from cloudlm.registry.stores.failures import storage_failures
from cloudlm.registry.verify import Progress

_CHUNK_BYTES = 4 << 20


def download_version(
    store: Store, prefix: str, manifest: Manifest, folder: Path, progress: Progress | None
) -> None:
    """Bring every file of ``manifest`` from ``prefix`` into ``folder``.

    Raises CorruptModel naming the file whose bytes in the store are not those of the manifest.
    """
    done = 0
    for file in manifest.files:

        def moved(file_bytes: int, before: int = done, path: str = file.path) -> None:
            if progress is not None:
                progress(before + file_bytes, manifest.size_bytes, f"downloading {path}")

        _download(store, prefix + file.path, manifest, file, folder / file.path, moved)
        done += file.size_bytes


def _download(
    store: Store,
    key: str,
    manifest: Manifest,
    file: ModelFile,
    target: Path,
    moved: Callable[[int], None],
) -> None:
    with storage_failures(target, "write"):
        target.parent.mkdir(parents=True, exist_ok=True)
        resumed = target.exists()
        found = _continue(store, key, file, target, moved)
        if found != file.sha256 and resumed:  # the earlier attempt's bytes may be the bad ones
            target.unlink()
            found = _continue(store, key, file, target, moved)
        if found != file.sha256:
            target.unlink()
            raise CorruptModel(
                f"{manifest.ref}: {file.path} is damaged in the store: its SHA-256 is "
                f"{found[:12]}…, the manifest says {file.sha256[:12]}… ({key})"
            )


def _continue(
    store: Store, key: str, file: ModelFile, target: Path, moved: Callable[[int], None]
) -> str:
    """Write what is missing of ``target``; the SHA-256 of the whole in hex."""
    digest = hashlib.sha256()
    done = 0
    with target.open("a+b") as sink:
        sink.seek(0)
        while chunk := sink.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
        if done < file.size_bytes:
            with store.open(key) as source:
                source.seek(done)
                # one byte more than expected tells that the object is too long
                while chunk := source.read(min(_CHUNK_BYTES, file.size_bytes + 1 - done)):
                    sink.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    moved(done)
                    if done > file.size_bytes:
                        break
        sink.flush()
        os.fsync(sink.fileno())
    return digest.hexdigest()
