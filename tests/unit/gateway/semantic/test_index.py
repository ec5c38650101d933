"""Vectors of known questions: found by likeness, within a group, within bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.gateway.holdings import Place
from cloudlm.gateway.semantic import index as module
from cloudlm.gateway.semantic.index import Index
from cloudlm.gateway.semantic.meaning import read
from cloudlm.gateway.semantic.vectors import built_in, unit

MEANING = read("x")


def _vector(*values: float) -> Any:
    return unit(values)


def _found(index: Index, group: bytes, vector: Any, least: float = 0.5) -> list[bytes]:
    return [one.place.key for one in index.near(group, vector, least, 0.0)]


def test_the_most_alike_come_first_and_groups_never_meet() -> None:
    index = Index(10**6, 10.0, {})
    index.add(b"g", Place("t", b"1"), _vector(1, 0.2), MEANING, 0.0)
    index.add(b"g", Place("t", b"2"), _vector(1, 0), MEANING, 0.0)
    index.add(b"g", Place("t", b"3"), _vector(0, 1), MEANING, 0.0)
    index.add(b"h", Place("t", b"4"), _vector(1, 0), MEANING, 0.0)
    assert _found(index, b"g", _vector(1, 0)) == [b"2", b"1"]
    assert _found(index, b"g", _vector(1, 0), 0.99) == [b"2"]
    assert _found(index, b"nowhere", _vector(1, 0)) == []
    assert _found(index, b"g", _vector(1, 0, 0)) == []
    index.drop(Place("t", b"2"))
    assert _found(index, b"g", _vector(1, 0)) == [b"1"]


def test_what_is_too_old_is_not_found() -> None:
    index = Index(10**6, 10.0, {})
    index.add(b"g", Place("t", b"1"), _vector(1, 0), MEANING, 0.0)
    assert not list(index.near(b"g", _vector(1, 0), 0.5, 10.0))
    assert index.size_bytes == 0 and not index._groups


def test_a_group_is_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MAX_GROUP", 4)
    index = Index(10**6, 10.0, {})
    for number in range(9):
        index.add(b"g", Place("t", bytes([number])), _vector(1, number), MEANING, 0.0)
    assert len(index._groups[b"g"].places) == 4
    assert bytes([8]) in _found(index, b"g", _vector(1, 8))


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.integers(0, 9), st.sampled_from([b"g", b"h"]), st.booleans()
        ),
        max_size=60,
    )
)
def test_rows_and_places_stay_together(asked: list[tuple[str, int, bytes, bool]]) -> None:
    """Whatever is added, replaced, dropped or pushed out, each vector leads to its own place."""
    index = Index(6 * (module.TURN_BYTES + 40), 10.0, {})
    for tenant, number, group, drop in asked:
        place = Place(tenant, bytes([number]))
        vector = np.zeros(10, np.float32)
        vector[number] = 1.0
        if drop:
            index.drop(place)
        else:
            index.add(group, place, vector, MEANING, 0.0)
            assert place in [one.place for one in index.near(group, vector, 0.9, 0.0)]
        for rows in index._groups.values():
            for row, held in enumerate(rows.places):
                assert rows.rows[row][held.key[0]] == 1.0
    assert sum(len(rows.places) for rows in index._groups.values()) <= 6


def test_the_built_in_embedder_knows_spelling_and_order() -> None:
    def like(one: str, other: str) -> float:
        return float(built_in(read(one)) @ built_in(read(other)))

    assert like("reset my password", "Reset my password!") > 0.99
    assert like("reset my password", "change the password") > 0.9
    assert like("convert dollars to euros", "convert euros to dollars") < 0.97
    assert like("reset my password", "the weather in May") < 0.3
    assert np.linalg.norm(built_in(read(""))) == 0.0
