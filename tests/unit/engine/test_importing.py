"""Imports are made without the search for garbage, and it is resumed whatever becomes of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from cloudlm.engine.importing import unsearched


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    was_on = gc.isenabled()
    yield
    gc.unfreeze()
    (gc.enable if was_on else gc.disable)()


def test_nothing_is_searched_inside_and_what_was_made_is_left_alone_later() -> None:
    gc.unfreeze()
    gc.enable()
    with unsearched():
        assert not gc.isenabled()
        made: list[list[object]] = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(made)


def test_an_import_that_fails_resumes_the_search() -> None:
    gc.unfreeze()
    gc.enable()
    with pytest.raises(ImportError), unsearched():
        raise ImportError("torch")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_who_has_switched_it_off_keeps_it_off() -> None:
    gc.disable()
    with unsearched():
        pass
    assert not gc.isenabled()
