"""Local copies: shared, resumed, repaired, evicted, never while in use."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cloudlm.core.errors import CorruptModel, StorageFailed
from cloudlm.registry.registry import Registry
from cloudlm.registry.stores.memory import MemoryStore

RegistryOn = Callable[..., Registry]


def _import(registry: Registry, model_at: Callable[..., Path], folder: Path, count: int) -> int:
    """Versions 1 to ``count``; the size of one in bytes."""
    for number in range(1, count + 1):
        manifest = registry.import_folder(model_at(folder / str(number), fill=number), "tiny")
    return manifest.size_bytes


def test_the_longest_unused_goes_first_and_one_in_use_never(
    tmp_path: Path, model_at: Callable[..., Path], registry_on: RegistryOn
) -> None:
    store = MemoryStore()
    size = _import(registry_on(store), model_at, tmp_path, 4)
    user, other = (registry_on(store, cache_bytes=2 * size + 10) for _ in range(2))
    first = user.fetch("tiny/1")
    second = other.fetch("tiny/2")
    os.utime(first.parent / "lock", (1, 1))  # the oldest, but in use
    other.close()
    third = other.fetch("tiny/3")
    assert first.exists()
    assert not second.exists()
    with pytest.raises(StorageFailed, match=r"full of versions in use.*cache_mb"):
        other.fetch("tiny/4")
    other.release(third)
    assert other.fetch("tiny/4").exists()
    assert not third.exists()
    user.close()
    other.close()


def test_a_version_larger_than_the_cache(
    tmp_path: Path, model_at: Callable[..., Path], registry_on: RegistryOn
) -> None:
    registry = registry_on(MemoryStore(), cache_bytes=100)
    _import(registry, model_at, tmp_path, 1)
    with pytest.raises(StorageFailed, match=r"registry\.cache_mb"):
        registry.fetch("tiny")


def test_a_lock_vanishes_with_its_process(
    tmp_path: Path, model_at: Callable[..., Path], registry_on: RegistryOn
) -> None:
    store = MemoryStore()
    size = _import(registry_on(store), model_at, tmp_path, 2)
    registry = registry_on(store, cache_bytes=size + 10)
    folder = registry.fetch("tiny/1")
    registry.close()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl,sys,time; f=open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_SH);"
            "print('held', flush=True); time.sleep(60)",
            str(folder.parent / "lock"),
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(StorageFailed, match="in use"):
        registry.fetch("tiny/2")
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert registry.fetch("tiny/2").exists()
    registry.close()


def test_parallel_callers_download_once(
    tmp_path: Path, model_at: Callable[..., Path], registry_on: RegistryOn
) -> None:
    opened: list[str] = []

    class Counting(MemoryStore):
        def open(self, key: str) -> object:  # type: ignore[override]
            opened.append(key)
            return super().open(key)

    store = Counting()
    _import(registry_on(store), model_at, tmp_path, 1)
    start, folders = threading.Barrier(4), []
    registries = [registry_on(store) for _ in range(4)]

    def run(registry: Registry) -> None:
        start.wait()
        folders.append(registry.fetch("tiny"))

    threads = [threading.Thread(target=run, args=(registry,)) for registry in registries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for registry in registries:
        registry.close()
    assert len(set(folders)) == 1
    assert len(folders) == 4
    assert len(opened) == 4  # each of the four files once


def test_a_cancelled_download_goes_on_where_it_stopped(
    tmp_path: Path, model_at: Callable[..., Path], registry: Registry
) -> None:
    _import(registry, model_at, tmp_path, 1)

    class Cancelled(Exception):
        pass

    def cancel(done: int, total: int, what: str) -> None:
        if what == "downloading tokenizer.json":
            raise Cancelled

    with pytest.raises(Cancelled):
        registry.fetch("tiny", cancel)
    assert not list((tmp_path / "cache" / "versions").glob("*/files"))
    told: list[str] = []
    registry.fetch("tiny", lambda done, total, what: told.append(what))
    assert not [what for what in told if "model.safetensors" in what]


@pytest.mark.promise(12)
@pytest.mark.known_failure("tt-inference-server#4986")
@pytest.mark.parametrize("leftover", [b"", b"{", b"garbage", b"x" * 10_000])
def test_a_half_written_leftover_is_continued_or_replaced(
    tmp_path: Path, model_at: Callable[..., Path], registry: Registry, leftover: bytes
) -> None:
    _import(registry, model_at, tmp_path, 1)

    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.fetch("tiny", stop)
    (part,) = (tmp_path / "cache" / "versions").glob("*/part")
    (part / "config.json").write_bytes(leftover)
    folder = registry.fetch("tiny")
    assert (folder / "config.json").read_bytes() == (tmp_path / "1" / "config.json").read_bytes()


@pytest.mark.promise(12)
def test_a_damaged_copy_is_fetched_anew(
    tmp_path: Path, model_at: Callable[..., Path], registry: Registry
) -> None:
    _import(registry, model_at, tmp_path, 1)
    folder = registry.fetch("tiny")
    (folder / "model.safetensors").write_bytes(b"x" * (folder / "model.safetensors").stat().st_size)
    again = registry.fetch("tiny")
    assert (again / "model.safetensors").read_bytes()[:1] != b"x"
    told: list[str] = []
    registry.fetch("tiny", lambda done, total, what: told.append(what))
    assert not told  # and remembered as verified
    registry.close()


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b"y" * len(b)])
def test_damage_in_the_store_is_named(
    tmp_path: Path,
    model_at: Callable[..., Path],
    registry: Registry,
    damage: Callable[[bytes], bytes],
) -> None:
    _import(registry, model_at, tmp_path, 1)
    (key,) = (k for k in registry.store.list("files/") if k.endswith("model.safetensors"))
    registry.store.put(key, damage(registry.store.get(key)))
    with pytest.raises(CorruptModel, match=r"model\.safetensors is damaged in the store"):
        registry.fetch("tiny")
    assert not list((tmp_path / "cache" / "versions").glob("*/files"))


def test_an_unwritable_cache_says_what_to_do(
    tmp_path: Path, model_at: Callable[..., Path], registry: Registry
) -> None:
    _import(registry, model_at, tmp_path, 1)
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(StorageFailed, match="cache"):
        registry.fetch("tiny")
