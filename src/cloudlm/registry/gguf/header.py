"""Reads and checks the header of a GGUF file: settings and where the tensors lie.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. Written by hand
because a file comes from strangers: every length and count is compared with what is left of the
file, and with a limit, before anything is read or allocated for it.

Must not read tensor data, and must not know what the settings mean.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cloudlm.core.errors import BrokenModel, UnsupportedModel
from cloudlm.registry.stores.failures import storage_failures

MAX_HEADER_BYTES = 256 << 20
_MAX_SETTINGS = 1 << 16
_MAX_TENSORS = 1 << 17
_MAX_ITEMS = 1 << 21
_MAX_TEXT_BYTES = 16 << 20
_MAX_NAME_BYTES = 1 << 10
_MAX_DIMENSIONS = 4
_MAX_ELEMENTS = 1 << 48
_TEXT, _ARRAY = 8, 9
_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip

Scalar = int | float | bool | str
Value = Scalar | list[Scalar]


@dataclass(frozen=True, slots=True)
class Kind:
    """How a tensor's numbers are stored: blocks of ``elements`` in ``size_bytes``."""

    name: str
    elements: int
    size_bytes: int


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    10: Kind("Q2_K", 256, 84),
    11: Kind("Q3_K", 256, 110),
    12: Kind("Q4_K", 256, 144),
    13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
    30: Kind("BF16", 1, 2),
}
"""The kinds that the engine reads, by their number in files."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: ``shape`` with rows first; its data begin at byte ``offset`` of the file."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """``name`` is the file's, for errors."""

    name: str
    settings: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path, name: str | None = None) -> GgufHeader:
    """The header of ``path``. Raises BrokenModel naming file and fault, UnsupportedModel for
    versions and kinds of numbers that are not read, StorageFailed."""
    with storage_failures(path, "read"), path.open("rb") as stream:
        return read_header(stream, path.stat().st_size, name or path.name)


def read_header(stream: BinaryIO, size_bytes: int, name: str) -> GgufHeader:
    """The header of a stream that is ``size_bytes`` long. Raises as ``read_gguf``."""
    source = _Source(stream, size_bytes, name)
    if source.take(4) != b"GGUF":
        raise source.broken("is not a GGUF file: it does not begin with GGUF")
    version = source.number("I")
    if version not in (2, 3):
        raise UnsupportedModel(
            f"{name}: GGUF version {version} is not read; expected 2 or 3, little-endian "
            "(convert the model again with a present llama.cpp)"
        )
    tensor_count, setting_count = source.number("Q"), source.number("Q")
    if tensor_count > _MAX_TENSORS or setting_count > _MAX_SETTINGS:
        raise source.broken(f"claims {tensor_count} tensors and {setting_count} settings")
    settings: dict[str, Value] = {}
    for _ in range(setting_count):
        key = source.text(_MAX_NAME_BYTES)
        if key in settings:
            raise source.broken(f"setting {key[:80]!r} occurs twice")
        settings[key] = source.value(key)
    described = [_describe(source) for _ in range(tensor_count)]
    return GgufHeader(name, settings, _place(described, source, _alignment(settings, source)))


class _Source:
    """The bytes of a header, none of which is asked for unless it is there."""

    def __init__(self, stream: BinaryIO, size_bytes: int, name: str) -> None:
        self._stream = stream
        self._left = min(size_bytes, MAX_HEADER_BYTES)
        self._cut = size_bytes <= MAX_HEADER_BYTES
        self.size_bytes = size_bytes
        self.name = name
        self.position = 0

    def broken(self, fault: str) -> BrokenModel:
        return BrokenModel(f"{self.name}: {fault}; the file is damaged or no model")

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if count > self._left:
            if self._cut:
                raise self.broken(f"truncated inside the header, at byte {self.position}")
            raise self.broken(f"the header is longer than {MAX_HEADER_BYTES} bytes")
        taken = self._stream.read(count)
        if len(taken) != count:
            raise self.broken(f"truncated inside the header, at byte {self.position}")
        self._left -= count
        self.position += count
        return taken

    def number(self, form: str) -> int:
        """One little-endian number."""
        return int(struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0])

    def text(self, limit: int = _MAX_TEXT_BYTES) -> str:
        """A text behind its length."""
        length = self.number("Q")
        if length > limit:
            raise self.broken(f"a text at byte {self.position} claims {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.broken(f"a text before byte {self.position} is not UTF-8") from None

    def value(self, key: str) -> Value:
        """A setting's value behind its type."""
        kind = self.number("I")
        if kind != _ARRAY:
            return self._items(kind, 1, key)[0]
        kind, count = self.number("I"), self.number("Q")
        if count > _MAX_ITEMS:
            raise self.broken(f"setting {key[:80]!r} claims {count} values")
        return self._items(kind, count, key)

    def _items(self, kind: int, count: int, key: str) -> list[Scalar]:
        if kind == _TEXT:
            return [self.text() for _ in range(count)]
        if kind not in _NUMBERS:
            raise self.broken(f"setting {key[:80]!r} is of unknown type {kind}")
        form = f"<{count}{_NUMBERS[kind]}"
        return list(struct.unpack(form, self.take(struct.calcsize(form))))


def _alignment(settings: Mapping[str, Value], source: _Source) -> int:
    alignment = settings.get("general.alignment", 32)
    sound = type(alignment) is int and 8 <= alignment <= 1 << 16 and alignment % 8 == 0
    if not sound:
        raise source.broken(f"general.alignment is {str(alignment)[:40]}")
    return int(alignment)  # type: ignore[arg-type]


def _describe(source: _Source) -> tuple[str, Kind, tuple[int, ...], int]:
    """Name, kind, shape, and the offset inside the data."""
    name = source.text(_MAX_NAME_BYTES)
    count = source.number("I")
    if not 1 <= count <= _MAX_DIMENSIONS:
        raise source.broken(f"tensor {name[:80]!r} claims {count} dimensions")
    shape = tuple(source.number("Q") for _ in range(count))[::-1]
    number, offset = source.number("I"), source.number("Q")
    kind = KINDS.get(number)
    if kind is None:
        raise UnsupportedModel(
            f"{source.name}: tensor {name[:80]!r} is of kind {number}, which is not read; "
            f"supported: {', '.join(one.name for one in KINDS.values())}"
        )
    if not all(shape) or math.prod(shape) > _MAX_ELEMENTS or shape[-1] % kind.elements:
        raise source.broken(f"tensor {name[:80]!r} of {kind.name} cannot have shape {shape}")
    return name, kind, shape, offset


def _place(
    described: list[tuple[str, Kind, tuple[int, ...], int]], source: _Source, alignment: int
) -> dict[str, GgufTensor]:
    """Where every tensor lies, once all lie inside the file and none in another."""
    begin = -(-source.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in described:
        size = math.prod(shape) // kind.elements * kind.size_bytes
        if name in tensors:
            raise source.broken(f"tensor {name[:80]!r} occurs twice")
        if offset % alignment or begin + offset + size > source.size_bytes:
            raise BrokenModel(
                f"{source.name}: tensor {name[:80]!r} needs {size} bytes from {begin + offset}, "
                f"the file has {source.size_bytes}; it is truncated or damaged"
            )
        tensors[name] = GgufTensor(name, kind, shape, begin + offset, size)
    end = 0
    for tensor in sorted(tensors.values(), key=lambda one: one.offset):
        if tensor.offset < end:
            raise source.broken(f"tensor {tensor.name[:80]!r} overlaps the one before it")
        end = tensor.offset + tensor.size_bytes
    return tensors
