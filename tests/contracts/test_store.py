"""The store contract, run against every implementation."""

from __future__ import annotations

import itertools
import logging
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudlm.core.errors import CloudlmError, InvalidRequest, NotFound, StorageFailed, Unavailable
from cloudlm.registry.opening import open_store
from cloudlm.registry.stores.base import Store
from cloudlm.registry.stores.file import FileStore
from cloudlm.registry.stores.memory import MemoryStore
from cloudlm.registry.stores.object import ObjectStore

_numbers = itertools.count()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 server in this process, with one bucket."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        request = urllib.request.Request(f"{endpoint}/models", method="PUT")
        urllib.request.urlopen(request).close()
        yield "s3://models"
    server.stop()


@pytest.fixture(params=["memory", "file", "s3", "s3-without-conditional-put"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "file":
        return FileStore((tmp_path / "store with blank").as_uri())
    url = f"{request.getfixturevalue('bucket')}/prefix-{next(_numbers)}"
    return ObjectStore(url, conditional_put=None if request.param == "s3" else False)


def test_put_then_get(store: Store) -> None:
    store.put("a/b.json", b"one")
    assert store.get("a/b.json") == b"one"
    store.put("a/b.json", b"two")
    assert store.get("a/b.json") == b"two"


def test_an_empty_object_is_an_object(store: Store) -> None:
    store.put("empty", b"")
    assert store.get("empty") == b""
    assert list(store.list("")) == ["empty"]


def test_a_missing_key_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound):
        store.get("a/none")
    with pytest.raises(NotFound), store.open("a/none") as stream:
        stream.read(1)


def test_open_reads_in_pieces_and_seeks(store: Store) -> None:
    store.put("big", bytes(range(256)) * 100)
    with store.open("big") as stream:
        assert stream.read(3) == b"\0\1\2"
        stream.seek(256 * 50 + 10)
        assert stream.read(2) == b"\n\x0b"
        stream.seek(256 * 100)
        assert stream.read(10) == b""


def test_put_if_absent_writes_once(store: Store) -> None:
    assert store.put_if_absent("n/1.json", b"first") is True
    assert store.put_if_absent("n/1.json", b"second") is False
    assert store.get("n/1.json") == b"first"
    store.delete("n/1.json")
    assert store.put_if_absent("n/1.json", b"third") is True
    assert list(store.list("")) == ["n/1.json"]


def test_put_if_absent_has_one_winner_among_threads(store: Store) -> None:
    start, wins = threading.Barrier(4), []

    def write(number: int) -> None:
        start.wait()
        if store.put_if_absent("race/1", b"%d" % number):
            wins.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert store.get("race/1") == b"%d" % wins[0]


def test_put_file_uploads_and_tells_progress(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(b"0123456789abcdef" * (1 << 20))  # 16 MiB: several parts of an upload
    told: list[int] = []
    store.put_file("w/weights", source, told.append)
    assert told == sorted(told)
    assert told[-1] == 16 << 20
    with store.open("w/weights") as stream:
        stream.seek((16 << 20) - 16)
        assert stream.read() == b"0123456789abcdef"


def test_a_cancelled_put_file_leaves_nothing(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(b"x" * (20 << 20))

    class Cancelled(Exception):
        pass

    def cancel(done_bytes: int) -> None:
        raise Cancelled

    if isinstance(store, MemoryStore):
        pytest.skip("memory has no half-way")
    with pytest.raises(Cancelled):
        store.put_file("w/weights", source, cancel)
    assert list(store.list("")) == []


def test_put_file_of_a_missing_file(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        store.put_file("k", tmp_path / "nowhere")


def test_list_is_sorted_and_by_prefix(store: Store) -> None:
    for key in ("m/b/1", "m/a-c", "m/a/2", "m/a/10", "n", "m/ab"):
        store.put(key, b"x")
    assert list(store.list("")) == ["m/a-c", "m/a/10", "m/a/2", "m/ab", "m/b/1", "n"]
    assert list(store.list("m/a")) == ["m/a-c", "m/a/10", "m/a/2", "m/ab"]
    assert list(store.list("m/a/")) == ["m/a/10", "m/a/2"]
    assert list(store.list("m/a/1")) == ["m/a/10"]
    assert list(store.list("x/")) == []


def test_delete_is_idempotent(store: Store) -> None:
    store.put("d/e/f", b"x")
    store.delete("d/e/f")
    store.delete("d/e/f")
    assert list(store.list("")) == []
    store.put("d/e", b"x")  # the folder of before must not be in the way
    assert store.get("d/e") == b"x"


def test_odd_but_good_keys(store: Store) -> None:
    for key in ("a b/ü%20#?.json", "a/" + "n" * 200, "x/.hidden"):
        store.put(key, key.encode())
        assert store.get(key) == key.encode()
        assert list(store.list(key)) == [key]


@pytest.mark.promise(14)
@pytest.mark.known_failure("CVE-2024-1561", "CVE-2026-49119")
@pytest.mark.parametrize(
    "key",
    ["", "/a", "a//b", "a/", "../a", "a/../../b", "a/.", "a\\b", "a\0b", "a\nb", ".tmp/x", ".x",
     "a/" + "n" * 256, "a/" * 500 + "b", "a/\udcff"],
)  # fmt: skip
def test_bad_keys_are_refused_everywhere(store: Store, key: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    for call in (store.get, store.open, store.delete, store.local_path):
        with pytest.raises(InvalidRequest):
            call(key)
    for attempt in (
        lambda: store.put(key, b"x"),
        lambda: store.put_if_absent(key, b"x"),
        lambda: store.put_file(key, source),
    ):
        with pytest.raises(InvalidRequest):
            attempt()
    assert list(store.list("")) == []


def test_sweep_of_a_clean_store(store: Store) -> None:
    store.put("a", b"x")
    assert store.sweep() == 0
    assert store.get("a") == b"x"


def test_a_local_path_holds_the_object(store: Store) -> None:
    store.put("a/b", b"x")
    path = store.local_path("a/b")
    assert path is None or path.read_bytes() == b"x"
    assert store.local_path("a/none") is None


def test_conditional_put_is_tried_out(bucket: str) -> None:
    store = ObjectStore(f"{bucket}/probe-{next(_numbers)}")
    assert store.put_if_absent("k", b"1")
    assert store._conditional_put is True
    assert store.sweep() == 0


def test_a_claim_of_another_writer_is_waited_out(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    from cloudlm.registry.stores import object as module

    store = ObjectStore(f"{bucket}/claims-{next(_numbers)}", conditional_put=False)
    obstore.put(store._bucket, ".claims/k/other", b"")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            obstore.delete(store._bucket, ".claims/k/other")

    monkeypatch.setattr(module.time, "sleep", sleep)
    assert store.put_if_absent("k", b"1") is True
    assert len(waits) == 2
    obstore.put(store._bucket, ".claims/k/stuck", b"")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with pytest.raises(Unavailable, match="claiming"):
        store.put_if_absent("k", b"2")
    monkeypatch.setattr(module, "CLAIM_AGE_S", -1.0)  # an old claim blocks nobody
    assert store.put_if_absent("k", b"2") is False
    assert store.sweep() == 1


def test_a_missing_bucket_and_a_dead_server(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CloudlmError) as caught:
        list(ObjectStore("s3://no-such-bucket/x").list(""))
    assert isinstance(caught.value, NotFound | Unavailable)
    assert "no-such-bucket" in caught.value.message
    dead = ObjectStore("s3://models/x", options={"endpoint": "http://127.0.0.1:9"})
    with pytest.raises(Unavailable, match="s3://models/x/k") as unreachable:
        dead.get("k")
    assert "Debug source" not in unreachable.value.message


def test_oss_is_s3_at_its_endpoint(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cloudlm.registry.stores.object import _oss_as_s3

    monkeypatch.setenv("OSS_ENDPOINT", "https://oss-cn-hangzhou.aliyuncs.com")
    monkeypatch.setenv("ALIBABA_CLOUD_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "secret")
    url, options = _oss_as_s3("oss://bucket/some/prefix", {})
    assert url == "s3://bucket/some/prefix"
    assert options["endpoint"] == "https://bucket.oss-cn-hangzhou.aliyuncs.com"
    assert options["region"] == "cn-hangzhou"
    assert options["access_key_id"] == "id"
    assert isinstance(open_store("oss://bucket/some/prefix"), ObjectStore)


def test_storage_failed_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageFailed, match="file"):
        FileStore(tmp_path / "file").put("a", b"x")
