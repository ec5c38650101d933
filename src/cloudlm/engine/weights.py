"""Fills a network with the tensors of safetensors files. Reads nothing that could run code.

Every header is checked (bounds, types, shapes, names) before a byte of weights is used.
Format: https://huggingface.co/docs/safetensors, a JSON header behind its 8-byte length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cloudlm.core.errors import BrokenModel, UnsafeModel, UnsupportedModel
from cloudlm.core.model import check_file_path
from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.architectures.config import read_json

if TYPE_CHECKING:
    from cloudlm.engine.parallel.split import Split

MAX_HEADER_BYTES = 100 * 2**20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, as its header describes it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


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


def weight_files(folder: Path) -> list[Path]:
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
    raise BrokenModel(f"{folder.name} holds no weights: expected {SINGLE} or {INDEX}")


def match_tensors(
    model: Decoder, files: list[Path], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, StoredTensor]:
    """For every parameter of ``model`` the tensor that fills it; of the network that ``model`` is a
    part of, if that one's parameters have ``shapes``.

    Raises BrokenModel for a tensor that is missing, unknown, doubled or of the wrong shape, and
    UnsupportedModel for number types that are not run.
    """
    wanted = shapes or {name: tuple(one.shape) for name, one in model.named_parameters()}
    found: dict[str, StoredTensor] = {}
    for tensor in (tensor for file in files for tensor in read_header(file).values()):
        name = model.parameter_name(tensor.name)
        if name is None:
            continue
        where = f"{tensor.file.name}: tensor {tensor.name[:120]!r}"
        if name not in wanted:
            raise BrokenModel(f"{where} is not a part of {type(model).__name__}")
        if name in found:
            raise BrokenModel(f"{where} is also in {found[name].file.name}")
        if tensor.dtype not in _ITEM_BYTES:
            raise UnsupportedModel(
                f"{where} is of type {tensor.dtype[:20]}; supported: {', '.join(_ITEM_BYTES)}"
            )
        if tensor.shape != wanted[name]:
            raise BrokenModel(
                f"{where} has shape {list(tensor.shape)}, config.json asks for {list(wanted[name])}"
            )
        found[name] = tensor
    missing = [name for name in wanted if name not in found]
    if missing:
        names = ", ".join(file.name for file in files[:3]) + (" …" if len(files) > 3 else "")
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BrokenModel(f"{names}: tensor {missing[0]!r}{more} missing")
    return found


def load_weights(
    model: Decoder,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
    copy: bool = True,
    split: Split | None = None,
) -> None:
    """Fill ``model``, which was built on the meta device, from the files of ``folder``.

    One tensor at a time is read, converted and put in its place, so the memory needed is that of
    the loaded model. ``progress`` is told the share that is done, 0 to 1. Without ``copy`` a tensor
    that has the right type already stays in the file's memory: for who copies it anyway, at once.
    With ``split`` the ``model`` is a part of a network, and only that part is read.
    Raises as ``weight_files`` and ``match_tensors``.
    """
    files = weight_files(folder)
    found = match_tensors(model, files, None if split is None else split.shapes)
    if split is not None:
        found = {name: found[name] for name, _ in model.named_parameters()}
    total = sum(math.prod(tensor.shape) for tensor in found.values()) or 1
    loaded: dict[str, Tensor] = {}
    done = 0
    for file in files:
        here = [(name, tensor) for name, tensor in found.items() if tensor.file == file]
        try:
            with safe_open(file, framework="pt") as opened:
                for name, tensor in here:
                    # The copy is ours: a file that changes on disk cannot change a served model.
                    read = _read(opened, tensor.name, name, split)
                    loaded[name] = read.to(device, dtype, copy=copy)
                    done += math.prod(tensor.shape)
                    if progress is not None:
                        progress(done / total)
        except (SafetensorError, OSError) as error:
            raise BrokenModel(f"{file.name} cannot be read: {error}") from error
    model.load_state_dict(loaded, strict=True, assign=True)
    model.requires_grad_(False)


def _read(opened: Any, stored: str, name: str, split: Split | None) -> Tensor:
    """The tensor ``stored`` of an open file, or what a part of the network needs of it."""
    if split is not None and name in split.zeroed:
        return torch.zeros(split.shapes[name])
    cut = None if split is None else split.cuts.get(name)
    tensor: Tensor = opened.get_tensor(stored) if cut is None else cut.of(opened.get_slice(stored))
    return tensor
