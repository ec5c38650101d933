"""The cache's rules: what may be kept, what is the same, and what the store holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.chat import Usage
from cloudlm.gateway.cache import (
    ENTRY_BYTES,
    LARGEST_SHARE,
    Answer,
    AnswerStore,
    canonical,
    deterministic,
    entity_tag,
    matches,
    question_key,
)
from cloudlm.gateway.dialects.openai import decode
from cloudlm.gateway.holdings import Holdings, Place
from cloudlm.security.keys import answer_key, cache_salt, tenant_mark

PEPPER = b"p" * 32
_scalars = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8)
_values = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
_bodies = st.dictionaries(st.text(max_size=8), _values, max_size=6)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"temperature": 0}, True),
        ({"temperature": 0.0}, True),
        ({"temperature": 0.1}, False),
        ({"temperature": None}, False),
        ({"temperature": False}, False),
        ({"seed": 0}, True),
        ({"seed": 7, "temperature": 1.0}, True),
        ({"seed": None}, False),
        ({"top_p": 0.0001}, False),
    ],
)
def test_only_greedy_or_seeded_requests_are_deterministic(
    fields: dict[str, Any], expected: bool
) -> None:
    assert deterministic(fields) is expected


@given(_bodies, st.randoms(use_true_random=False))
def test_how_a_request_is_written_makes_no_difference(body: dict[str, Any], random: Any) -> None:
    names = list(body)
    random.shuffle(names)
    written = json.dumps({name: body[name] for name in names}, indent=random.choice([None, 2]))
    read = decode(written.encode())
    assert read is not None
    assert canonical(read) == canonical(body)


@given(_bodies, _bodies)
def test_what_is_asked_does(one: dict[str, Any], other: dict[str, Any]) -> None:
    for body in (one, other):
        body.pop("priority", None)
    same = json.dumps(sorted(one.items())) == json.dumps(sorted(other.items()))
    assert (canonical(one) == canonical(other)) is same


def test_numbers_and_priority() -> None:
    assert canonical({"temperature": 0, "n": 1}) == canonical({"n": 1, "temperature": 0.0})
    assert canonical({"temperature": 0.5}) != canonical({"temperature": 0})
    assert canonical({"seed": 1}) != canonical({"seed": True})
    assert canonical({"seed": 1, "priority": 5}) == canonical({"seed": 1})


def test_a_tools_schema_is_kept_in_its_order() -> None:
    """A chat template shows it to the model as it stands: another order is another prompt."""
    one = {"tools": [{"name": "f", "args": {"a": 1, "b": 1.0}}]}
    assert canonical(one) != canonical({"tools": [{"name": "f", "args": {"b": 1.0, "a": 1}}]})
    assert canonical(one) != canonical({"tools": [{"name": "f", "args": {"a": 1, "b": 1}}]})


_asked = st.tuples(st.text(max_size=6), st.lists(st.binary(max_size=6), max_size=4))


@pytest.mark.promise(7)
@given(_asked, _asked)
def test_tenants_and_parts_never_meet_in_one_key(
    one: tuple[str, list[bytes]], other: tuple[str, list[bytes]]
) -> None:
    first = question_key(answer_key(one[0], PEPPER), one[1])
    second = question_key(answer_key(other[0], PEPPER), other[1])
    assert (first == second) is (one == other)


def test_the_tenants_key_is_none_that_a_worker_is_told() -> None:
    key = answer_key("acme", PEPPER)
    assert key.hex()[:32] not in (cache_salt("acme", PEPPER), tenant_mark("acme", PEPPER))
    assert key != answer_key("acme", b"q" * 32)


def test_entity_tags() -> None:
    tag = entity_tag(b"k" * 32, b"body")
    assert tag.startswith('"') and tag.endswith('"')
    assert tag != entity_tag(b"k" * 32, b"other")
    assert tag != entity_tag(b"j" * 32, b"body")
    assert matches(tag, tag)
    assert matches(f'"other", W/{tag}', tag)
    assert matches("*", tag)
    assert not matches('"other"', tag)
    assert not matches("", tag)


def _at(key: bytes, tenant: str = "t") -> Place:
    return Place(tenant, key)


def _answer(size_bytes: int, mark: int = 0) -> Answer:
    return Answer(bytes([mark]) * size_bytes, "application/json", Usage(1, 2, 0), f'"{mark}"')


def test_an_answer_ages() -> None:
    store = AnswerStore(1_000_000, 10.0)
    assert store.put(_at(b"k"), _answer(5), 100.0)
    assert store.get(_at(b"k"), 109.9) == _answer(5)
    assert store.get(_at(b"k"), 110.0) is None
    assert store.size_bytes == 0


def test_the_one_not_asked_for_longest_goes_first() -> None:
    store = AnswerStore(LARGEST_SHARE * 1024, 10.0)
    for number in range(LARGEST_SHARE):
        assert store.put(_at(bytes([number])), _answer(1024 - ENTRY_BYTES, number), 0.0)
    assert store.get(_at(b"\0"), 0.0) is not None
    store.put(_at(b"new"), _answer(1024 - ENTRY_BYTES), 0.0)
    assert store.get(_at(b"\1"), 0.0) is None
    assert store.get(_at(b"\0"), 0.0) is not None


def test_one_answer_cannot_take_the_store() -> None:
    store = AnswerStore(LARGEST_SHARE * 1024, 10.0)
    assert not store.put(_at(b"k"), _answer(1024 - ENTRY_BYTES + 1), 0.0)
    assert store.get(_at(b"k"), 0.0) is None and store.size_bytes == 0


@pytest.mark.promise(7, 40)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 3000), st.floats(0, 5)),
        max_size=40,
    )
)
def test_the_store_keeps_its_bound_and_never_mixes(asked: list[tuple[int, int, float]]) -> None:
    store, now = AnswerStore(16 * 1024, 8.0), 0.0
    for mark, size_bytes, later in asked:
        now += later
        store.put(_at(bytes([mark])), _answer(size_bytes, mark), now)
        held = [store.get(_at(bytes([n])), now) for n in range(6)]
        assert all(one is None or one.tag == f'"{n}"' for n, one in enumerate(held))
        assert store.size_bytes == sum(len(one.body) + ENTRY_BYTES for one in held if one)
        assert store.size_bytes <= 16 * 1024


# Shares -----------------------------------------------------------------------------------------


@pytest.mark.promise(23)
def test_a_tenant_with_many_questions_empties_nobody_elses_share() -> None:
    held: Holdings[int] = Holdings(100, {})
    for number in range(5):
        held.put(Place("quiet", bytes([number])), number, 10, 10.0, 0.0)
    for number in range(200):
        held.put(Place("loud", bytes([number])), number, 10, 10.0, 0.0)
    assert [held.get(Place("quiet", bytes([n])), 0.0) for n in range(5)] == [0, 1, 2, 3, 4]
    assert held.get(Place("loud", bytes([199])), 0.0) == 199
    assert held.get(Place("loud", bytes([0])), 0.0) is None


def test_shares_follow_weights_that_change() -> None:
    weights: dict[str, float] = {}
    held: Holdings[int] = Holdings(100, weights)

    def fill(tenant: str) -> None:
        for number in range(20):
            held.put(Place(tenant, bytes([number])), number, 10, 10.0, 0.0)

    def count(tenant: str) -> int:
        return sum(held.get(Place(tenant, bytes([n])), 0.0) is not None for n in range(20))

    fill("a")
    fill("b")
    assert (count("a"), count("b")) == (5, 5)
    weights["b"] = 4.0
    fill("b")
    assert (count("a"), count("b")) == (2, 8)
    weights.clear()
    fill("a")
    assert (count("a"), count("b")) == (5, 5)


def test_who_comes_late_gets_a_share_too() -> None:
    held: Holdings[int] = Holdings(100, {"big": 3.0})
    for number in range(10):
        held.put(Place("big", bytes([number])), number, 10, 10.0, 0.0)
    for number in range(10):
        held.put(Place("small", bytes([number])), number, 10, 10.0, 0.0)
    left = {
        t: sum(held.get(Place(t, bytes([n])), 0.0) is not None for n in range(10))
        for t in ("big", "small")
    }
    assert left == {"big": 8, "small": 2}


def test_what_is_too_old_makes_room_first() -> None:
    dropped: list[int] = []
    held: Holdings[int] = Holdings(30, {}, lambda _, value: dropped.append(value))
    held.put(Place("a", b"1"), 1, 10, 5.0, 0.0)
    held.put(Place("b", b"1"), 2, 20, 50.0, 0.0)
    held.put(Place("b", b"2"), 3, 10, 50.0, 6.0)
    assert dropped == [1]
    assert held.size_bytes == 30


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 6), st.integers(1, 40), st.floats(0, 3)),
        max_size=60,
    )
)
def test_who_is_not_over_its_share_loses_nothing(
    asked: list[tuple[str, int, int, float]],
) -> None:
    weights = {"a": 2.0}
    now, sizes = 0.0, dict[Place, tuple[int, float]]()

    def gone(place: Place, value: int) -> None:
        del sizes[place]

    held: Holdings[int] = Holdings(100, weights, gone)
    for tenant, key, size_bytes, later in asked:
        now += later
        place = Place(tenant, bytes([key]))
        held.drop(place)
        of = {t: sum(s for p, (s, _) in sizes.items() if p.tenant == t) for t in "abc"}
        tenants = {t for t in "abc" if of[t]} | {tenant}
        share = {
            t: 100 * weights.get(t, 1.0) / sum(weights.get(o, 1.0) for o in tenants)
            for t in tenants
        }
        before = {p for p, (_, until) in sizes.items() if until > now}
        sizes[place] = (size_bytes, now + 8.0)
        held.put(place, key, size_bytes, now + 8.0, now)
        for lost in before - sizes.keys():
            assert (
                of[lost.tenant] + (size_bytes if lost.tenant == tenant else 0) > share[lost.tenant]
            )
        assert held.size_bytes == sum(size for size, _ in sizes.values()) <= 100
