"""Private files that appear whole or not at all: written beside their place, then put there."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def draft_of(file: Path, content: bytes) -> Iterator[Path]:
    """A file beside ``file`` with ``content`` on disk, to be renamed to it or linked there, gone
    afterwards. Only its owner can read it, from the first byte on. Raises OSError."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as open_file:
            open_file.write(content)
            open_file.flush()
            os.fsync(open_file.fileno())
        yield draft
    finally:
        draft.unlink(missing_ok=True)
