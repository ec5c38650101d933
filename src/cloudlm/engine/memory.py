"""Giving memory back to the system, which freeing alone does not always do."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterable
from pathlib import Path

import torch


def give_back() -> None:
    """Return freed memory to the system: what the allocators keep for later allocations."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA is not in use
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others may not
    if trim is not None:
        trim(0)


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """Let the system forget what it has of ``files``. A hint: what cannot be dropped stays."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            pass  # some file systems cannot
        finally:
            os.close(descriptor)
