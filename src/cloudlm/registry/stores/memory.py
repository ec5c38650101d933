"""A store in memory: the twin that tests and the contract suite use. Nothing outlives the process.

Must not touch a disk, except to read the file given to ``put_file``.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cloudlm.core.errors import NotFound
from cloudlm.registry.stores.base import BytesMoved
from cloudlm.registry.stores.failures import storage_failures
from cloudlm.registry.stores.keys import check_key, check_prefix


class MemoryStore:
    """Objects in a dictionary, safe for threads."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes:
        check_key(key)
        with self._lock:
            if key not in self._objects:
                raise NotFound(f"no object {key!r} in memory")
            return self._objects[key]

    def open(self, key: str) -> BinaryIO:
        return io.BytesIO(self.get(key))

    def put(self, key: str, data: bytes) -> None:
        check_key(key)
        with self._lock:
            self._objects[key] = bytes(data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        check_key(key)
        with self._lock:
            if key in self._objects:
                return False
            self._objects[key] = bytes(data)
            return True

    def put_file(self, key: str, path: Path, progress: BytesMoved | None = None) -> None:
        with storage_failures(path, "read"):
            data = path.read_bytes()
        self.put(key, data)
        if progress is not None:
            progress(len(data))

    def list(self, prefix: str) -> Iterator[str]:
        check_prefix(prefix)
        with self._lock:
            return iter(sorted(key for key in self._objects if key.startswith(prefix)))

    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self._objects.pop(key, None)

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def sweep(self) -> int:
        return 0
