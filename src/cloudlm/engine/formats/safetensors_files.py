"""Safetensors files as a checkpoint: headers checked, tensors read one by one.

Every header is checked (bounds, types, shapes, names) before a byte of weights is used.
Format: https://huggingface.co/docs/safetensors, a JSON header behind its 8-byte length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cloudlm.core.errors import BrokenModel, UnsafeModel
from cloudlm.core.model import check_file_path
from cloudlm.engine.architectures.config import read_json
from cloudlm.engine.formats.base import Entry

MAX_HEADER_BYTES = 100 * 2**20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "I8": 1, "U8": 1}
FLOATING = ("F64", "F32", "F16", "BF16")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, as its header describes it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def where(self) -> str:
        return f"{self.file.name}: tensor {self.name[:120]!r}"


class Tensors:
    """All tensors of some files by name, read when asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._opened: dict[Path, Any] = {}
        self.stored: dict[str, StoredTensor] = {}
        for file in files:
            for name, tensor in read_header(file).items():
                if name in self.stored:
                    raise BrokenModel(f"{tensor.where} is also in {self.stored[name].file.name}")
                self.stored[name] = tensor

    def read(self, tensor: StoredTensor) -> Tensor:
        """The tensor in its file's memory. Raises BrokenModel."""
        try:
            if tensor.file not in self._opened:
                self._opened[tensor.file] = safe_open(tensor.file, framework="pt")
            found: Tensor = self._opened[tensor.file].get_tensor(tensor.name)
        except (SafetensorError, OSError) as error:
            raise BrokenModel(f"{tensor.file.name} cannot be read: {error}") from error
        return found

    def part(self, name: str, kinds: Iterable[str], shape: tuple[int | None, ...]) -> StoredTensor:
        """A tensor that belongs to a quantised matrix; None in ``shape`` is any size. Raises
        BrokenModel if it is missing or different."""
        tensor = self.stored.get(name)
        if tensor is None:
            file = next(iter(self.stored.values())).file.name
            raise BrokenModel(f"{file}: tensor {name[:120]!r} is missing, its matrix is quantised")
        fits = len(tensor.shape) == len(shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
        )
        if tensor.dtype not in kinds or not fits:
            raise BrokenModel(
                f"{tensor.where} is {tensor.dtype} of shape {list(tensor.shape)}, expected "
                f"{' or '.join(kinds)} of shape {[size or 'any' for size in shape]}"
            )
        return tensor

    def plain(self, tensor: StoredTensor, *, idle: bool = False) -> Entry:
        """A tensor of floating-point numbers as an entry."""
        fault = ""
        if tensor.dtype not in FLOATING:
            fault = f"is of type {tensor.dtype[:20]}; supported: {', '.join(FLOATING)}"
        floats: Callable[[torch.dtype, bool], Tensor] = partial(self._floats, tensor)
        return Entry(
            tensor.file,
            tensor.name,
            tensor.where,
            tensor.shape,
            floats,
            fault=fault,
            idle=idle,
            stored=partial(self.read, tensor),
        )

    def _floats(self, tensor: StoredTensor, dtype: torch.dtype, copy: bool) -> Tensor:
        return self.read(tensor).to(dtype, copy=copy)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; no weights are read.

    Raises BrokenModel if the header is cut, is not JSON, or does not describe the file's bytes
    exactly: offsets in bounds, neither gaps nor overlaps, each as long as its shape demands.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size_bytes < 8 or length > min(MAX_HEADER_BYTES, size_bytes - 8):
                raise BrokenModel(f"{path.name}: the header does not fit into the file; it is cut")
            header = json.loads(file.read(length))
    except OSError as error:
        raise BrokenModel(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        raise BrokenModel(f"{path.name}: the header is not valid JSON") from None
    if not isinstance(header, dict):
        raise BrokenModel(f"{path.name}: the header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _described(path, name, entry) for name, entry in header.items()}
    spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    position = 0
    for begin, end in spans:
        if begin != position:
            raise BrokenModel(f"{path.name}: tensors overlap or leave gaps at byte {position}")
        position = end
    if position != size_bytes - 8 - length:
        raise BrokenModel(
            f"{path.name} holds {size_bytes - 8 - length} bytes of tensors, "
            f"its header describes {position}; the file is cut or damaged"
        )
    return tensors


def _described(path: Path, name: str, entry: Any) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        numbers = [None]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
    if not whole or not isinstance(dtype, str):
        raise BrokenModel(f"{path.name}: the header's entry for {name[:120]!r} is malformed")
    item_bytes = _ITEM_BYTES.get(dtype)
    if end < begin or (item_bytes and end - begin != item_bytes * math.prod(shape)):
        raise BrokenModel(
            f"{path.name}: tensor {name[:120]!r} of type {dtype} and shape {shape} "
            f"cannot be bytes {begin} to {end}"
        )
    return StoredTensor(path, name, dtype, tuple(shape))


def safetensors_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those of the index, or the single one.

    Raises UnsafeModel if there are pickled weights only, BrokenModel if there are none or a shard
    is missing.
    """
    if (folder / INDEX).is_file():
        entries = read_json(folder / INDEX).get("weight_map")
        if not isinstance(entries, dict) or not entries:
            raise BrokenModel(f"{INDEX} has no weight_map")
        names = sorted({str(name) for name in entries.values()})
        files = [folder / check_file_path(name) for name in names]
        for file in files:
            if not file.is_file():
                raise BrokenModel(f"{file.name} is missing, {INDEX} names it")
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        raise UnsafeModel(
            f"{pickled[0]} may hold pickled data, which could run code, and is not read; "
            "convert the model to safetensors"
        )
    raise BrokenModel(f"{folder.name} holds no weights: expected {SINGLE}, {INDEX} or a GGUF file")
