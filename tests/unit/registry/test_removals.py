"""Removing a version and setting an alias to it at the same moment: never an alias to nothing."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.core.clock import ManualClock
from cloudlm.core.errors import Conflict, ModelNotFound, StorageFailed
from cloudlm.registry.registry import Registry
from cloudlm.registry.removals import intend, is_intended
from cloudlm.registry.stores.memory import MemoryStore

GONE = "somewhere else:1:1"


class Turns:
    """Lets threads go on one store operation at a time, in a given order."""

    def __init__(self, order):
        self._order = list(order)
        self._changed = threading.Condition()
        self._waiting = set()
        self._alive = set()
        self._granted = None

    def begin(self, names):
        self._alive = set(names)

    def take(self, name):
        """Wait for a turn; the one before is over."""
        with self._changed:
            self._over(name)
            self._waiting.add(name)
            self._grant()
            assert self._changed.wait_for(lambda: self._granted == name, timeout=60)
            self._waiting.discard(name)

    def end(self, name):
        with self._changed:
            self._over(name)
            self._alive.discard(name)
            self._grant()

    def _over(self, name):
        if self._granted == name:
            self._granted = None

    def _grant(self):
        """Say who goes on, once everybody alive waits."""
        if self._granted is None and self._alive and self._waiting == self._alive:
            among = sorted(self._alive)
            self._granted = among[(self._order.pop(0) if self._order else 0) % len(among)]
        self._changed.notify_all()


class SteppedStore:
    """A store whose operations wait for their turn."""

    def __init__(self, inner, turns, name):
        self._inner = inner
        self._turns = turns
        self._name = name

    def __getattr__(self, name):
        found = getattr(self._inner, name)

        def stepped(*arguments, **named):
            self._turns.take(self._name)
            answer = found(*arguments, **named)
            return iter(list(answer)) if name == "list" else answer

        return stepped


def registry_of(store, folder):
    return Registry(store, cache_dir=folder / "cache", cache_bytes=1 << 20, clock=ManualClock())


def raced(store, folder, order, works):
    """Run ``works`` at once, operation by operation in ``order``; what each raised."""
    turns, raised = Turns(order), {}
    turns.begin(works)

    def run(name):
        try:
            works[name](registry_of(SteppedStore(store, turns, name), folder))
        except (Conflict, ModelNotFound) as error:
            raised[name] = error
        finally:
            turns.end(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return raised


@pytest.fixture(scope="module")
def two_versions(tmp_path_factory):
    """The objects of a registry with versions 1 and 2 of a model, and its folder."""
    from tests.unit.registry.conftest import write_model

    folder = tmp_path_factory.mktemp("removals")
    store = MemoryStore()
    registry = registry_of(store, folder)
    for fill in (1, 2):
        registry.import_folder(write_model(folder / f"m{fill}", fill=fill), "tiny")
    return {key: store.get(key) for key in store.list("")}, folder


@settings(max_examples=150, deadline=None)
@given(order=st.lists(st.integers(0, 2), max_size=40), before=st.sampled_from([None, 1, 2]))
def test_however_they_interleave_no_alias_points_at_nothing(two_versions, order, before):
    objects, folder = two_versions
    store = MemoryStore()
    for key, data in objects.items():
        store.put(key, data)
    if before is not None:
        registry_of(store, folder).set_alias("tiny", "best", before)
    works = {
        "alias": lambda registry: registry.set_alias("tiny", "best", 2),
        "remove": lambda registry: registry.remove("models:/tiny/2"),
        "remove first": lambda registry: registry.remove("models:/tiny/1"),
    }
    raised = raced(store, folder, order, works)
    registry = registry_of(store, folder)
    living = {one.version for one in registry._manifests("tiny")}
    aliases = registry.list_aliases("tiny")
    assert set(aliases.values()) <= living
    assert ("remove" in raised) == (2 in living)
    if "alias" not in raised:
        assert aliases == {"best": 2}
    assert not list(store.list("removals/"))


def test_an_intent_of_the_dead_hinders_nobody():
    store = MemoryStore()
    intend(store, "tiny", 2, GONE, now=100.0)
    assert is_intended(store, "tiny", 2, now=200.0)
    assert not is_intended(store, "tiny", 22, now=200.0)
    assert not is_intended(store, "tiny", 2, now=200.0 + 2 * 86_400)


def test_a_version_that_is_being_removed_takes_no_alias(registry, model, clock):
    registry.import_folder(model, "tiny")
    key = intend(registry.store, "tiny", 1, GONE, clock.now())
    with pytest.raises(Conflict, match="being removed"):
        registry.set_alias("tiny", "best", 1)
    assert registry.list_aliases("tiny") == {}
    registry.store.delete(key)
    registry.set_alias("tiny", "best", 1)
    assert registry.resolve("models:/tiny@best").version == 1


class StickyStore(MemoryStore):
    """Fails once to delete."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def delete(self, key):
        self.asked.append(key)
        if len(self.asked) == 1:
            raise StorageFailed("the disk is gone for a moment")
        super().delete(key)


def test_a_note_that_cannot_be_deleted_hides_no_reason_and_keeps_no_other(two_versions):
    objects, folder = two_versions
    store = StickyStore()
    for key, data in objects.items():
        store.put(key, data)
    registry = registry_of(store, folder)
    registry.set_alias("tiny", "best", 2)
    with pytest.raises(Conflict, match="tiny@best"):
        registry.remove("tiny")
    assert len(store.asked) == 2
    assert list(store.list("removals/")) == store.asked[:1]
