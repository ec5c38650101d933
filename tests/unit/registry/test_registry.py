"""Import, versions, aliases, removal, fetching."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cloudlm.core.clock import ManualClock
from cloudlm.core.errors import (
    BrokenModel,
    Conflict,
    CorruptModel,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    StorageFailed,
    UnsafeModel,
)
from cloudlm.core.model import ModelRef
from cloudlm.core.settings import RegistrySettings
from cloudlm.registry.records import StoredVersion, files_prefix, read_stored_version
from cloudlm.registry.registry import Registry, open_registry
from cloudlm.registry.stores.file import FileStore
from cloudlm.registry.stores.memory import MemoryStore

ModelAt = Callable[..., Path]


def test_import_then_resolve_then_fetch(
    registry: Registry, model: Path, clock: ManualClock
) -> None:
    manifest = registry.import_folder(model, "tiny", alias="champion", licence="mit")
    assert manifest.ref == "models:/tiny/1"
    assert manifest.licence == "mit"
    assert manifest.created_at == clock.now()
    assert manifest.lineage == {"source": model.as_uri()}
    assert not manifest.already_registered
    for ref in ("models:/tiny/1", "tiny", "models:/tiny@champion", ModelRef("tiny", version=1)):
        assert registry.resolve(ref) == manifest
    folder = registry.fetch("models:/tiny@champion")
    for file in model.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert len(list(folder.iterdir())) == 4


def test_numbers_go_up_and_equal_bytes_are_one_version(
    registry: Registry, model: Path, tmp_path: Path, model_at: ModelAt
) -> None:
    first = registry.import_folder(model, "tiny")
    second = registry.import_folder(model_at(tmp_path / "other", fill=2), "tiny")
    again = registry.import_folder(model, "tiny", alias="old")
    assert (first.version, second.version, again.version) == (1, 2, 1)
    assert again.already_registered
    assert registry.list_aliases("tiny") == {"old": 1}
    assert [manifest.version for manifest in registry.list_versions("tiny")] == [1, 2]
    assert registry.resolve("tiny").version == 2
    assert registry.import_folder(model, "twin").version == 1
    assert registry.list_models() == ["tiny", "twin"]
    assert not list(registry.store.list("uploads/"))


def test_unknown_models_versions_and_aliases_name_what_there_is(
    registry: Registry, model: Path
) -> None:
    with pytest.raises(ModelNotFound, match="registered: none"):
        registry.resolve("tiny")
    registry.import_folder(model, "tiny", alias="champion")
    with pytest.raises(ModelNotFound, match="'other' is not registered; registered: tiny"):
        registry.resolve("models:/other")
    with pytest.raises(ModelNotFound, match="no version 7; it has: 1"):
        registry.resolve("models:/tiny/7")
    with pytest.raises(ModelNotFound, match="no alias 'best'; it has: champion"):
        registry.resolve("models:/tiny@best")
    with pytest.raises(ModelNotFound, match="'other'"):
        registry.resolve("models:/other@best")
    with pytest.raises(ModelNotFound):
        registry.list_versions("other")


def test_aliases_move_and_go(
    registry: Registry, model: Path, tmp_path: Path, model_at: ModelAt
) -> None:
    registry.import_folder(model, "tiny", alias="champion")
    registry.import_folder(model_at(tmp_path / "other", fill=2), "tiny")
    registry.set_alias("tiny", "champion", 2)
    assert registry.resolve("tiny@champion").version == 2
    with pytest.raises(ModelNotFound):
        registry.set_alias("tiny", "champion", 3)
    registry.remove_alias("tiny", "champion")
    with pytest.raises(NotFound, match="champion"):
        registry.remove_alias("tiny", "champion")
    for bad in ("", "Champion", "1", "a/b", "../x"):
        with pytest.raises(InvalidRequest):
            registry.set_alias("tiny", bad, 1)


def test_removal_keeps_the_number_and_spares_what_an_alias_names(
    registry: Registry, model: Path, tmp_path: Path, model_at: ModelAt
) -> None:
    registry.import_folder(model, "tiny")
    registry.import_folder(model_at(tmp_path / "other", fill=2), "tiny", alias="champion")
    for ref in ("tiny/2", "tiny@champion", "tiny"):
        with pytest.raises(Conflict, match="tiny@champion"):
            registry.remove(ref)
    registry.remove_alias("tiny", "champion")
    assert [manifest.version for manifest in registry.remove("tiny/2")] == [2]
    assert [manifest.version for manifest in registry.list_versions("tiny")] == [1]
    third = registry.import_folder(tmp_path / "other", "tiny")
    assert third.version == 3  # 2 is never given again
    assert [manifest.version for manifest in registry.remove("tiny")] == [1, 3]
    assert registry.list_models() == []
    assert not list(registry.store.list("files/"))
    with pytest.raises(ModelNotFound):
        registry.remove("tiny")


@pytest.mark.promise(14)
@pytest.mark.parametrize("name", ["", "..", "A", "a/b", "a\0", "-a", "x" * 65, "a..b"])
def test_hostile_names(registry: Registry, model: Path, name: str) -> None:
    with pytest.raises(InvalidRequest):
        registry.import_folder(model, name)
    with pytest.raises(InvalidRequest):
        registry.resolve(ModelRef(name))
    assert list(registry.store.list("")) == []


def test_a_refused_folder_registers_nothing(registry: Registry, model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(BrokenModel):
        registry.import_folder(model, "tiny")
    assert list(registry.store.list("")) == []


def test_a_file_that_changes_during_the_import(registry: Registry, model: Path) -> None:
    def meddle(done: int, total: int, what: str) -> None:
        if what == "storing model.safetensors":
            with (model / "model.safetensors").open("r+b") as stream:
                stream.seek(-1, os.SEEK_END)
                stream.write(b"\x07")
            os.utime(model / "model.safetensors", ns=(1, 1))

    with pytest.raises(BrokenModel, match=r"model\.safetensors: changed"):
        registry.import_folder(model, "tiny", progress=meddle)
    assert list(registry.store.list("")) == []


def test_progress_goes_from_nothing_to_all(registry: Registry, model: Path) -> None:
    told: list[tuple[int, int]] = []
    registry.import_folder(
        model, "tiny", progress=lambda done, all_, what: told.append((done, all_))
    )
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


def test_a_full_store_is_reported_and_leaves_nothing(registry: Registry, model: Path) -> None:
    def full(*args: object) -> None:
        raise StorageFailed("the disk is full")

    store = registry.store
    store.put_file = full  # type: ignore[method-assign]
    with pytest.raises(StorageFailed):
        registry.import_folder(model, "tiny")
    assert list(store.list("")) == []


@pytest.mark.promise(12)
@pytest.mark.known_failure("tt-inference-server#4986", "Comfy-Desktop#1322")
def test_a_killed_import_is_invisible_and_can_be_repeated(
    tmp_path: Path,
    model: Path,
    model_at: ModelAt,
    registry_on: Callable[..., Registry],
    dying_store: type,
    killed: type[BaseException],
) -> None:
    dead = "other-boot:pid[1]:1:1"
    survived = False
    for after in (False, True):
        for die_at in range(1, 40):
            inner = MemoryStore()
            registry_on(inner).import_folder(model_at(tmp_path / "v1", fill=9), "tiny")
            before = list(inner.list(""))
            store = dying_store(inner, die_at, after=after)
            try:
                registry_on(store, owner=dead).import_folder(model, "tiny", alias="champion")
                survived = True
            except killed:
                survived = False
            found = registry_on(inner)
            for manifest in found.list_versions("tiny"):
                assert len(list(found.fetch(manifest.ref).iterdir())) == 4
            found.close()
            if survived:
                break
            manifest = found.import_folder(model, "tiny", alias="champion")
            assert manifest.version == 2
            assert found.resolve("tiny@champion") == manifest
            found._clock._elapsed = 90_000.0  # a day later
            found.collect_garbage()
            found._clock._elapsed = 0.0
            left = {key for key in inner.list("") if not key.startswith(("files/", "aliases/"))}
            assert left == {"manifests/tiny/1.json", "manifests/tiny/2.json"}
            uploads = {key.split("/")[2] for key in inner.list("files/")}
            assert len(uploads) == 2
            assert set(before) <= set(inner.list(""))
        assert survived


def test_a_killed_removal_is_finished_later(
    model: Path,
    registry_on: Callable[..., Registry],
    dying_store: type,
    killed: type[BaseException],
) -> None:
    for die_at in range(1, 7):
        inner = MemoryStore()
        registry_on(inner).import_folder(model, "tiny")
        with pytest.raises(killed):
            registry_on(dying_store(inner, die_at)).remove("tiny")
        found = registry_on(inner)
        if die_at <= 2:  # its intent, and the manifest
            assert found.resolve("tiny").version == 1
            continue
        assert found.list_models() == []
        found._clock._elapsed = 90_000.0  # a day later
        found.collect_garbage()
        found._clock._elapsed = 0.0
        assert list(inner.list("")) == ["manifests/tiny/1.json"]


def test_garbage_of_living_imports_is_left_alone(
    model: Path, registry_on: Callable[..., Registry], clock: ManualClock
) -> None:
    store = MemoryStore()
    collected: list[int] = []

    def collect(done: int, total: int, what: str) -> None:
        if what.startswith("storing"):
            collected.append(registry_on(store).collect_garbage())

    registry = registry_on(store)
    manifest = registry.import_folder(model, "tiny", progress=collect)
    assert collected
    assert not any(collected)
    assert len(list(registry.fetch(manifest.ref).iterdir())) == 4
    registry.close()


def test_an_import_that_was_given_up_says_so(
    model: Path, registry_on: Callable[..., Registry], clock: ManualClock
) -> None:
    store = MemoryStore()

    def stall(done: int, total: int, what: str) -> None:
        if what == "storing tokenizer.json":  # the last file
            clock._elapsed += 25 * 3600
            registry_on(store).collect_garbage()

    with pytest.raises(Conflict, match="import it again"):
        registry_on(store).import_folder(model, "tiny", progress=stall)
    assert list(store.list("")) == []


def test_concurrent_imports_get_different_numbers(
    tmp_path: Path, model_at: ModelAt, registry_on: Callable[..., Registry]
) -> None:
    store = FileStore(tmp_path / "store")
    folders = [model_at(tmp_path / f"m{n}", fill=n) for n in range(1, 7)]
    start, versions = threading.Barrier(6), []

    def run(folder: Path) -> None:
        start.wait()
        versions.append(registry_on(store).import_folder(folder, "tiny").version)

    threads = [threading.Thread(target=run, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == [1, 2, 3, 4, 5, 6]


def test_a_lost_answer_does_not_make_two_versions(
    model: Path, registry_on: Callable[..., Registry]
) -> None:
    class Forgetful(MemoryStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            super().put_if_absent(key, data)
            return False  # the put was repeated and found itself

    registry = registry_on(Forgetful())
    assert registry.import_folder(model, "tiny").version == 1
    assert len(registry.list_versions("tiny")) == 1


# -- what was altered later


def _in_folder(tmp_path: Path, registry_on: Callable[..., Registry]) -> Registry:
    return registry_on(FileStore(tmp_path / "store"))


def test_a_folder_is_used_in_place_and_verified_once(
    tmp_path: Path, model: Path, registry_on: Callable[..., Registry]
) -> None:
    registry = _in_folder(tmp_path, registry_on)
    registry.import_folder(model, "tiny")
    told: list[str] = []
    folder = registry.fetch("tiny", lambda done, total, what: told.append(what))
    assert folder.is_relative_to(tmp_path / "store")
    assert told
    told.clear()
    assert registry.fetch("tiny", lambda done, total, what: told.append(what)) == folder
    assert not told
    assert not (tmp_path / "cache" / "versions").exists()


@pytest.mark.promise(12)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_flipped_bit_is_found(
    tmp_path: Path, model: Path, registry_on: Callable[..., Registry], file: str
) -> None:
    registry = _in_folder(tmp_path, registry_on)
    registry.import_folder(model, "tiny")
    target = registry.fetch("tiny") / file
    facts = target.stat()
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # a careful forger
    with pytest.raises(CorruptModel, match=file):
        registry.fetch("tiny")


def test_a_configuration_is_read_without_its_weights(
    tmp_path: Path, model: Path, registry_on: Callable[..., Registry]
) -> None:
    registry = _in_folder(tmp_path, registry_on)
    registry.import_folder(model, "tiny")
    folder = registry.fetch("tiny")
    (folder / "model.safetensors").unlink()
    found = registry.configuration("tiny")
    assert found == json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text("{}")
    with pytest.raises(CorruptModel, match=r"config\.json"):
        registry.configuration("tiny")
    with pytest.raises(ModelNotFound):
        registry.configuration("nobody")


@pytest.mark.promise(12)
def test_truncated_missing_and_added_files_are_found(
    tmp_path: Path, model: Path, registry_on: Callable[..., Registry]
) -> None:
    registry = _in_folder(tmp_path, registry_on)
    registry.import_folder(model, "tiny")
    folder = registry.fetch("tiny")
    (folder / "extra.json").write_text("{}")
    with pytest.raises(CorruptModel, match=r"extra\.json does not belong"):
        registry.fetch("tiny")
    (folder / "extra.json").unlink()
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(CorruptModel, match=r"model\.safetensors has"):
        registry.fetch("tiny")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptModel, match=r"model\.safetensors is missing"):
        registry.fetch("tiny")
    (tmp_path / "w").write_bytes(weights)
    (folder / "model.safetensors").symlink_to(tmp_path / "w")
    with pytest.raises(CorruptModel, match="not a plain file"):
        registry.fetch("tiny")


def test_a_flipped_bit_in_a_manifest_is_found(registry: Registry, model: Path) -> None:
    registry.import_folder(model, "tiny")
    key = "manifests/tiny/1.json"
    good = registry.store.get(key)
    for position in range(0, len(good), 23):
        bad = bytearray(good)
        bad[position] ^= 4
        registry.store.put(key, bytes(bad))
        with pytest.raises(BrokenModel, match=r"manifests/tiny/1\.json|manifest format"):
            registry.resolve("tiny/1")
    registry.store.put("manifests/tiny/2.json", good)
    with pytest.raises(CorruptModel, match="holds the manifest of models:/tiny/1"):
        registry.resolve("tiny/2")


@pytest.mark.promise(14)
def test_a_manifest_that_names_code_or_leaves_its_folder(registry: Registry, model: Path) -> None:
    registry.import_folder(model, "tiny")
    key = "manifests/tiny/1.json"
    stored = read_stored_version(registry.store.get(key), key)
    for path, fault in (("x.py", UnsafeModel), ("../x.json", BrokenModel)):
        assert stored.manifest is not None
        entry = {"path": path, "size_bytes": 0, "sha256": "0" * 64}
        body = stored.manifest.body() | {"files": [entry], "upload": stored.upload}
        from cloudlm.registry.records import _digest

        body["digest"] = _digest(body)
        registry.store.put(key, json.dumps(body).encode())
        with pytest.raises(fault, match=r"x\.(py|json)"):
            registry.fetch("tiny/1")


def test_a_damaged_version_does_not_stop_the_others(
    registry: Registry, model: Path, tmp_path: Path, model_at: ModelAt
) -> None:
    registry.import_folder(model, "tiny")
    registry.store.put("manifests/tiny/1.json", b"{")
    assert registry.list_models() == []
    assert registry.import_folder(model_at(tmp_path / "o", fill=2), "tiny").version == 2
    assert registry.list_models() == ["tiny"]
    with pytest.raises(BrokenModel, match="left alone"):
        registry.collect_garbage()  # whose files are whose cannot be told
    assert len({key.split("/")[2] for key in registry.store.list("files/tiny/")}) == 2


def test_stored_versions_read_back(registry: Registry, model: Path) -> None:
    manifest = registry.import_folder(model, "tiny")
    stored = StoredVersion(manifest, "a" * 32)
    assert read_stored_version(stored.encode(), "manifests/tiny/1.json").manifest == manifest
    assert files_prefix("tiny", "b" * 32) == f"files/tiny/{'b' * 32}/"


def test_open_registry(tmp_path: Path, model: Path) -> None:
    settings = RegistrySettings()
    with open_registry("", home=tmp_path / "home", settings=settings) as registry:
        assert not (tmp_path / "home").exists()
        registry.import_folder(model, "tiny")
        assert registry.fetch("tiny").is_relative_to(tmp_path / "home" / "registry")
    with pytest.raises(InvalidRequest, match="hdfs://x"):
        open_registry("hdfs://x", home=tmp_path, settings=settings)
