"""Folders of processes that were killed go with the next start, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cloudlm.engine.scratch import ALONE_S, LOCK, Scratch, remove_left

PREFIX = "cloudlm-test-"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def _killed(folder: Path) -> Path:
    """What a process leaves that is killed while it holds a folder with a file in it."""
    code = (
        "import os, signal\nfrom cloudlm.engine.scratch import Scratch\n"
        f"held = Scratch({PREFIX!r})\n(held.path / 'socket').write_text('x')\n"
        "print(held.path, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    return Path(done.stdout.strip())


def test_the_folder_of_a_killed_process_goes_with_the_next_start(folder: Path) -> None:
    left = _killed(folder)
    assert (left / "socket").exists()
    held = Scratch(PREFIX)
    assert list(folder.iterdir()) == [held.path]
    assert held.path.stat().st_mode & 0o777 == 0o700
    held.close()
    held.close()
    assert list(folder.iterdir()) == []


def test_what_somebody_holds_stays(folder: Path) -> None:
    first = Scratch(PREFIX)
    second = Scratch(PREFIX)
    assert remove_left(PREFIX) == []
    assert {first.path, second.path} == set(folder.iterdir())
    second.close()
    assert list(folder.iterdir()) == [first.path]
    first.close()


def test_what_is_not_ours_stays(folder: Path) -> None:
    """A folder that is being made, one of an older version, a link, a file, another kind's."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).touch()
    (folder / f"{PREFIX}no-lock").mkdir()
    (folder / f"{PREFIX}file").touch()
    (folder / f"{PREFIX}link").symlink_to(elsewhere)
    linked = folder / f"{PREFIX}linked-lock"
    linked.mkdir()
    (linked / LOCK).symlink_to(elsewhere / LOCK)
    other = folder / "cloudlm-other-1"
    other.mkdir()
    (other / LOCK).touch()
    before = set(folder.rglob("*"))
    assert remove_left(PREFIX) == []
    assert set(folder.rglob("*")) == before
    (folder / f"{PREFIX}no-lock" / LOCK).touch()  # now it is one that nobody holds
    assert remove_left(PREFIX) == [folder / f"{PREFIX}no-lock"]


@pytest.mark.parametrize("inside", [(), ("lock.new",)])
def test_a_folder_whose_maker_was_killed_before_its_lock_goes_when_it_is_old(
    folder: Path, inside: tuple[str, ...]
) -> None:
    old, young, kept = (folder / f"{PREFIX}{name}" for name in ("old", "young", "kept"))
    for one in (old, young, kept):
        one.mkdir()
        for name in inside:
            (one / name).touch()
    (kept / "socket").touch()  # somebody's, who knows no locks
    link = folder / f"{PREFIX}link"
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    link.symlink_to(elsewhere)
    for one in (old, kept, elsewhere, link):
        then = one.lstat().st_mtime - ALONE_S - 60.0
        os.utime(one, (then, then), follow_symlinks=False)
    assert remove_left(PREFIX) == [old]
    assert young.exists() and kept.exists() and link.is_symlink() and elsewhere.exists()
