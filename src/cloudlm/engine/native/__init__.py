"""Kernels for CPUs: a small C++ library built where it runs, with PyTorch as its equal.

``load_kernels`` is the one door. Importing this package builds and loads nothing.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloudlm.engine.native.contract import Kernels

_logger = logging.getLogger(__name__)


def load_kernels(threads: int, *, instructions: str | None = None, pin: bool = False) -> Kernels:
    """The best kernels of this machine, built first if need be; PyTorch's where none can be had.

    ``instructions`` asks for one set (``amx``, ``avx512``, ``avx2``) or for ``torch``.
    """
    from cloudlm.engine.native import build
    from cloudlm.engine.native.fallback import TorchKernels
    from cloudlm.engine.native.library import NativeKernels

    wanted = build.instruction_sets() if instructions is None else (instructions,)
    try:
        for name in wanted:
            path = None if name == "torch" else build.library(name)
            if path is None:
                continue
            try:
                return NativeKernels(path, name, threads=threads, pin=pin)
            except (OSError, AttributeError) as error:
                fields = {"instructions": name, "path": str(path), "reason": str(error)}
                _logger.warning("native_load_failed", extra={"fields": fields})
    finally:
        build.drop_private()
    _logger.info("native_unavailable", extra={"fields": {"tried": list(wanted)}})
    return TorchKernels()
