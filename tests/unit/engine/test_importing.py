"""Imports are made without the search for garbage, once, and it is resumed whatever becomes of
them."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudlm.engine.importing import unsearched

NEW = "cloudlm_test_large_module"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    was_on = gc.isenabled()
    yield
    gc.unfreeze()
    (gc.enable if was_on else gc.disable)()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of one that can be imported."""
    (tmp_path / f"{NEW}.py").write_text("made = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield NEW
    sys.modules.pop(NEW, None)


class Engine:
    """Something in a circle, as an engine is."""

    def __init__(self) -> None:
        self.itself = self


def test_nothing_is_searched_inside_and_what_was_made_is_left_alone_later(module: str) -> None:
    gc.unfreeze()
    gc.enable()
    with unsearched(module):
        assert not gc.isenabled()
        made = __import__(module).made
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(made)


def test_an_engine_between_two_imports_of_one_module_is_given_back(module: str) -> None:
    """As of several that are loaded one after the other (``worker.measure``)."""
    with unsearched(module):
        __import__(module)
    engine = Engine()
    gone = weakref.ref(engine)
    with unsearched(module):
        __import__(module)
    del engine
    gc.collect()
    assert gone() is None


def test_an_import_that_fails_resumes_the_search() -> None:
    gc.unfreeze()
    gc.enable()
    with pytest.raises(ImportError), unsearched(NEW):
        raise ImportError("torch")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_who_has_switched_it_off_keeps_it_off() -> None:
    gc.disable()
    with unsearched(NEW):
        pass
    assert not gc.isenabled()
