"""Compares a folder with a manifest: all files there, none besides, each with its size and SHA-256.

Hashing a large model takes seconds to minutes, so a folder that was verified is remembered by
inode, size and change times of its files (a *mark*); any write, replacement or restored backup
changes those and brings the full check back.

Must not repair anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cloudlm.core.errors import CorruptModel
from cloudlm.core.model import Manifest, ModelFile
from cloudlm.registry.records import files_digest
from cloudlm.registry.stores.failures import storage_failure, storage_failures

_CHUNK_BYTES = 1 << 20

Progress = Callable[[int, int, str], None]
"""Called with (done_bytes, total_bytes, what is being done); may raise to cancel."""


def sha256_of(stream: BinaryIO, moved: Callable[[int], None] | None = None) -> str:
    """SHA-256 of the rest of ``stream`` in hex; ``moved`` is told the bytes read so far."""
    digest = hashlib.sha256()
    done = 0
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
        done += len(chunk)
        if moved is not None:
            moved(done)
    return digest.hexdigest()


def verify_folder(
    folder: Path, manifest: Manifest, mark: Path, progress: Progress | None = None
) -> None:
    """Raise CorruptModel naming the first file of ``folder`` that is not as ``manifest`` says.

    ``mark`` is the file that remembers an earlier success; it is written after a full check and
    may be unwritable (then every check is a full one).
    """
    facts = _check_listing(folder, manifest)
    wanted = {"digest": files_digest(manifest.files), "files": facts}
    if _read_mark(mark) == wanted:
        return
    done = 0
    for file in manifest.files:
        done = _check_bytes(folder, manifest, file, done, progress)
    if _check_listing(folder, manifest) != facts:
        raise CorruptModel(f"{manifest.ref}: its files in {folder} changed while being verified")
    write_atomically(mark, json.dumps(wanted).encode())


def remember_verified(folder: Path, manifest: Manifest, mark: Path) -> None:
    """Write the mark for files whose bytes were hashed while they were written.

    Raises CorruptModel if names or sizes differ from the manifest.
    """
    facts = _check_listing(folder, manifest)
    body = {"digest": files_digest(manifest.files), "files": facts}
    write_atomically(mark, json.dumps(body).encode())


def _check_bytes(
    folder: Path, manifest: Manifest, file: ModelFile, done: int, progress: Progress | None
) -> int:
    path = folder / file.path

    def moved(file_bytes: int) -> None:
        if progress is not None:
            progress(done + file_bytes, manifest.size_bytes, f"verifying {file.path}")

    with storage_failures(path, "read"), path.open("rb") as stream:
        found = sha256_of(stream, moved)
    if found != file.sha256:
        raise CorruptModel(
            f"{manifest.ref}: {file.path} is damaged: its SHA-256 is {found[:12]}…, the manifest "
            f"says {file.sha256[:12]}… ({path})"
        )
    return done + file.size_bytes


def _check_listing(folder: Path, manifest: Manifest) -> dict[str, list[int]]:
    """Names, kinds and sizes; returns what a mark remembers of each file."""
    sizes = {file.path: file.size_bytes for file in manifest.files}
    found: dict[str, list[int]] = {}
    for path, place in _files_below(folder):
        if path not in sizes:
            raise CorruptModel(f"{manifest.ref}: {path} does not belong to it ({place})")
        facts = place.lstat()
        if not stat.S_ISREG(facts.st_mode):
            raise CorruptModel(f"{manifest.ref}: {path} is not a plain file ({place})")
        if facts.st_size != sizes[path]:
            raise CorruptModel(
                f"{manifest.ref}: {path} has {facts.st_size} bytes, the manifest says "
                f"{sizes[path]} ({place})"
            )
        found[path] = [facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
    missing = sorted(set(sizes) - set(found))
    if missing:
        raise CorruptModel(f"{manifest.ref}: {missing[0]} is missing in {folder}")
    return found


def _files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise storage_failure(error, folder, "list") from error

    for above, folders, names in os.walk(folder, onerror=fail):
        links = [name for name in folders if Path(above, name).is_symlink()]
        for name in [*names, *links]:
            place = Path(above, name)
            yield place.relative_to(folder).as_posix(), place


def _read_mark(mark: Path) -> Any:
    try:
        return json.loads(mark.read_bytes())
    except (OSError, ValueError):
        return None


def write_atomically(path: Path, data: bytes) -> bool:
    """Replace a small local file in one step; False if it cannot be written (no harm done)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=".mark-")
    except OSError:
        return False
    try:
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
        os.replace(name, path)  # noqa: PTH105
    except OSError:
        Path(name).unlink(missing_ok=True)
        return False
    return True
