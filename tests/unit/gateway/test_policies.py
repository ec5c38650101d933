"""The policies: shares converge, nobody starves, sessions stay."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.deployment import Endpoint
from cloudlm.core.routing import Policy
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.policies import AFFINITY_SLACK, DECIDERS
from cloudlm.gateway.router import choose
from cloudlm.gateway.sessions import evenly, session_of

WEIGHTS = st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=6)


def endpoints(*weights: float) -> list[Endpoint]:
    return [Endpoint("m", f"r{n}", f"http://h:{n}", 1, w) for n, w in enumerate(weights)]


def session(number: int) -> bytes:
    return session_of("acme", {"x-session-id": str(number)}, "x-session-id", b"")


def pick(
    policy: Policy,
    serving: list[Endpoint],
    loads: Loads,
    draws: tuple[float, float] = (0.0, 0.0),
    whose: bytes = b"",
) -> str:
    found = choose(serving, loads, 0.0, policy=policy, draws=draws, session=whose)
    assert found is not None
    return found.replica


def test_every_policy_has_a_decider() -> None:
    assert set(DECIDERS) == set(Policy)


@given(st.sampled_from(Policy), WEIGHTS, st.integers(0, 2**32))
def test_nobody_starves(policy: Policy, weights: list[float], seed: int) -> None:
    """Under load that does not end, every replica gets requests, whatever the policy."""
    serving, loads, chance = endpoints(*weights), Loads(), random.Random(seed)
    for number in range(60 * len(weights)):
        draws = (chance.random(), chance.random())
        loads.begin(pick(policy, serving, loads, draws, session(number)))
    assert all(loads.of(one.replica).ongoing > 0 for one in serving)


@given(st.integers(1, 6), st.integers(1, 50))
def test_round_robin_goes_round(count: int, requests: int) -> None:
    serving, loads = endpoints(*[1.0] * count), Loads()
    order = []
    for _ in range(requests):
        chosen = pick(Policy.ROUND_ROBIN, serving, loads)
        loads.begin(chosen)  # that they do not end makes no difference
        order.append(chosen)
    assert order == [f"r{n % count}" for n in range(requests)]


def test_round_robin_goes_on_over_a_lost_replica() -> None:
    serving, loads = endpoints(1, 1, 1), Loads()
    for _ in range(4):
        loads.begin(pick(Policy.ROUND_ROBIN, serving, loads))
    loads.failed("r1", 0.0)
    order = []
    for _ in range(4):
        order.append(pick(Policy.ROUND_ROBIN, serving, loads))
        loads.begin(order[-1])
    assert order == ["r2", "r0", "r2", "r0"]


@given(WEIGHTS, st.lists(st.integers(0, 9), min_size=6, max_size=6))
def test_least_load_is_the_least(weights: list[float], ongoing: list[int]) -> None:
    serving, loads = endpoints(*weights), Loads()
    for one, count in zip(serving, ongoing, strict=False):
        for _ in range(count):
            loads.begin(one.replica)
    found = pick(Policy.LEAST_LOAD, serving, loads)
    relative = {one.replica: (loads.of(one.replica).ongoing + 1) / one.weight for one in serving}
    assert relative[found] == min(relative.values())


@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=8),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
)
def test_power_of_two_never_takes_the_most_loaded(
    ongoing: list[int], first: float, second: float
) -> None:
    """Two different ones are looked at, so one that is busier than all others is never taken."""
    serving, loads = endpoints(*[1.0] * len(ongoing)), Loads()
    for one, count in zip(serving, ongoing, strict=True):
        for _ in range(count):
            loads.begin(one.replica)
    found = pick(Policy.POWER_OF_TWO, serving, loads, (first, second))
    busiest = max(ongoing)
    if ongoing.count(busiest) == 1:
        assert loads.of(found).ongoing < busiest


def test_power_of_two_is_much_evener_than_one_draw() -> None:
    chance, loads = random.Random(1), Loads()
    serving = endpoints(*[1.0] * 20)
    blind: Counter[int] = Counter(int(chance.random() * 20) for _ in range(2000))
    for _ in range(2000):
        draws = (chance.random(), chance.random())
        loads.begin(pick(Policy.POWER_OF_TWO, serving, loads, draws))
    busiest = max(loads.of(one.replica).ongoing for one in serving)
    assert busiest <= 104
    assert max(blind.values()) > 110


@given(st.integers(2, 8), st.data())
def test_a_lost_replica_moves_its_own_sessions_only(count: int, data: st.DataObject) -> None:
    serving = endpoints(*[1.0] * count)
    lost = data.draw(st.sampled_from(serving))
    left = [one for one in serving if one is not lost]
    for number in range(50):
        whose = session(number)
        before = pick(Policy.SESSION_AFFINITY, serving, Loads(), whose=whose)
        after = pick(Policy.SESSION_AFFINITY, left, Loads(), whose=whose)
        assert after == before or before == lost.replica
        swapped = list(reversed(serving))
        assert pick(Policy.SESSION_AFFINITY, swapped, Loads(), whose=whose) == before


def test_sessions_are_spread_by_weight() -> None:
    serving = endpoints(1.0, 1.0, 2.0)
    shares: Counter[str] = Counter(
        pick(Policy.SESSION_AFFINITY, serving, Loads(), whose=session(n)) for n in range(4000)
    )
    assert shares["r2"] == pytest.approx(2000, abs=150)
    assert shares["r0"] == pytest.approx(1000, abs=130)


@given(WEIGHTS, st.integers(1, 80))
def test_one_busy_session_does_not_drown_its_replica(weights: list[float], requests: int) -> None:
    serving, loads = endpoints(*weights), Loads()
    for number in range(1, requests + 1):
        chosen = pick(Policy.SESSION_AFFINITY, serving, loads, whose=session(1))
        loads.begin(chosen)
        weight = next(one.weight for one in serving if one.replica == chosen)
        bound = AFFINITY_SLACK * number * weight / sum(weights)
        assert loads.of(chosen).ongoing <= bound + 1


def test_without_a_session_affinity_is_least_cost() -> None:
    serving, loads = endpoints(1, 1), Loads()
    loads.begin("r0")
    assert pick(Policy.SESSION_AFFINITY, serving, loads) == "r1"


def test_where_a_session_is_named() -> None:
    header = "x-session-id"
    of_header = session_of("t", {header: "a"}, header, b'{"user": "b"}')
    assert of_header == session_of("t", {header: " a "}, header, b"")
    assert of_header == session_of("t", {}, header, b'{"user": "b", "prompt_cache_key": "a"}')
    assert of_header == session_of("t", {}, header, b'{"messages": [{"user": 1}], "user": "a"}')
    assert of_header != session_of("other tenant", {header: "a"}, header, b"")
    for body in (b"", b"{}", b"[]", b'{"user": 7}', b'{"user": ""}', b'{"user": null}', b"\xff"):
        assert session_of("t", {header: "  "}, header, body) == b""


def test_even_numbers_of_sessions_are_even() -> None:
    found = sorted(evenly(session(n)) for n in range(1000))
    assert all(0 <= one < 1 for one in found)
    assert max(abs(one - n / 1000) for n, one in enumerate(found)) < 0.06
