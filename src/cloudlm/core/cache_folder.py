"""Where what can be made again is kept (compiled code, packed weights), who may have put it there,
and what of it goes when it is old. Must not make or read it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

UNUSED_S = 30 * 24 * 3600.0
"""Compiled code that nobody used for so long, seconds, goes when new code was built."""
LEFT_S = 24 * 3600.0
"""An unfinished build of this age, seconds, was left behind by somebody who died: none takes so
long."""
BUILDING = "building-"
"""How the names of folders begin in which something is being built, or waits to be removed."""


def cache_root() -> Path:
    """The folder of what can be made again: ``$CLOUDLM_HOME/cache``, or ``~/.cache/cloudlm``.
    RuntimeError: there is no home."""
    installation = os.environ.get("CLOUDLM_HOME")
    return Path(installation) / "cache" if installation else user_cache()


def user_cache() -> Path:
    """What all installations of this user share. RuntimeError: there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cloudlm"


def native_folder() -> Path:
    """Where compiled code is kept: ``$CLOUDLM_NATIVE_CACHE``, or ``native`` in ``cache_root``.
    RuntimeError: there is no home."""
    own = os.environ.get("CLOUDLM_NATIVE_CACHE")
    return Path(own) if own else cache_root() / "native"


def own_folder(folder: Path) -> Path:
    """``folder``, made if need be: what is in it is executed. Raises OSError if it cannot be made
    or others may write to it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if others_may_write(folder):
        raise OSError(
            f"{folder} belongs to another user or can be written by others; expected a folder that "
            "only this user (or root) can write to: chmod go-w, or set CLOUDLM_NATIVE_CACHE to "
            "another"
        )
    return folder


def in_others_hands(path: Path, inside: Iterable[Path] = ()) -> Path | None:
    """Of ``path``, its folder, the files ``inside`` it and the folders on the way to them the
    first that somebody else than this user or the system owns or may write to; None if there is
    none, so that what is there may be executed. Raises OSError (it is not there)."""
    places = {path, path.parent}
    for file in inside:
        places.update((file, *(one for one in file.parents if path in one.parents)))
    return next(filter(others_may_write, sorted(places)), None)


def others_may_write(place: Path) -> bool:
    """Whether somebody else than this user or the system owns ``place`` or may write to it. Raises
    OSError (it is not there)."""
    found = place.stat()
    return found.st_uid not in (0, os.geteuid()) or bool(found.st_mode & 0o022)


def mark_used(path: Path) -> None:
    """``path`` is in use: ``prune`` leaves it alone for ``UNUSED_S`` from now on. In a folder that
    cannot be written nothing is pruned either."""
    with contextlib.suppress(OSError):  # the system's, or gone
        os.utime(path)


def prune(built: Path, begins: str) -> tuple[Path, ...]:
    """After ``built`` was put into its folder: removes its elders there, whose names begin with
    ``begins`` too and which were not used for ``UNUSED_S``, and what unfinished builds left; the
    removed. What cannot be removed stays.

    Everything vanishes by one rename, so that nobody finds half of it, and into a folder of this
    process's own, so that two who prune remove each thing once. What others build meanwhile is
    younger than ``LEFT_S`` and stays."""
    folder, now = built.parent, time.time()
    removed: list[Path] = []
    try:
        with tempfile.TemporaryDirectory(
            prefix=BUILDING, dir=folder, ignore_cleanup_errors=True
        ) as waste:
            for path in sorted(folder.iterdir()):
                if path in (built, Path(waste)) or not _is_old(path, begins, now):
                    continue
                try:
                    path.rename(Path(waste, path.name))
                except OSError:
                    continue  # somebody else was quicker, or owns it
                removed.append(path)
    except OSError:
        pass  # no room, or not ours to write: it was no part of the build
    return tuple(removed)


def _is_old(path: Path, begins: str, now: float) -> bool:
    limit_s = LEFT_S if path.name.startswith(BUILDING) else UNUSED_S
    if not path.name.startswith((BUILDING, begins)):
        return False
    try:
        return now - path.lstat().st_mtime > limit_s
    except OSError:
        return False
