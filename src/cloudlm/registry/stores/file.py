"""A store in a folder of this machine (or of a file system that several machines mount).

An object is written to a temporary file, forced to the disk, and then renamed or linked into its
place, whose folder is forced to the disk too: a reader finds the old bytes, the new bytes or
nothing, also after a crash of the machine. The temporary file is locked while it is being written;
the lock vanishes with its process, which is how ``sweep`` knows what a killed writer left behind.
Symbolic links inside the folder are never followed.

Must not know what the objects mean.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from cloudlm.core.errors import BadSetting, StorageFailed
from cloudlm.registry.stores.base import BytesMoved
from cloudlm.registry.stores.failures import storage_failure, storage_failures
from cloudlm.registry.stores.keys import check_key, check_prefix, is_key

_TEMPORARY = ".tmp"
_CHUNK_BYTES = 4 << 20
_PLACE_ATTEMPTS = 50  # a concurrent delete may prune the folder between its making and its use
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV)


def folder_of(url_or_path: str | Path) -> Path:
    """The folder that ``file://…`` or a path names, absolute. Raises BadSetting."""
    text = str(url_or_path)
    if text.startswith("file:"):
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise BadSetting(f"{text!r} is not a folder: expected file:///absolute/path")
        text = unquote(parts.path)
    if not text or "\0" in text:
        raise BadSetting(f"{text!r} is not a folder: expected a path or file:///absolute/path")
    return Path(os.path.abspath(Path(text).expanduser()))  # noqa: PTH100  (keeps links in the way)


class FileStore:
    """Objects as files below one folder, which is created at the first write."""

    def __init__(self, url_or_path: str | Path) -> None:
        self.root = folder_of(url_or_path)

    def get(self, key: str) -> bytes:
        with self.open(key) as stream:
            return stream.read()

    def open(self, key: str) -> BinaryIO:
        parts = check_key(key)
        with storage_failures(self._path(parts), "read"):
            with self._folder(parts[:-1]) as folder:
                fd = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise StorageFailed(f"cannot read {self._path(parts)}: it is not a regular file")
            return os.fdopen(fd, "rb")

    def put(self, key: str, data: bytes) -> None:
        self._write(key, lambda fd: _write_all(fd, data), self._rename)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._write(key, lambda fd: _write_all(fd, data), self._link)

    def put_file(self, key: str, path: Path, progress: BytesMoved | None = None) -> None:
        try:
            source = path.open("rb", buffering=0)
        except OSError as error:
            raise storage_failure(error, path, "read") from error

        def copy(fd: int) -> None:
            done = 0
            while chunk := _read_source(source, path):
                _write_all(fd, chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done)

        with source:
            self._write(key, copy, self._rename)

    def list(self, prefix: str) -> Iterator[str]:
        folders, beginning = check_prefix(prefix)
        start = self.root.joinpath(*folders)
        found = [
            key
            for key in self._walk(start, "".join(f"{part}/" for part in folders), beginning)
            if key.startswith(prefix)
        ]
        return iter(sorted(found))

    def delete(self, key: str) -> None:
        parts = check_key(key)
        with storage_failures(self._path(parts), "delete"):
            try:
                with self._folder(parts[:-1]) as folder:
                    os.unlink(parts[-1], dir_fd=folder)
                    os.fsync(folder)
            except FileNotFoundError:
                return
        self._prune(parts[:-1])

    def local_path(self, key: str) -> Path | None:
        parts = check_key(key)
        try:
            with self._folder(parts[:-1]) as folder:
                facts = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
        except OSError:
            return None
        return self._path(parts) if stat.S_ISREG(facts.st_mode) else None

    def sweep(self) -> int:
        """Remove temporary files that nobody is writing any more."""
        with storage_failures(self.root / _TEMPORARY, "clean"):
            try:
                with self._folder((_TEMPORARY,)) as folder:
                    names = os.listdir(folder)  # noqa: PTH208  (of a descriptor)
                    return sum(_remove_if_abandoned(name, folder) for name in names)
            except FileNotFoundError:
                return 0

    # -- how a file gets to its place

    def _write(
        self,
        key: str,
        fill: Callable[[int], None],
        place: Callable[[str, int, str, int], bool],
    ) -> bool:
        parts = check_key(key)
        path = self._path(parts)
        with storage_failures(path, "write"), self._temporary() as (name, temporary_folder, fd):
            fill(fd)
            os.fsync(fd)
            for _ in range(_PLACE_ATTEMPTS):
                try:
                    with self._folder(parts[:-1], create=True) as folder:
                        placed = place(name, temporary_folder, parts[-1], folder)
                        os.fsync(folder)
                        return placed
                except FileNotFoundError:
                    continue
        raise StorageFailed(f"cannot write {path}: its folder keeps being removed")

    @staticmethod
    def _rename(name: str, temporary_folder: int, target: str, folder: int) -> bool:
        os.rename(name, target, src_dir_fd=temporary_folder, dst_dir_fd=folder)
        return True

    def _link(self, name: str, temporary_folder: int, target: str, folder: int) -> bool:
        try:
            os.link(name, target, src_dir_fd=temporary_folder, dst_dir_fd=folder)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            return self._rename_if_absent(name, temporary_folder, target, folder)
        return True

    def _rename_if_absent(self, name: str, temporary_folder: int, target: str, folder: int) -> bool:
        """For file systems without hard links: look and rename under one lock of the store."""
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                os.stat(target, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                return self._rename(name, temporary_folder, target, folder)
            return False
        finally:
            os.close(fd)

    @contextmanager
    def _temporary(self) -> Iterator[tuple[str, int, int]]:
        """A locked new file: its name, the descriptor of its folder and its own."""
        with self._folder((_TEMPORARY,), create=True) as folder:
            name, fd = _create_locked(folder)
            try:
                yield name, folder, fd
            finally:
                with suppress(OSError):  # the first fault counts; sweep() removes what is left
                    os.unlink(name, dir_fd=folder)
                os.close(fd)

    @contextmanager
    def _folder(self, parts: tuple[str, ...], create: bool = False) -> Iterator[int]:
        """A descriptor of the folder ``parts``, reached without following a link."""
        fd = self._open_root(create)
        try:
            for part in parts:
                inner = _open_inside(fd, part, create)
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)

    def _open_root(self, create: bool) -> int:
        try:
            return os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            if not create:
                raise
        self.root.mkdir(parents=True, exist_ok=True)
        return os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)

    def _path(self, parts: tuple[str, ...]) -> Path:
        return self.root.joinpath(*parts)

    def _walk(self, folder: Path, above: str, beginning: str = "") -> Iterator[str]:
        try:
            with os.scandir(folder) as entries:
                found = [
                    (entry.name, entry.is_dir(follow_symlinks=False), entry.is_symlink())
                    for entry in entries
                    if entry.name.startswith(beginning)
                ]
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise storage_failure(error, folder, "list") from error
        for name, is_folder, is_link in found:
            key = above + name
            if not is_key(key) or is_link:
                continue
            if is_folder:
                yield from self._walk(folder / name, f"{key}/")
            else:
                yield key

    def _prune(self, parts: tuple[str, ...]) -> None:
        """Remove folders that became empty, from the innermost outwards."""
        for depth in range(len(parts), 0, -1):
            try:
                with self._folder(parts[: depth - 1]) as folder:
                    os.rmdir(parts[depth - 1], dir_fd=folder)
            except OSError:  # not empty, or gone already: nothing is lost
                return


def _open_inside(folder: int, name: str, create: bool) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        return os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        if not create:
            raise
    with suppress(FileExistsError):
        os.mkdir(name, dir_fd=folder)
        os.fsync(folder)
    return os.open(name, flags, dir_fd=folder)


def _create_locked(folder: int) -> tuple[str, int]:
    while True:
        name = f"{secrets.token_hex(12)}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        fd = os.open(name, flags, 0o644, dir_fd=folder)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a sweep found it before the lock: it is about to be removed
            os.close(fd)
            continue
        except OSError:
            os.close(fd)
            os.unlink(name, dir_fd=folder)
            raise
        if os.fstat(fd).st_nlink:
            return name, fd
        os.close(fd)


def _remove_if_abandoned(name: str, folder: int) -> int:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return 0
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=folder)
    except (BlockingIOError, FileNotFoundError):
        return 0
    finally:
        os.close(fd)
    return 1


def _read_source(source: BinaryIO, path: Path) -> bytes:
    try:
        return source.read(_CHUNK_BYTES)
    except OSError as error:
        raise storage_failure(error, path, "read") from error


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
