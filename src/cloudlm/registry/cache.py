"""The local copies of versions that are kept in a remote store.

    <folder>/lock                          held for moments, while entries come and go
    <folder>/versions/<entry>/lock         shared by users, exclusive while downloading
    <folder>/versions/<entry>/size         bytes that the entry needs
    <folder>/versions/<entry>/part/        what has been downloaded so far
    <folder>/versions/<entry>/files/       complete (``part`` renamed)
    <folder>/versions/<entry>/<mark>       the caller's, goes with the entry

Locks are the kernel's (flock): they vanish with their process, so a killed user or downloader
blocks nobody. The entries that were not used for longest go first when room is needed; one that
is locked never goes. Must not know where the bytes come from or what they should be.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cloudlm.core.errors import StorageFailed
from cloudlm.registry.stores.failures import storage_failures

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Lease:
    """A complete entry that cannot be evicted until ``release`` or the end of the process."""

    folder: Path
    lock_fd: int

    def release(self) -> None:
        """Give the lock back; once only."""
        os.close(self.lock_fd)


class ModelCache:
    """A folder of version copies, at most ``limit_bytes`` large. Safe among processes."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._versions = folder / "versions"
        self._trash = folder / "trash"

    def lease(
        self,
        name: str,
        size_bytes: int,
        download: Callable[[Path], None],
        waiting: Callable[[], None],
    ) -> Lease:
        """The entry ``name``, downloaded into the folder given to ``download`` if it is not there.

        Of several callers one downloads; the others call ``waiting`` now and then (it may raise).
        A failed download leaves its part for the next attempt. Raises StorageFailed.
        """
        with storage_failures(self.folder, "use the model cache"):
            while True:
                entry, lock_fd = self._open_entry(name, size_bytes)
                try:
                    if self._settle(entry, lock_fd, download, waiting):
                        return Lease(entry / "files", lock_fd)
                except BaseException:
                    os.close(lock_fd)
                    raise
                os.close(lock_fd)

    def discard(self, name: str) -> None:
        """Take a damaged entry away. Who has its files open can go on reading them."""
        with storage_failures(self.folder, "use the model cache"):
            with self._locked():
                self._to_trash(self._versions / name)
            self._empty_trash()

    # -- one entry

    def _settle(
        self, entry: Path, fd: int, download: Callable[[Path], None], waiting: Callable[[], None]
    ) -> bool:
        """End with a shared lock on a complete entry; False if it was evicted meanwhile."""
        _wait_for(fd, fcntl.LOCK_SH, waiting)
        if not _is_same(entry, fd):
            return False
        if not (entry / "files").is_dir():
            fcntl.flock(fd, fcntl.LOCK_UN)
            _wait_for(fd, fcntl.LOCK_EX, waiting)
            if not _is_same(entry, fd):
                return False
            if not (entry / "files").is_dir():
                self._fill(entry, download)
            fcntl.flock(fd, fcntl.LOCK_SH)  # not atomic: an eviction may come between
            return _is_same(entry, fd)
        return True

    @staticmethod
    def _fill(entry: Path, download: Callable[[Path], None]) -> None:
        part = entry / "part"
        part.mkdir(exist_ok=True)
        download(part)
        _sync_folders(part)
        part.rename(entry / "files")
        _sync(entry)

    def _open_entry(self, name: str, size_bytes: int) -> tuple[Path, int]:
        entry = self._versions / name
        with self._locked():
            if not (entry / "lock").is_file():
                self._to_trash(entry)
                self._make_room(size_bytes)
                self._create(entry, size_bytes)
            fd = os.open(entry / "lock", os.O_RDWR | os.O_NOFOLLOW)
            os.utime(fd)  # last used now
        self._empty_trash()
        return entry, fd

    def _create(self, entry: Path, size_bytes: int) -> None:
        """In one step, so that every entry has its lock and its size."""
        fresh = self._trash / secrets.token_hex(8)
        fresh.mkdir(parents=True)
        (fresh / "lock").touch()
        (fresh / "size").write_text(str(size_bytes))
        entry.parent.mkdir(parents=True, exist_ok=True)
        fresh.rename(entry)

    # -- room

    def _make_room(self, needed_bytes: int) -> None:
        if needed_bytes > self.limit_bytes:
            raise StorageFailed(
                f"the version needs {_mib(needed_bytes)}, the model cache {self.folder} may hold "
                f"{_mib(self.limit_bytes)}; raise registry.cache_mb"
            )
        entries = sorted(self._entries())
        used = sum(size for _, size, _ in entries)
        for _, size, entry in entries:
            if used + needed_bytes <= self.limit_bytes:
                return
            if self._evict(entry):
                used -= size
        if used + needed_bytes > self.limit_bytes:
            raise StorageFailed(
                f"the model cache {self.folder} is full of versions in use ({_mib(used)} of "
                f"{_mib(self.limit_bytes)}), and {_mib(needed_bytes)} more are needed; stop one "
                "or raise registry.cache_mb"
            )

    def _evict(self, entry: Path) -> bool:
        fd = os.open(entry / "lock", os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            self._to_trash(entry)
            return True
        finally:
            os.close(fd)

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """(last used, bytes, folder) of each entry."""
        if not self._versions.is_dir():
            return
        for entry in self._versions.iterdir():
            try:
                used_at = (entry / "lock").stat().st_mtime
                size = int((entry / "size").read_text())
            except (OSError, ValueError):
                continue
            yield used_at, size, entry

    def _to_trash(self, entry: Path) -> None:
        self._trash.mkdir(parents=True, exist_ok=True)
        if entry.exists():
            entry.rename(self._trash / secrets.token_hex(8))

    def _empty_trash(self) -> None:
        """Under the lock, because new entries are put together there too."""
        if self._trash.is_dir() and any(self._trash.iterdir()):
            with self._locked():
                shutil.rmtree(self._trash, ignore_errors=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _wait_for(fd: int, kind: int, waiting: Callable[[], None]) -> None:
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            time.sleep(_POLL_S)
        else:
            return


def _is_same(entry: Path, fd: int) -> bool:
    """Whether the locked file is still the entry's (it may have been evicted and made anew)."""
    try:
        return (entry / "lock").stat().st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False


def _sync_folders(folder: Path) -> None:
    for above, _, _ in os.walk(folder):
        _sync(Path(above))


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"
