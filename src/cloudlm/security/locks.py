"""One process at a time at a file or folder of the home, as long as all of them ask here.

The kernel's lock (flock): it vanishes with its process, however that ends. A guard, which may
import nothing of ours, has its own that does not wait (``drivers.guard``). Must not read or write
what it guards.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone_with(place: Path) -> Iterator[None]:
    """Wait until nobody else holds ``place``, a folder or else a file that is made if it is
    missing, private, with its folder; then hold it. Raises OSError."""
    if place.is_dir():
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    else:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(place, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
