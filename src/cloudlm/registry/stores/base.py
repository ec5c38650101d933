"""The store contract: a flat space of objects under ``/``-separated keys, as object stores have it.

Synchronous: the registry runs in threads and command lines. Implementations: ``memory`` (tests),
``file`` (a folder), ``object`` (S3, GCS, Azure, OSS, HTTP through obstore). This module must not
import any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

BytesMoved = Callable[[int], None]
"""Told how many bytes of one object have been moved so far; may raise to cancel the transfer."""


class Store(Protocol):
    """Raises NotFound for a missing key, StorageFailed for a full disk or unwritable folder,
    Unavailable when the store cannot be reached."""

    def get(self, key: str) -> bytes:
        """A small object, whole."""
        ...

    def open(self, key: str) -> BinaryIO:
        """A large object, to be read in pieces (it can seek) and closed."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write a small object atomically: a reader sees the old bytes or the new ones."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write only if the key does not exist; atomic among all writers. False if it existed."""
        ...

    def put_file(self, key: str, path: Path, progress: BytesMoved | None = None) -> None:
        """Upload a file; visible under its key only when complete."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that begin with ``prefix``, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Remove; a missing key is no error."""
        ...

    def local_path(self, key: str) -> Path | None:
        """The file that holds the object, if it lies on this machine and may be read in place."""
        ...

    def sweep(self) -> int:
        """Remove what killed writers left outside the key space (temporary files); how many.
        Never touches what a living writer is still writing."""
        ...
