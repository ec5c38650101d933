"""Reads and checks the header of a safetensors file, and nothing else of it.

Format (huggingface.co/docs/safetensors): 8 bytes little-endian length N, N bytes of JSON, then the
tensors' bytes without gaps. Written by hand because a file must be judged before any library maps
it: lengths, offsets, shapes and types are checked against the size of the file.

Must not read tensor data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, BinaryIO

from cloudlm.core.errors import BrokenModel, UnsafeModel

MAX_HEADER_BYTES = 32 << 20
_MAX_DIMENSIONS = 16
_MAX_COUNT = 1 << 48  # no tensor of this world has more elements
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "I64": 64,
    "U64": 64,
    "F64": 64,
}
_FOREIGN_BEGINNINGS = (
    (b"PK\x03\x04", "a zip archive, as PyTorch's pickled checkpoints are"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer"),
)


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One tensor: safetensors dtype word, number of elements."""

    dtype: str
    elements: int


def read_header(stream: BinaryIO, size_bytes: int, name: str) -> dict[str, TensorFacts]:
    """The tensors of the file ``name`` that is ``size_bytes`` long, by tensor name.

    Raises BrokenModel naming file and fault; UnsafeModel if the file is something else that only
    bears the name.
    """
    first = stream.read(24)
    _refuse_foreign(first, name)
    if len(first) < 8 or size_bytes < 10:
        raise BrokenModel(f"{name}: truncated: {size_bytes} bytes are too few for a header")
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise BrokenModel(
            f"{name}: the header claims {length} bytes; at most {MAX_HEADER_BYTES} are accepted "
            "(is it a safetensors file?)"
        )
    if length < 2 or 8 + length > size_bytes:
        raise BrokenModel(
            f"{name}: truncated or not safetensors: the header claims {length} bytes, the file "
            f"has {size_bytes}"
        )
    text = (first[8:] + stream.read(max(0, length - 16)))[:length]
    header = _parse(text, length, name)
    return _check_tensors(header, size_bytes - 8 - length, name)


def _refuse_foreign(first: bytes, name: str) -> None:
    for beginning, what in _FOREIGN_BEGINNINGS:
        if not first.startswith(beginning):
            continue
        # a safetensors length may begin with the same two bytes, but then JSON follows
        if len(beginning) == 2 and first[8:9] == b"{":
            continue
        if "pickle" in what or "archive" in what or "HDF5" in what:
            raise UnsafeModel(f"{name}: is {what} under a safetensors name; refused")
        raise BrokenModel(f"{name}: is {what}, not safetensors; fetch the real file")


def _parse(text: bytes, length: int, name: str) -> dict[str, Any]:
    if len(text) != length:
        raise BrokenModel(f"{name}: truncated inside the header")
    if text[:1] != b"{":
        raise BrokenModel(f"{name}: the header is not a JSON object")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise BrokenModel(f"{name}: the header is not readable JSON: {_brief(error)}") from None
    return dict(header)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _brief(error: Exception) -> str:
    return str(error)[:200] or type(error).__name__


def _check_tensors(header: dict[str, Any], data_bytes: int, name: str) -> dict[str, TensorFacts]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BrokenModel(f"{name}: __metadata__ is not an object of texts")
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorFacts] = {}
    for tensor, entry in header.items():
        facts, begin, end = _check_tensor(tensor, entry, name)
        tensors[tensor] = facts
        spans.append((begin, end, tensor))
    _check_spans(spans, data_bytes, name)
    return tensors


def _check_tensor(tensor: str, entry: Any, name: str) -> tuple[TensorFacts, int, int]:
    where = f"{name}: tensor {tensor[:120]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BrokenModel(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise BrokenModel(f"{where}: unknown dtype {str(dtype)[:40]!r}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise BrokenModel(f"{where}: shape {str(shape)[:80]} is not a list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BrokenModel(f"{where}: data_offsets {str(offsets)[:80]} are not [begin, end]")
    elements = math.prod(shape)
    if elements > _MAX_COUNT:
        raise BrokenModel(f"{where}: shape {shape} has too many elements")
    bits = elements * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise BrokenModel(
            f"{where}: {dtype} of shape {shape} needs {bits / 8:g} bytes, data_offsets give "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorFacts(dtype, elements), offsets[0], offsets[1]


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= _MAX_COUNT for value in values
    )


def _check_spans(spans: list[tuple[int, int, str]], data_bytes: int, name: str) -> None:
    spans.sort()
    expected = 0
    for begin, end, tensor in spans:
        if begin != expected:
            fault = "overlaps the one before it" if begin < expected else "leaves a gap before it"
            raise BrokenModel(f"{name}: tensor {tensor[:120]!r} {fault}")
        expected = end
    if expected > data_bytes:
        raise BrokenModel(
            f"{name}: truncated: the tensors need {expected} bytes, the file holds {data_bytes}"
        )
    if expected < data_bytes:
        raise BrokenModel(
            f"{name}: {data_bytes - expected} bytes follow the last tensor; the file is damaged"
        )
