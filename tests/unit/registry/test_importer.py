"""Folders, object stores and web servers as sources; names; kills; the starter model."""

from __future__ import annotations

import fcntl
import functools
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloudlm.core.errors import (
    BadSetting,
    BrokenModel,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    UnsafeModel,
)
from cloudlm.registry import bundled, importer
from cloudlm.registry.importer import import_address, name_from_address
from cloudlm.registry.opening import open_store
from cloudlm.registry.owner import is_gone, this_process
from cloudlm.registry.registry import Registry
from cloudlm.registry.stores.file import FileStore
from cloudlm.registry.stores.memory import MemoryStore


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("/models/My Model.v2/", "my-model.v2"),
        ("file:///models/Llama_3", "llama_3"),
        ("Qwen/Qwen3-0.6B", "qwen3-0.6b"),
        ("hf://Qwen/Qwen3-0.6B@main", "qwen3-0.6b"),
        ("s3://bucket/some/Tiny..Model", "tiny.model"),
        ("https://host/models/tiny/?sig=1", "tiny"),
    ],
)
def test_names_are_derived(address: str, name: str) -> None:
    assert name_from_address(address) == name


def test_a_name_that_cannot_be_derived() -> None:
    with pytest.raises(InvalidRequest, match="--name"):
        name_from_address("/")
    with pytest.raises(InvalidRequest, match="--name"):
        name_from_address("/models/---")


def test_a_folder(registry: Registry, model: Path) -> None:
    manifest = import_address(registry, str(model), alias="champion", imported_by="ada")
    assert manifest.ref == "models:/tiny/1"
    assert manifest.lineage == {"source": model.as_uri(), "imported_by": "ada"}
    assert import_address(registry, model.as_uri(), "tiny").already_registered
    with pytest.raises(NotFound, match="does not exist"):
        import_address(registry, str(model / "none"))
    with pytest.raises(InvalidRequest, match="registered model already"):
        import_address(registry, "models:/tiny/1")


def _source(monkeypatch: pytest.MonkeyPatch, model: Path) -> MemoryStore:
    store = MemoryStore()
    for file in model.iterdir():
        store.put_file(file.name, file)
    monkeypatch.setattr(importer, "open_store", lambda url: store)
    return store


def test_an_object_store(
    registry: Registry, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = _source(monkeypatch, model)
    store.put("pytorch_model.bin", b"evil")
    manifest = import_address(registry, "s3://bucket/tiny")
    assert manifest.lineage == {"source": "s3://bucket/tiny"}
    assert len(manifest.files) == 4
    store.put("modeling.py", b"evil")
    with pytest.raises(UnsafeModel, match=r"modeling\.py"):
        import_address(registry, "s3://bucket/tiny")
    assert list((tmp_path / "cache" / "incoming").iterdir()) == []


def test_a_model_below_a_prefix_is_named_by_its_address(
    registry: Registry, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    for file in model.iterdir():
        store.put_file(f"inner/{file.name}", file)
    monkeypatch.setattr(importer, "open_store", lambda url: store)
    with pytest.raises(BrokenModel) as caught:
        import_address(registry, "s3://bucket/many/")
    assert caught.value.message == (
        "config.json is missing in s3://bucket/many, but a model lies below it: import "
        "s3://bucket/many/inner"
    )


def test_what_a_killed_download_left_goes_with_the_next(
    registry: Registry, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _source(monkeypatch, model)
    incoming = tmp_path / "cache" / "incoming"
    left, busy = incoming / "left", incoming / "busy"
    for folder in (left, busy):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    lock = os.open(busy, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # another process is downloading into it
    import_address(registry, "s3://bucket/tiny")
    assert list(incoming.iterdir()) == [busy]
    os.close(lock)
    import_address(registry, "s3://bucket/tiny")
    assert list(incoming.iterdir()) == []


def test_an_empty_prefix(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "open_store", lambda url: MemoryStore())
    with pytest.raises(ModelNotFound, match="s3://bucket/none"):
        import_address(registry, "s3://bucket/none")


@pytest.fixture
def web(model: Path) -> Iterator[str]:
    """A plain web server, which cannot list."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(model.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_plain_web_server(registry: Registry, web: str) -> None:
    manifest = import_address(registry, f"{web}/tiny")
    assert [file.path for file in manifest.files] == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        import_address(registry, f"{web}/none")


def test_a_web_object_reads_forwards(web: str, model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    with open_store(f"{web}/tiny").open("model.safetensors") as stream:
        stream.seek(8)
        assert stream.read(4) == content[8:12]
        stream.seek(len(content) - 2)
        assert stream.read() == content[-2:]
    with open_store(web).open("tiny/model.safetensors") as stream:
        stream.seek(10 * len(content))
        assert stream.read() == b""


def test_stores_by_address(tmp_path: Path) -> None:
    assert isinstance(open_store(str(tmp_path)), FileStore)
    assert isinstance(open_store(tmp_path.as_uri()), FileStore)
    with pytest.raises(BadSetting, match="installed: file, object"):
        open_store("hdfs://x/y")
    with pytest.raises(BadSetting, match="OSS_ENDPOINT"):
        open_store("oss://bucket/x")


def test_a_killed_importer_leaves_nothing(
    tmp_path: Path, model_at: Callable[..., Path], registry_on: Callable[..., Registry]
) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from cloudlm.core.settings import RegistrySettings\n"
        "from cloudlm.registry.registry import open_registry\n"
        "r = open_registry(sys.argv[1], home=Path(sys.argv[2]), settings=RegistrySettings())\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    r.import_folder(Path(sys.argv[3]), 'tiny')\n"
        "    r.remove('tiny')\n"
    )
    store = FileStore(tmp_path / "store")
    model = model_at(tmp_path / "tiny")
    for attempt in range(4):
        arguments = [str(store.root), str(tmp_path / "home"), str(model)]
        child = subprocess.Popen(
            [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.03 + 0.017 * attempt)
        child.kill()
        child.wait()
        child.stdout.close()
        registry = registry_on(store)
        for name in registry.list_models():
            assert len(list(registry.fetch(name).iterdir())) == 4
        registry.collect_garbage()  # at once: the owner is known to be gone
        assert list(store.list("uploads/")) == []
        assert list((store.root / ".tmp").glob("*")) == []  # nor is it there if it died at once
        living = len(registry.list_models())
        assert len({key.split("/")[2] for key in store.list("files/")}) == living


def test_owners() -> None:
    assert not is_gone(this_process())
    child = subprocess.run(
        [sys.executable, "-c", "from cloudlm.registry.owner import *; print(this_process())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert is_gone(child.stdout.strip())
    for unknown in ("", "x", "other-boot:pid[1]:1:1", "::1:1"):
        assert not is_gone(unknown)


def test_the_starter_model(
    registry: Registry,
    model: Path,
    model_at: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bundled, "bundled_folder", lambda: model)
    manifest = bundled.ensure_bundled(registry)
    assert manifest.ref == f"models:/{bundled.BUNDLED}/1"
    assert registry.resolve("bank-helper@champion") == manifest
    assert bundled.ensure_bundled(registry).already_registered
    registry.import_folder(model_at(tmp_path / "better", fill=3), bundled.BUNDLED)
    registry.set_alias(bundled.BUNDLED, "champion", 2)
    bundled.ensure_bundled(registry)
    assert registry.resolve("bank-helper@champion").version == 2


def test_a_package_without_the_starter_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bundled, "files", lambda package: tmp_path)
    with pytest.raises(ModelNotFound, match="make starter"):
        bundled.bundled_folder()
