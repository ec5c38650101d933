"""What only a folder can do wrong: full disks, links, kills, leftovers."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cloudlm.core.errors import BadSetting, CloudlmError, NotFound, StorageFailed
from cloudlm.registry.stores import file as module
from cloudlm.registry.stores.file import FileStore, folder_of

_CALLS = ("open", "mkdir", "write", "fsync", "rename", "link", "unlink")


class FaultyOs:
    """The ``os`` module whose k-th call of a file-system function fails."""

    def __init__(self, fail_at: int, code: int) -> None:
        self.fail_at, self.code, self.calls = fail_at, code, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in _CALLS:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at:
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **kwargs)

        return call


@pytest.mark.promise(12, 41)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("verb", ["put", "put_if_absent", "put_file"])
def test_a_fault_at_any_call_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, code: int
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"new")
    failures = 0
    for fail_at in range(1, 60):
        store = FileStore(tmp_path / f"store{fail_at}")
        if verb != "put_if_absent":
            store.put("a/b", b"old")
        faulty = FaultyOs(fail_at, code)
        monkeypatch.setattr(module, "os", faulty)
        try:
            getattr(store, verb)("a/b", source if verb == "put_file" else b"new")
        except StorageFailed as error:
            failures += 1
            assert str(store.root) in error.message
        monkeypatch.undo()
        seen = store.get("a/b") if list(store.list("")) else None
        assert seen in ((b"old", b"new") if verb != "put_if_absent" else (None, b"new"))
        store.sweep()
        store.put("a/b", b"again")
        assert store.get("a/b") == b"again"
        assert list((store.root / ".tmp").iterdir()) == []
        if faulty.calls < fail_at:  # every call had its turn
            break
    else:
        pytest.fail("the number of calls has no end")
    assert failures >= 5


@pytest.mark.promise(41)
def test_a_full_disk_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(module.os, "write", full)
    with pytest.raises(StorageFailed, match=r"a/b: the disk is full; free space"):
        FileStore(tmp_path).put("a/b", b"x")


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(module.os, "write", lambda fd, data: real(fd, data[:3]))
    store = FileStore(tmp_path)
    store.put("a", b"0123456789")
    assert store.get("a") == b"0123456789"


def test_without_hard_links_absence_is_still_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(module.os, "link", refuse)
    store = FileStore(tmp_path)
    assert store.put_if_absent("a", b"1") is True
    assert store.put_if_absent("a", b"2") is False
    assert store.get("a") == b"1"
    assert list((tmp_path / ".tmp").iterdir()) == []


@pytest.mark.promise(14)
@pytest.mark.known_failure("CVE-2026-27905")
def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    store = FileStore(tmp_path / "store")
    store.put("a/b", b"x")
    (store.root / "folder").symlink_to(outside)
    (store.root / "file").symlink_to(outside / "secret")
    for key in ("folder/secret", "file"):
        with pytest.raises(CloudlmError):
            store.get(key)
        assert store.local_path(key) is None
    with pytest.raises(StorageFailed):
        store.put("folder/new", b"x")
    store.put("file", b"mine")  # replaces the link, not what it points at
    assert (outside / "secret").read_text() == "secret"
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert list(store.list("")) == ["a/b", "file"]


@pytest.mark.promise(14)
def test_special_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageFailed, match="not a regular file"):
        FileStore(tmp_path).get("pipe")


def test_sweep_removes_only_what_nobody_writes(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("a", b"x")
    abandoned = tmp_path / ".tmp" / "abandoned.part"
    abandoned.write_bytes(b"half")
    living = tmp_path / ".tmp" / "living.part"
    with living.open("wb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        assert store.sweep() == 1
        assert living.exists()
        assert not abandoned.exists()
    assert store.sweep() == 1
    assert FileStore(tmp_path / "none").sweep() == 0


@pytest.mark.promise(12)
def test_a_killed_writer_leaves_nothing_visible(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from cloudlm.registry.stores.file import FileStore\n"
        "store, n = FileStore(sys.argv[1]), 0\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    n += 1\n"
        "    store.put('k/%d' % (n % 7), b'%d' % n * 200_000)\n"
    )
    store = FileStore(tmp_path / "store")
    for attempt in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(store.root)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.02 + 0.013 * attempt)
        child.kill()
        child.wait()
        child.stdout.close()
        for key in store.list(""):
            data = store.get(key)
            length = len(data) // 200_000
            assert data == data[:length] * 200_000
        assert store.sweep() <= 1
        assert list((store.root / ".tmp").iterdir()) == []


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder_of("file:///a%20b/c") == Path("/a b/c")
    assert folder_of("file://localhost/a") == Path("/a")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert folder_of("~/models") == Path("/home/somebody/models")
    monkeypatch.chdir(tmp_path)
    assert folder_of("./x/../y") == tmp_path / "y"
    for bad in ("", "file://host/a", "file:", "a\0b"):
        with pytest.raises(BadSetting):
            folder_of(bad)


def test_nothing_is_created_by_looking(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    assert list(store.list("")) == []
    with pytest.raises(NotFound):
        store.get("a")
    store.delete("a")
    assert not (tmp_path / "store").exists()


def test_emptied_folders_go(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    store.put("a/b/c", b"x")
    store.put("a/d", b"x")
    store.delete("a/b/c")
    assert sorted(path.name for path in (store.root / "a").iterdir()) == ["d"]
