"""A folder for the sockets and small files of one process, under the system's temporary folder: a
socket's path is limited to about a hundred bytes, and a home may lie deep.

Whoever ends well removes its folder. That of a process which was killed goes when the next one of
its kind starts: each holds a lock as long as it lives (``flock(2)``), and the kernel lets go of it
with the process. One that was killed before it had its lock leaves a folder with nothing else in
it: that goes when it is a day old. A folder of another user, behind a link, or with other things
and no lock is not touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

LOCK = ".lock"
_FRESH = "lock.new"
ALONE_S = 86_400.0
"""How old a folder without a lock has to be: nobody takes so long to make one."""


class Scratch:
    """A private folder, ``path``, whose name begins with ``prefix``. Removes the folders with that
    prefix that nobody holds any more. Raises OSError."""

    def __init__(self, prefix: str) -> None:
        remove_left(prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        fresh = self.path / _FRESH
        self._lock = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        fresh.rename(self.path / LOCK)  # whoever sees it finds it locked

    def close(self) -> None:
        """Remove the folder. May be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_left(prefix: str) -> list[Path]:
    """Remove what killed processes left; the folders that are gone. Never raises for one that
    cannot be removed."""
    gone = []
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if _is_own_folder(folder) and _is_left(folder):
                shutil.rmtree(folder)
                gone.append(folder)
    return gone


def _is_own_folder(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _is_left(folder: Path) -> bool:
    """Whether nobody holds its lock, or never anybody will. Raises OSError."""
    try:
        opened = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        age_s = time.time() - folder.lstat().st_mtime
        return age_s > ALONE_S and {one.name for one in folder.iterdir()} <= {_FRESH}
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(opened)
    return True
