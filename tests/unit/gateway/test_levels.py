"""Weights and priorities among the endpoints of one deployment."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.deployment import Endpoint
from cloudlm.core.routing import Policy
from cloudlm.gateway.levels import by_priority, has_priorities
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.router import choose

DRAWS = st.floats(0, 1, exclude_max=True)


def endpoint(name: str, weight: float = 1.0, priority: int = 0) -> Endpoint:
    return Endpoint("m", name, f"http://{name}", 1, weight, priority=priority)


def shares(endpoints: list[Endpoint], loads: Loads, count: int = 20_000) -> dict[str, float]:
    random_ = random.Random(7)
    found: Counter[str] = Counter()
    for _ in range(count):
        draws = (random_.random(), random_.random())
        one = choose(endpoints, loads, 0.0, policy=Policy.WEIGHTED, draws=draws)
        assert one is not None
        found[one.replica] += 1
    return {name: number / count for name, number in found.items()}


def near(found: dict[str, float], expected: dict[str, float]) -> bool:
    names = {*found, *expected}
    return all(abs(found.get(name, 0.0) - expected.get(name, 0.0)) < 0.02 for name in names)


def test_weights_are_shares() -> None:
    found = shares([endpoint("a", 9.0), endpoint("b", 1.0)], Loads())
    assert near(found, {"a": 0.9, "b": 0.1})


def test_a_lower_priority_waits_until_the_first_is_short() -> None:
    endpoints = [endpoint(f"a{n}") for n in range(10)] + [endpoint("b", priority=1)]
    loads = Loads()
    assert has_priorities(endpoints)
    assert not has_priorities(endpoints[:10])
    for number in range(3):  # 7 of 10 are 98 % of what is needed with 1.4
        assert near({"b": shares(endpoints, loads).get("b", 0.0)}, {"b": 0.0})
        loads.failed(f"a{number}", 0.0)
    assert near({"b": shares(endpoints, loads).get("b", 0.0)}, {"b": 0.02})
    for number in range(3, 6):
        loads.cool(f"a{number}", 60.0)
    assert near({"b": shares(endpoints, loads)["b"]}, {"b": 1 - 0.4 * 1.4})


def test_all_of_the_first_gone_all_go_to_the_next() -> None:
    endpoints = [endpoint("a"), endpoint("b", priority=1), endpoint("c", priority=2)]
    loads = Loads()
    loads.failed("a", 0.0, unreachable=True)
    assert near(shares(endpoints, loads), {"b": 1.0})
    loads.cool("b", 60.0)
    assert near(shares(endpoints, loads), {"c": 1.0})


@given(
    st.lists(
        st.tuples(st.floats(0.1, 10), st.integers(0, 3), st.sampled_from("wfcr")),
        min_size=1,
        max_size=8,
    ),
    DRAWS,
    DRAWS,
    st.booleans(),
    st.data(),
)
def test_whoever_may_answer_is_found(
    facts: list[tuple[float, int, str]],
    one: float,
    two: float,
    retrying: bool,
    data: st.DataObject,
) -> None:
    """Nobody is lost by priorities: if any endpoint may take the request, one does; and each
    retry finds another until none is left."""
    endpoints = [endpoint(f"e{n}", w, p) for n, (w, p, _) in enumerate(facts)]
    loads = Loads()
    for number, (_, _, fate) in enumerate(facts):
        if fate in "fr":
            loads.failed(f"e{number}", 0.0, unreachable=fate == "r")
        elif fate == "c":
            loads.cool(f"e{number}", 60.0)
    policy = data.draw(st.sampled_from(Policy))
    tried: set[str] = set()
    while True:
        found = choose(
            endpoints, loads, 0.0, tried=tried, retrying=retrying, policy=policy, draws=(one, two)
        )
        if found is None:
            break
        assert found.replica not in tried
        tried.add(found.replica)
    asked_for_time = {f"e{n}" for n, fact in enumerate(facts) if fact[2] == "c"}
    expected = {e.replica for e in endpoints} - (asked_for_time if retrying else set())
    assert tried == expected


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), DRAWS)
def test_priorities_hold_everybody_once(priorities: list[int], draw: float) -> None:
    endpoints = [endpoint(f"e{n}", 1.0, p) for n, p in enumerate(priorities)]
    levels, rest = by_priority(endpoints, Loads(), 0.0, draw=draw)
    assert sorted(e.replica for level in levels for e in level) == sorted(
        e.replica for e in endpoints
    )
    assert all(len({e.priority for e in level}) == 1 for level in levels)
    assert levels[0][0].priority == min(priorities)
    assert 0.0 <= rest < 1.0
