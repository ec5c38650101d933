"""Where what can be made again is kept: compiled code, packed weights. Must not make or read it."""

from __future__ import annotations

import os
from pathlib import Path


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
