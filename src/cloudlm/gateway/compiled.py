"""The path of a request as native code: the same sources, compiled by mypyc, take less CPU time.

``python -m cloudlm.gateway.compiled`` (or ``make native``) compiles them once into the cache; the
gateway's process then takes what it finds there, and its sources where there is nothing. What was
compiled carries a hash of all sources that it stands on and of the interpreter, so that it is never
used with others; it appears by rename, so that a half-written one is never seen. Nothing here may
change what the code does: ``.ci/run`` runs the gateway's flows both ways.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from cloudlm.core.cache_folder import (
    BUILDING,
    in_others_hands,
    mark_used,
    native_folder,
    own_folder,
    prune,
    user_cache,
)
from cloudlm.telemetry.logs import get_logger

MODULES = (
    "account",
    "admission",
    "capacity",
    "chat",
    "connection",
    "counters",
    "courses",
    "deadlines",
    "demand",
    "dialects.openai",
    "entrance",
    "errands",
    "exchange",
    "forms",
    "gate",
    "head",
    "interrupt",
    "journal",
    "known",
    "ledger",
    "levels",
    "limiter",
    "limits",
    "loads",
    "meter",
    "policies",
    "pool",
    "prefixes",
    "recall",
    "relay",
    "render",
    "replies",
    "retry",
    "rooms",
    "router",
    "sender",
    "shedding",
    "skim",
    "sse",
    "trust",
    "upstream",
    "view",
)
"""Of this package: what every request passes. All of them are compiled together and know one
another's classes, so none of them may have been imported before the compiled ones are there."""
_STANDS_ON = ("core", "gateway", "security", "state", "telemetry")
_PACKAGE = "cloudlm.gateway"
_BEGINS = "gateway-"
_SHARED = "__mypyc"
_ROOT = Path(__file__).resolve().parents[2]
BUILD_TIMEOUT_S = 3600.0
_log = get_logger(__name__)
_BUILD = """
import os, sys
from mypyc.build import mypycify
from setuptools import Distribution
folder, *sources = sys.argv[1:]
options = ["--config-file=", f"--cache-dir={folder}/types", "--follow-imports=silent"]
modules = mypycify(options + sources, opt_level="2", multi_file=True, target_dir=folder)
wanted = Distribution({"name": "cloudlm-gateway", "ext_modules": modules})
build = wanted.get_command_obj("build_ext")
build.build_lib, build.build_temp = f"{folder}/library", f"{folder}/objects"
build.parallel = os.cpu_count()
build.ensure_finalized()
build.run()
"""


class _Finder(importlib.abc.MetaPathFinder):
    """Finds compiled modules before their sources."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        file = self._files.get(name)
        return importlib.util.spec_from_file_location(name, file) if file is not None else None


def use(modules: Sequence[str] = MODULES) -> Path | None:
    """Have the compiled modules imported from now on, if there are any for these sources; the
    folder that they are in. Call it before anything else of the gateway is imported."""
    folder = find(modules)
    if folder is None or any(f"{_PACKAGE}.{name}" in sys.modules for name in modules):
        return None
    files = _files(folder)
    finder = _Finder(files)
    sys.meta_path.insert(0, finder)
    try:
        for name in files:
            if name.endswith(_SHARED):  # the code of all of them; it imports nothing of ours
                importlib.import_module(name)
    except ImportError as error:  # made on another system, or where nothing may be executed
        sys.meta_path.remove(finder)
        _log.warning("compiled_not_loaded", extra={"fields": {"reason": str(error)[:200]}})
        return None
    mark_used(folder)
    return folder


def find(modules: Sequence[str] = MODULES) -> Path | None:
    """The folder of the modules compiled from these sources, None if there is none."""
    try:
        places = [native_folder()]
        if not os.environ.get("CLOUDLM_NATIVE_CACHE"):
            places.append(user_cache() / "native")
        places = [place for place in places if any(place.glob(f"{_BEGINS}*"))]
        if not places:  # nothing was ever compiled: the sources need not be read to know it
            return None
        name = _name(modules)
        return next((place / name for place in places if _is_fit(place / name, modules)), None)
    except (OSError, RuntimeError):  # no home, no sources: nothing that could be trusted
        return None


def build(modules: Sequence[str] = MODULES) -> Path:
    """Compile, unless it was done; the folder. Takes minutes. Raises OSError, TimeoutExpired, and
    CalledProcessError with what the compiler said."""
    target = own_folder(native_folder()) / _name(modules)
    if _is_fit(target, modules):
        return target
    with tempfile.TemporaryDirectory(
        prefix=BUILDING, dir=target.parent, ignore_cleanup_errors=True
    ) as folder:
        _compile(folder, modules)
        # Somebody tidied up in it, or may write to it.
        if target.is_dir() and not _is_fit(target, modules):
            target.rename(Path(folder, "unfit"))
        try:
            Path(folder, "library").rename(target)
        except OSError:
            if not _is_fit(target, modules):  # else another process was quicker
                raise
    prune(target, _BEGINS)
    return target


def _compile(folder: str, modules: Sequence[str]) -> None:
    """Compile into ``library`` in the folder; errors as ``build``."""
    sources = [f"{_PACKAGE}.{name}".replace(".", "/") + ".py" for name in modules]
    subprocess.run(
        [sys.executable, "-c", _BUILD, folder, *sources],
        cwd=_ROOT,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        umask=0o022,  # whatever ours is: nobody else writes to what is executed
    )


def _name(modules: Sequence[str]) -> str:
    made_for = sys.version, sysconfig.get_config_var("SOABI"), platform.libc_ver()
    mark = hashlib.sha256(repr(made_for).encode())
    mark.update(repr(tuple(modules)).encode())
    for package in _STANDS_ON:
        for source in sorted((_ROOT / "cloudlm" / package).rglob("*.py")):
            mark.update(f"{source.relative_to(_ROOT)}\0".encode() + source.read_bytes())
    return f"{_BEGINS}{mark.hexdigest()[:20]}"


def _is_whole(folder: Path, modules: Sequence[str]) -> bool:
    """Whether all modules are there, and what they share: some compiled and some not would not
    know one another's classes."""
    found = _files(folder)
    return all(f"{_PACKAGE}.{name}" in found for name in modules) and any(
        name.endswith(_SHARED) for name in found
    )


def _is_fit(folder: Path, modules: Sequence[str]) -> bool:
    """Whether all modules are there, and nobody but this user (or the system's) can have put there
    any of what is executed."""
    if not _is_whole(folder, modules):
        return False
    place = in_others_hands(folder, _files(folder).values())
    if place is not None:
        fields = {"folder": str(place), "expected": "owned by this user, writable by no other"}
        _log.warning("compiled_not_trusted", extra={"fields": fields})
    return place is None


def _files(folder: Path) -> dict[str, Path]:
    """Compiled modules by name: those of the package, and what they have in common."""
    suffix: str = sysconfig.get_config_var("EXT_SUFFIX")
    found = {}
    for file in folder.rglob(f"*{suffix}"):
        name = ".".join(file.relative_to(folder).parts).removesuffix(suffix)
        found[name] = file
    return found


def main() -> int:
    """Compile and say where it is; the exit code."""
    try:
        folder = find() or build()
    except subprocess.CalledProcessError as error:
        print(error.stdout[-4000:], file=sys.stderr)  # noqa: T201
        print(  # noqa: T201
            "the gateway was not compiled, and runs from its sources: it needs a C compiler, "
            "Python's headers and the extra 'native' (pip install 'cloudlm[native]')",
            file=sys.stderr,
        )
        return 1
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"the gateway was not compiled: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(folder)  # noqa: T201 - the answer of the command
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
