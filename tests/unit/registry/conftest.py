"""Tiny models, stores that fail, and registries for the registry's tests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from cloudlm.core.clock import ManualClock
from cloudlm.registry.registry import Registry
from cloudlm.registry.stores.base import BytesMoved, Store
from cloudlm.registry.stores.memory import MemoryStore

_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "I64": 8}


def safetensors_bytes(tensors: Mapping[str, tuple[str, list[int]]], fill: int = 0) -> bytes:
    """A well-formed safetensors file; every tensor byte is ``fill``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes([fill]) * offset


def write_model(folder: Path, *, fill: int = 1, **config: Any) -> Path:
    """A complete tiny model folder; ``fill`` makes its bytes differ from another's."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 512,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(body))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}}}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    tensors = {"embed.weight": ("F32", [8, 4]), "norm.weight": ("BF16", [4])}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, fill))
    return folder


class Killed(BaseException):
    """The process of a test was killed; nothing it does afterwards reaches the store."""


class DyingStore:
    """A store whose process dies at its ``k``-th change, before or after carrying it out."""

    def __init__(self, inner: Store, die_at: int, *, after: bool = False) -> None:
        self.inner = inner
        self.die_at = die_at
        self.after = after
        self.changes = 0

    def _change(self, act: Callable[[], Any]) -> Any:
        self.changes += 1
        if self.changes > self.die_at or (self.changes == self.die_at and not self.after):
            raise Killed
        result = act()
        if self.changes == self.die_at:
            raise Killed
        return result

    def get(self, key: str) -> bytes:
        if self.changes >= self.die_at:
            raise Killed
        return self.inner.get(key)

    def open(self, key: str) -> BinaryIO:
        return self.inner.open(key)

    def put(self, key: str, data: bytes) -> None:
        self._change(lambda: self.inner.put(key, data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return bool(self._change(lambda: self.inner.put_if_absent(key, data)))

    def put_file(self, key: str, path: Path, progress: BytesMoved | None = None) -> None:
        self._change(lambda: self.inner.put_file(key, path, progress))

    def list(self, prefix: str) -> Iterator[str]:
        return self.inner.list(prefix)

    def delete(self, key: str) -> None:
        self._change(lambda: self.inner.delete(key))

    def local_path(self, key: str) -> Path | None:
        return self.inner.local_path(key)

    def sweep(self) -> int:
        return self.inner.sweep()


@pytest.fixture
def safetensors() -> Callable[..., bytes]:
    return safetensors_bytes


@pytest.fixture
def model_at() -> Callable[..., Path]:
    """``model_at(folder, fill=1, **config)`` writes a tiny model."""
    return write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny")


@pytest.fixture
def killed() -> type[Killed]:
    return Killed


@pytest.fixture
def dying_store() -> type[DyingStore]:
    return DyingStore


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def registry_on(tmp_path: Path, clock: ManualClock) -> Callable[..., Registry]:
    """``registry_on(store, cache_bytes=…, owner=…)``; each call is another process' registry."""

    def make(store: Store, cache_bytes: int = 1 << 20, owner: str | None = None) -> Registry:
        return Registry(
            store, cache_dir=tmp_path / "cache", cache_bytes=cache_bytes, clock=clock, owner=owner
        )

    return make


@pytest.fixture
def registry(registry_on: Callable[..., Registry]) -> Iterator[Registry]:
    """In memory, so that every fetch goes through the cache."""
    with registry_on(MemoryStore()) as made:
        yield made
