"""What is executed from the cache can have been put there by nobody else; what is old goes."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from cloudlm.core.cache_folder import (
    BUILDING,
    LEFT_S,
    UNUSED_S,
    in_others_hands,
    mark_used,
    own_folder,
    prune,
)


def _age(path: Path, age_s: float) -> Path:
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def _folder(path: Path, age_s: float = 0.0) -> Path:
    path.mkdir()
    (path / "module.so").write_text("code")
    return _age(path, age_s)


@pytest.mark.parametrize(
    ("mode", "ours"), [(0o700, True), (0o755, True), (0o775, False), (0o757, False)]
)
def test_what_others_may_write_is_not_ours(tmp_path: Path, mode: int, ours: bool) -> None:
    tmp_path.chmod(0o700)
    file = tmp_path / "library.so"
    file.touch()
    file.chmod(mode)
    assert in_others_hands(file) == (None if ours else file)
    file.chmod(0o700)
    tmp_path.chmod(mode)
    assert in_others_hands(file) == (None if ours else tmp_path)


def test_what_lies_deeper_is_not_ours_either(tmp_path: Path) -> None:
    """Every file that is named, and the folders on the way to it; no other."""
    folder = tmp_path / "a"
    deep, beside = folder / "b" / "c" / "library.so", folder / "b" / "other"
    deep.parent.mkdir(parents=True)
    places = (tmp_path, folder, folder / "b", deep.parent, deep)
    deep.touch()
    for place in places:
        place.chmod(0o700)
    beside.touch()
    beside.chmod(0o777)
    assert in_others_hands(folder, [deep]) is None
    for place in places:
        place.chmod(0o777)
        assert in_others_hands(folder, [deep]) == place
        place.chmod(0o700)


def test_a_folder_of_our_own_is_made_or_refused(tmp_path: Path) -> None:
    own = own_folder(tmp_path / "a" / "b")
    assert own.stat().st_mode & 0o777 == 0o700
    assert own_folder(own) == own
    own.chmod(0o777)
    with pytest.raises(OSError, match=r"chmod go-w, or set CLOUDLM_NATIVE_CACHE"):
        own_folder(own)


def test_what_others_own_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "library.so").touch(0o600)
    stranger = os.geteuid() + 1
    owned_by_root = os.geteuid() == 0
    monkeypatch.setattr(os, "geteuid", lambda: stranger)
    found = in_others_hands(tmp_path / "library.so")
    assert found == (None if owned_by_root else tmp_path / "library.so")


def test_what_is_not_there_cannot_be_judged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        in_others_hands(tmp_path / "nothing")


def test_the_old_goes_and_the_rest_stays(tmp_path: Path) -> None:
    built = _folder(tmp_path / "gateway-new", UNUSED_S + 60)  # however old: it is the new one
    old = _folder(tmp_path / "gateway-old", UNUSED_S + 60)
    left = _folder(tmp_path / f"{BUILDING}dead", LEFT_S + 60)
    stay = [
        _folder(tmp_path / "gateway-used", UNUSED_S - 3600),
        _folder(tmp_path / f"{BUILDING}alive", LEFT_S - 3600),
        _folder(tmp_path / "cloudlm-others", UNUSED_S + 60),
        built,
    ]
    assert prune(built, "gateway-") == (left, old)
    assert sorted(tmp_path.iterdir()) == sorted(stay)
    assert all((path / "module.so").exists() for path in stay)


def test_what_was_used_again_stays(tmp_path: Path) -> None:
    built, other = _folder(tmp_path / "gateway-new"), _folder(tmp_path / "gateway-b", UNUSED_S * 2)
    mark_used(other)
    assert prune(built, "gateway-") == ()
    mark_used(tmp_path / "nothing")  # gone meanwhile: no fault


def test_a_link_goes_and_what_it_names_stays(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    target = _folder(tmp_path / "elsewhere")
    link = cache / "gateway-link"
    link.symlink_to(target)
    os.utime(link, (0, 0), follow_symlinks=False)
    assert prune(_folder(cache / "gateway-new"), "gateway-") == (link,)
    assert (target / "module.so").exists()


def test_two_who_prune_remove_each_thing_once(tmp_path: Path) -> None:
    built = _folder(tmp_path / "gateway-new")
    old = {_folder(tmp_path / f"gateway-{number}", UNUSED_S + 60) for number in range(50)}
    both = threading.Barrier(2)
    removed: list[tuple[Path, ...]] = []

    def one() -> None:
        both.wait()
        removed.append(prune(built, "gateway-"))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted([*removed[0], *removed[1]]) == sorted(old)
    assert list(tmp_path.iterdir()) == [built]


def test_where_nothing_can_be_written_nothing_fails(tmp_path: Path) -> None:
    assert prune(tmp_path / "nowhere" / "gateway-new", "gateway-") == ()
