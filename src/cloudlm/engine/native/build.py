"""Compiles the native library on the machine that will run it: once, into a cache folder.

One library per instruction set (``amx``, ``avx512``, ``avx2``). Its name carries a hash of the
sources, the compiler's version, the flags and the CPU's abilities, so that a stale file is never
loaded; it appears by rename, so that a half-written one is never seen. One that somebody else could
have put there or changed is not loaded: in a folder of our own it is built again, and where others
may write to the folder, in one for this process alone. Libraries that were not used for long go
when a new one was built (``core.cache_folder``). Nothing here runs at import and nothing raises:
where no library can be had the answer is None and the log says why.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from cloudlm.core.cache_folder import (
    BUILDING,
    mark_used,
    native_folder,
    others_may_write,
    own_folder,
    prune,
)

_logger = logging.getLogger(__name__)

_BEGINS = "cloudlm-"
SOURCES = Path(__file__).parent / "src"
COMPILERS = ("g++", "clang++", "c++")
BUILD_TIMEOUT_S = 300
_BASE = ("-O2", "-std=c++17", "-fPIC", "-Wno-psabi", "-pthread", "-ffp-contract=fast")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512_PARTS = ("f", "bw", "vl", "dq", "vnni", "bf16")
_AVX512 = (*_AVX2, *(f"-mavx512{part}" for part in _AVX512_PARTS))
FLAGS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
}


def instruction_sets(cpu: frozenset[str] | None = None) -> tuple[str, ...]:
    """The instruction sets of ``FLAGS`` that this machine has, best first; empty on others.

    ``cpu``: the CPU's flags as in /proc/cpuinfo, which reports what CPUID and the kernel allow.
    """
    flags = cpu_flags() if cpu is None else cpu
    return tuple(name for name, wanted in FLAGS.items() if _needs(wanted) <= flags)


def cpu_flags() -> frozenset[str]:
    """The flags that every CPU of this machine has; empty where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    sets = [frozenset(line.split(":")[1].split()) for line in lines if line.startswith("flags")]
    return frozenset.intersection(*sets) if sets else frozenset()


def library(
    instructions: str,
    cache: Path | None = None,
    compiler: str | None = None,
    *,
    lasting: bool = False,
) -> Path | None:
    """The library for one instruction set, built if it is not in ``cache`` yet (by default
    ``$CLOUDLM_NATIVE_CACHE``, ``$CLOUDLM_HOME/cache/native`` or ``~/.cache/cloudlm/native``). Where
    others may write to that folder it is built for this process alone, unless it must be
    ``lasting``. None if it cannot be built."""
    found = compiler or find_compiler()
    if found is None:
        _logger.info("native_no_compiler", extra={"fields": {"searched": list(COMPILERS)}})
        return None
    try:
        folder = _folder(cache or native_folder(), lasting)
        target = folder / f"{_BEGINS}{instructions}-{_fingerprint(found, instructions)}.so"
        if not target.is_file() or others_may_write(target):
            _build(found, instructions, target)
            fields = {"built": target.name, "removed": len(prune(target, _BEGINS))}
            _logger.info("native_built", extra={"fields": fields})
        mark_used(target)
        return target
    except subprocess.CalledProcessError as error:
        reason = str(error.stderr)[-2000:]
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: no home
        reason = str(error)
    fields = {"instructions": instructions, "compiler": found, "reason": reason}
    _logger.warning("native_build_failed", extra={"fields": fields})
    return None


def _folder(wanted: Path, lasting: bool) -> Path:
    """``wanted`` if what is in it may be executed, else one that goes with this process. Raises
    OSError (there is none)."""
    try:
        return own_folder(wanted)
    except OSError as error:
        if lasting:
            raise
        private = own_folder(_private_folder())
        fields = {
            "reason": str(error),
            "instead": str(private),
            "cost": "compiled anew whenever a process starts",
        }
        _logger.warning("native_folder_refused", extra={"fields": fields})
        return private


@functools.cache
def _private_folder() -> Path:
    """A folder of this process, removed by ``drop_private``, or when the process ends in order."""
    folder = Path(tempfile.mkdtemp(prefix="cloudlm-native-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def drop_private() -> None:
    """Remove what was built for this process alone. A library that is loaded stays loaded, and a
    process that is killed then leaves nothing behind."""
    if _private_folder.cache_info().currsize:
        shutil.rmtree(_private_folder(), ignore_errors=True)
        _private_folder.cache_clear()


def find_compiler() -> str | None:
    """The path of ``$CXX`` if that is set, else of the first C++ compiler on PATH. A ``$CXX`` that
    is not there means none: ``CXX=none`` keeps the engine on PyTorch."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    return None


def _needs(flags: tuple[str, ...]) -> frozenset[str]:
    """What /proc/cpuinfo calls the abilities that a set of compiler flags uses."""
    names = {"avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16"}
    plain = (flag.removeprefix("-m").replace("amx-", "amx_") for flag in flags)
    return frozenset(names.get(flag, flag) for flag in plain)


def _fingerprint(compiler: str, instructions: str) -> str:
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    parts = [version, *_BASE, *FLAGS[instructions], *sorted(cpu_flags())]
    for source in sorted(SOURCES.iterdir()):
        parts += [source.name, source.read_text("utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _build(compiler: str, instructions: str, target: Path) -> None:
    flags = [*_BASE, *FLAGS[instructions]]
    with tempfile.TemporaryDirectory(prefix=BUILDING, dir=target.parent) as name:
        folder = Path(name)
        objects: list[str] = []
        running: list[tuple[list[str], Path, subprocess.Popen[bytes]]] = []
        for source in sorted(SOURCES.glob("*.cpp")):
            objects.append(str(folder / f"{source.stem}.o"))
            command = [compiler, *flags, "-c", str(source), "-o", objects[-1]]
            complaints = folder / f"{source.stem}.log"
            with complaints.open("wb") as log:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
            running.append((command, complaints, process))
        try:
            for command, complaints, process in running:
                if code := process.wait(BUILD_TIMEOUT_S):
                    text = complaints.read_text("utf-8", errors="replace")
                    raise subprocess.CalledProcessError(code, command, stderr=text)
        finally:
            for _, _, process in running:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        built = folder / "library.so"
        link = [compiler, "-shared", "-pthread", "-o", str(built), *objects]
        subprocess.run(link, capture_output=True, text=True, check=True, timeout=BUILD_TIMEOUT_S)
        built.chmod(0o755)  # whatever the umask is: nobody else writes to what is executed
        built.replace(target)


def main() -> int:
    """``make native``: builds the best library of this machine; says where it is."""
    for instructions in instruction_sets():
        path = library(instructions, lasting=True)
        if path is not None:
            print(path)  # noqa: T201 - the answer of the command
            return 0
    print("no native library: see the log above; PyTorch will compute instead")  # noqa: T201
    return 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    raise SystemExit(main())
