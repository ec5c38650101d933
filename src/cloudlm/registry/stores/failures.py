"""Operating system errors become cloudlm errors here, with the path and the remedy in the words.

Must not decide what to do about a failure: it only names it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloudlm.core.errors import CloudlmError, NotFound, StorageFailed

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free space there or keep the registry elsewhere "
    "(registry.url, home)",
    errno.EDQUOT: "the disk quota is used up; free space there or keep the registry elsewhere "
    "(registry.url, home)",
    errno.EFBIG: "the file is larger than the file system or the process limit allows",
    errno.EACCES: "user {user} may not; change the owner or the rights of the folder, or choose "
    "another one (registry.url, home)",
    errno.EPERM: "user {user} may not; change the owner or the rights of the folder, or choose "
    "another one (registry.url, home)",
    errno.EROFS: "the file system is mounted read-only; mount it writable or choose another "
    "folder (registry.url, home)",
    errno.EIO: "the disk reported an input/output error; check the disk, then try again",
    errno.ELOOP: "there is a symbolic link, which is not followed here; put the real file or "
    "folder in its place",
    errno.ENOTDIR: "a part of the path is not a folder (or is a symbolic link, which is not "
    "followed here)",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter folder",
}


def storage_failure(error: OSError, path: Path | str, doing: str) -> CloudlmError:
    """The error for ``doing`` (such as ``write``) at ``path``: NotFound or StorageFailed."""
    if error.errno == errno.ENOENT:
        return NotFound(f"cannot {doing} {path}: it does not exist")
    remedy = _REMEDIES.get(error.errno or 0, error.strerror or type(error).__name__)
    return StorageFailed(f"cannot {doing} {path}: {remedy.format(user=os.geteuid())}")


@contextmanager
def storage_failures(path: Path | str, doing: str) -> Iterator[None]:
    """Translate every OSError of the block with ``storage_failure``."""
    try:
        yield
    except OSError as error:
        raise storage_failure(error, path, doing) from error
