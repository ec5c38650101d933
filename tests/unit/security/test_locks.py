"""One at a time at a place: others wait, and what happens inside comes out as it is."""

from __future__ import annotations

import fcntl
import os

import pytest

from cloudlm.security.locks import alone_with


def is_held(place):
    lock = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


@pytest.mark.parametrize("name", ["", "new/deep/login.lock"])
def test_a_place_is_held_and_let_go_of(tmp_path, name):
    place = tmp_path / name
    with alone_with(place):
        assert is_held(place)
        assert place.is_dir() or place.stat().st_mode & 0o777 == 0o600
    assert not is_held(place)
    with pytest.raises(KeyError), alone_with(place):
        raise KeyError
    assert not is_held(place)


def test_a_place_that_cannot_be_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), alone_with(tmp_path / "file" / "lock"):
        pass
