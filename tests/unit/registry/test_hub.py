"""The hub client against a small fake hub, with the real library."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cloudlm.core.errors import (
    CloudlmError,
    InvalidRequest,
    MissingExtra,
    ModelNotFound,
    PermissionDenied,
    Unavailable,
    UnsafeModel,
)
from cloudlm.registry import hub as module
from cloudlm.registry.hub import HubAddress, fetch_from_hub, parse_hub_address
from cloudlm.registry.importer import import_address
from cloudlm.registry.registry import Registry

COMMIT = "c" * 40


class FakeHub(BaseHTTPRequestHandler):
    """Just enough of the hub's API to download one repository."""

    folder: Path
    asked: list[str]

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if path.startswith(("/api/models/org/gated", "/org/gated")):
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        elif path.startswith("/api/models/org/tiny/revision/absent"):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        elif path.startswith("/api/models/org/tiny/revision/"):
            self._send(200, json.dumps({"id": "org/tiny", "sha": COMMIT}).encode(), {}, body)
        elif path.startswith("/api/models/org/tiny/tree/"):
            entries = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _oid(f)}
                for f in sorted(self.folder.iterdir())
            ]
            self._send(200, json.dumps(entries).encode(), {}, body)
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            file = self.folder / path.rpartition("/")[2]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(file)}"'}
            self._send(200, file.read_bytes(), headers, body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04evil")
    (model / "handler.py").write_text("evil")

    class Handler(FakeHub):
        folder = model
        asked: list[str] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    yield Handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))


def test_a_repository_is_registered_without_its_unsafe_files(
    hub: type[FakeHub], registry: Registry
) -> None:
    told: list[str] = []
    manifest = import_address(
        registry, "org/tiny", progress=lambda done, total, what: told.append(what)
    )
    assert manifest.ref == "models:/tiny/1"
    assert manifest.lineage == {"source": "hf://org/tiny", "revision": COMMIT}
    assert [file.path for file in manifest.files] == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert not [path for path in hub.asked if path.endswith((".bin", ".py"))]
    assert "downloading org/tiny" in told


def test_what_the_cache_holds_needs_no_network(
    hub: type[FakeHub], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_address(registry, "hf://org/tiny@main", "one")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.asked.clear()
    assert import_address(registry, "hf://org/tiny@main", "two").ref == "models:/two/1"
    assert hub.asked == []


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("org/none", ModelNotFound, "no such model"),
        ("org/tiny@absent", ModelNotFound, "no such revision"),
        ("org/gated", PermissionDenied, "HF_TOKEN"),
    ],
)
def test_refusals(hub: type[FakeHub], address: str, error: type[CloudlmError], words: str) -> None:
    with pytest.raises(error, match=words):
        fetch_from_hub(parse_hub_address(address))


def test_code_on_the_hub_is_refused(
    hub: type[FakeHub], registry: Registry, model: Path, model_at: Callable[..., Path]
) -> None:
    model_at(model, architectures=["EvilForCausalLM"], auto_map={"AutoModel": "modeling.Evil"})
    with pytest.raises(UnsafeModel, match=r"config\.json"):
        import_address(registry, "org/tiny")
    assert registry.list_models() == []


@pytest.mark.usefixtures("no_hub")
def test_no_network_is_said_plainly(registry: Registry) -> None:
    with pytest.raises(Unavailable) as caught:
        import_address(registry, "org/tiny")
    assert caught.value.message == (
        "no network: cannot reach http://127.0.0.1:9 for org/tiny; give a folder or a "
        "registered model"
    )


@pytest.mark.usefixtures("no_hub")
def test_offline_is_said_plainly(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Unavailable, match="HF_HUB_OFFLINE is set"):
        import_address(registry, "hf://org/tiny")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"cloudlm\[engine\]"):
        fetch_from_hub(HubAddress("org/tiny", None))


def test_a_full_disk_during_the_download() -> None:
    def full(repo_id: str, **options: Any) -> str:
        raise OSError(28, "no space", "/cache/file")

    with pytest.raises(CloudlmError, match="/cache/file: the disk is full"):
        fetch_from_hub(HubAddress("org/tiny", None), download=full)


def test_only_safe_patterns_are_asked_for(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def record(repo_id: str, **options: Any) -> str:
        seen.update(options)
        return str(tmp_path)

    snapshot = fetch_from_hub(HubAddress("org/tiny", "v1"), download=record)
    assert snapshot.commit == ""
    assert seen["revision"] == "v1"
    assert seen["allow_patterns"] == list(module.SAFE_PATTERNS)


@pytest.mark.parametrize("bad", ["org", "org/a/b", "hf://org/../x", "org/na me", "hf://", "o/n@"])
def test_bad_addresses(bad: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_hub_address(bad)
