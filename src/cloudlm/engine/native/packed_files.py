"""Packed weights on disk, so that a model is packed (and quantised) once and mapped ever after.

One file per model, precision and build of the kernels, named by a digest of these (``packed_key``):

    magic, 16 bytes | length of the header, 8 bytes | SHA-256 of the header, 32 bytes
    header, JSON: for each matrix its numbers and where its tensors lie
    the tensors, each at a multiple of ALIGNMENT

A file appears by rename when all of it is on disk, and several processes that map it share its
pages. The numbers inside are believed as those of the model's own files are: who may write into
the folder may change them, so it is its owner's alone. Nothing here raises over a file that cannot
be read or written; the log says why and the weights are packed again. Must not know networks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloudlm.engine.native import structures as c
from cloudlm.engine.native.contract import Packed
from cloudlm.engine.native.packing import PANEL

_logger = logging.getLogger(__name__)

MAGIC = b"cloudlm packed 1"
ALIGNMENT = 4096
# Below this size packing takes less time than anybody would notice.
LEAST_BYTES = 64 << 20
_BITS = {c.BF16: 16, c.INT8: 8, c.INT4: 4}
_STALE_S = 3600  # a part of this age was left behind by somebody who died
_HEADER_LIMIT = 64 << 20


def packed_key(files: Iterable[Path], *parts: str) -> str:
    """A digest of which ``files`` these are (place, size, times and number on the file system; any
    change of their bytes changes one of them), and of ``parts``. Raises OSError."""
    digest = hashlib.sha256()
    for file in files:
        facts = file.stat()
        text = f"{file.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\0{facts.st_ctime_ns}"
        digest.update(f"{text}\0{facts.st_ino}\0".encode())
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


class PackedFile:
    """The file of one ``key`` in ``folder``, which holds at most ``limit_bytes``: those go first
    that were not used for longest. Models of less than ``least_bytes`` are not kept."""

    def __init__(
        self, folder: Path, key: str, limit_bytes: int, least_bytes: int = LEAST_BYTES
    ) -> None:
        self.path = folder / f"{key}.packed"
        self._limit_bytes = limit_bytes
        self._least_bytes = least_bytes

    def read(self) -> tuple[Packed, ...]:
        """The matrices in the order in which they were written, in the file's memory; empty if
        there is no file that can be trusted."""
        try:
            if not self.path.is_file():
                return ()
            matrices = _map(self.path)
            os.utime(self.path)  # used now
            return matrices
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            self._log("packed_file_refused", error)
            return ()

    def write(self, matrices: Sequence[Packed]) -> threading.Thread | None:
        """Write them in the background; None if they will not be kept. The process does not end by
        itself before the thread does."""
        size_bytes = sum(matrix.size_bytes for matrix in matrices)
        if not self._least_bytes <= size_bytes <= self._limit_bytes:
            return None
        thread = threading.Thread(target=self._write, args=(matrices,), name="packed-weights")
        thread.start()
        return thread

    def _write(self, matrices: Sequence[Packed]) -> None:
        part = self.path.with_name(f"{self.path.stem}.{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            header, tensors, size_bytes = _layout(matrices)
            self._make_room(size_bytes)
            free = os.statvfs(self.path.parent)
            if free.f_bavail * free.f_frsize < 2 * size_bytes:
                raise OSError(f"less than {2 * size_bytes >> 20} MiB are free")
            part.touch(mode=0o600, exist_ok=False)
            with part.open("wb", buffering=0) as file:
                _put(file, header)
                for place, tensor in tensors:
                    file.seek(place)
                    _put(file, tensor.reshape(-1).view(torch.uint8).numpy().data)
                file.truncate(size_bytes)
                os.fsync(file.fileno())
            part.replace(self.path)
        except OSError as error:
            self._log("packed_file_not_written", error)
            part.unlink(missing_ok=True)

    def _make_room(self, size_bytes: int) -> None:
        """Delete files until ``size_bytes`` more are within the limit. Raises OSError."""
        now, found = time.time(), []
        for path in self.path.parent.iterdir():
            facts = path.stat()
            if path.suffix == ".part" and now - facts.st_mtime > _STALE_S:
                path.unlink(missing_ok=True)
            elif path.suffix == ".packed" and path != self.path:
                found.append((facts.st_mtime, facts.st_size, path))
        kept = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if kept + size_bytes <= self._limit_bytes:
                break
            path.unlink(missing_ok=True)  # who has mapped it keeps it until the end
            kept -= size

    def _log(self, event: str, error: Exception) -> None:
        fields = {"path": str(self.path), "reason": str(error)[:500]}
        _logger.warning(event, extra={"fields": fields})


def _put(file: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _layout(matrices: Sequence[Packed]) -> tuple[bytes, list[tuple[int, Tensor]], int]:
    """What stands before the tensors, the tensors with their places, and the size of the file."""
    entries: list[dict[str, Any]] = []
    tensors: list[tuple[int, Tensor]] = []
    place = 0
    for matrix in matrices:
        content: c.LinearContent = matrix.content
        names = [name for name, *_ in c.LinearStruct._fields_[: c.LINEAR_NUMBERS]]
        entry: dict[str, Any] = {"numbers": [getattr(content.struct, name) for name in names]}
        entry["tensors"] = [None if one is None else [0, one.nbytes] for one in content.tensors]
        for slot, tensor in zip(entry["tensors"], content.tensors, strict=True):
            if slot is not None and tensor is not None:
                slot[0] = place
                tensors.append((place, tensor))
                place = _aligned(place + tensor.nbytes)
        entries.append(entry)
    # Places count from the end of the header, whose length they would change otherwise.
    text = json.dumps({"matrices": entries, "tensor_bytes": place}).encode()
    head = MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text
    begin = _aligned(len(head))
    return head, [(begin + at, tensor) for at, tensor in tensors], begin + place


def _aligned(place: int) -> int:
    return -(-place // ALIGNMENT) * ALIGNMENT


def _map(path: Path) -> tuple[Packed, ...]:
    """The matrices of a file. Raises ValueError and its like for one that is not as written."""
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        if facts.st_uid != os.geteuid():
            raise ValueError(f"it belongs to user {facts.st_uid}, expected {os.geteuid()}")
        start = file.read(len(MAGIC) + 8 + 32)
        length = int.from_bytes(start[len(MAGIC) : len(MAGIC) + 8], "little")
        if not start.startswith(MAGIC) or length > _HEADER_LIMIT:
            raise ValueError("it does not begin as a file of packed weights")
        text = file.read(length)
    if hashlib.sha256(text).digest() != start[len(MAGIC) + 8 :]:
        raise ValueError("its header is damaged")
    header = json.loads(text)
    begin = _aligned(len(start) + length)
    if begin + header["tensor_bytes"] != facts.st_size:
        raise ValueError(f"it has {facts.st_size} bytes, expected {begin + header['tensor_bytes']}")
    memory = torch.from_file(str(path), shared=False, size=facts.st_size, dtype=torch.uint8)
    return tuple(_matrix(entry, memory[begin:]) for entry in header["matrices"])


def _matrix(entry: dict[str, Any], memory: Tensor) -> Packed:
    """One matrix out of the tensors' ``memory``. Raises ValueError if its parts do not fit."""
    numbers = [int(number) for number in entry["numbers"]]
    slots = entry["tensors"]
    for slot, size in zip(slots, _sizes(numbers, slots), strict=True):
        if (None if slot is None else slot[1]) != size:
            raise ValueError("a matrix is not as large as its numbers say")
        if slot is not None and (slot[0] % ALIGNMENT or not 0 <= slot[0] <= len(memory) - slot[1]):
            raise ValueError("a matrix lies outside of the file")
    tensors = tuple(
        None if slot is None else memory[slot[0] : slot[0] + slot[1]].view(kind)
        for slot, kind in zip(slots, c.LINEAR_TENSORS, strict=True)
    )
    _, outputs, inputs, _, _, gated, _, _ = numbers
    size = sum(slot[1] for slot in slots if slot is not None)
    return Packed(outputs, inputs, bool(gated), size, c.linear_content(numbers, tensors))


def _sizes(numbers: Sequence[int], slots: Sequence[Any]) -> tuple[int | None, ...]:
    """How many bytes each tensor of a matrix must have, None for those that it has not; zero points
    and biases are as there or not as ``slots`` are."""
    kind, outputs, inputs, k, panels, gated, group, planes = numbers
    whole = kind in _BITS and group > 0 and k % max(group, 64) == 0 and planes in (1, 2)
    width = PANEL // 2 if gated else PANEL
    if not whole or not 0 < inputs <= k or outputs < 1 or panels != -(-outputs // width):
        raise ValueError("a matrix's numbers contradict each other")
    columns = panels * PANEL
    groups = columns * (k // group)
    four = kind == c.INT4
    return (
        columns * k * _BITS[kind] // 8,
        None if kind == c.BF16 else columns * 4,
        groups * 2 if four else None,
        groups if four and slots[3] is not None else None,
        columns * 4 if slots[4] is not None else None,
    )
