"""Which file on disk has the packed weights of a model: named by everything that makes them, so
that none outlives the code that made it. Must not read or write such a file
(``native.packed_files`` does)."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import cloudlm
from cloudlm.core.cache_folder import cache_root
from cloudlm.engine.formats.base import Checkpoint
from cloudlm.engine.native.library import NativeKernels
from cloudlm.engine.native.packed_files import PackedFile, packed_key
from cloudlm.engine.paths.choice import Choice

_logger = logging.getLogger(__name__)

# What stands between a model's files and packed weights: how codes and numbers are read, which
# parameters they fill, which matrices are fused, how these are quantised and laid out. (The C++
# sources are in the name of the kernels' build.)
_MAKERS = (
    "architectures/*.py",
    "formats/*.py",
    "native/*.py",
    "paths/native_path.py",
    "weights.py",
)


def packed_file(
    folder: Path, checkpoint: Checkpoint, choice: Choice, limit_mb: int
) -> PackedFile | None:
    """Where the packed weights of the model in ``folder`` are kept, at most ``limit_mb`` MiB with
    all others; None if they are not."""
    if not limit_mb or not isinstance(choice.kernels, NativeKernels):
        return None
    try:
        key = packed_key(
            (*checkpoint.files, folder / "config.json"),
            choice.kernels.build,
            choice.precision,
            choice.stored,
            cloudlm.__version__,
            code_digest(Path(__file__).parent),
        )
        return PackedFile(cache_root() / "packed", key, limit_mb << 20)
    except (OSError, RuntimeError) as error:
        fields = {"reason": str(error)}
        _logger.warning("packed_file_refused", extra={"fields": fields})
        return None


def code_digest(engine: Path) -> str:
    """A digest of the sources in the folder ``engine`` that have a part in packed weights. Raises
    OSError where there are none: nobody could tell when they change."""
    digest = hashlib.sha256()
    for pattern in _MAKERS:
        found = sorted(engine.glob(pattern))
        if not found:
            raise FileNotFoundError(f"no sources {engine / pattern}")
        for path in found:
            text = path.read_bytes()
            digest.update(f"{path.relative_to(engine)}\0{len(text)}\0".encode() + text)
    return digest.hexdigest()
