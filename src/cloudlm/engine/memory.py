"""Giving memory back to the system, which freeing alone does not always do."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterable
from pathlib import Path

import torch

_MADV_DONTNEED = 4  # Linux


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


def forget_mapped(tensors: Iterable[torch.Tensor]) -> None:
    """Give back the memory pages of ``tensors`` that lie in mapped files: touched again, they come
    from the file, so nobody may have written to them. Memory that belongs to no file, or to a
    mapping that can be written through to its file, is left alone. Does nothing where the system
    has no /proc/self/maps."""
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    files = _private_files()
    if advise is None or not files:
        return
    page = os.sysconf("SC_PAGE_SIZE")
    for tensor in tensors:
        begin = -(-tensor.data_ptr() // page) * page
        end = (tensor.data_ptr() + tensor.nbytes) // page * page
        if begin < end and any(first <= begin and end <= last for first, last in files):
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def _private_files() -> list[tuple[int, int]]:
    """First and last address of every private mapping of a file in this process."""
    try:
        lines = Path("/proc/self/maps").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for fields in (line.split(maxsplit=5) for line in lines):
        if len(fields) == 6 and fields[1].endswith("p") and fields[5].startswith("/"):
            first, last = fields[0].split("-")
            found.append((int(first, 16), int(last, 16)))
    return found
