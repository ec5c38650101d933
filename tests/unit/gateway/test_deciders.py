"""The pure parts: router, retry budget, jitter."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.core.deployment import Endpoint
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.retry import RetryBudget, full_jitter
from cloudlm.gateway.router import choose


def endpoints(*weights: float) -> list[Endpoint]:
    return [Endpoint("m", f"r{n}", f"http://h:{n}", 1, w) for n, w in enumerate(weights)]


def name(endpoint: Endpoint | None) -> str | None:
    return endpoint.replica if endpoint else None


def test_least_load_wins() -> None:
    loads = Loads()
    loads.begin("r0")
    loads.begin("r0")
    loads.begin("r1")
    assert name(choose(endpoints(1, 1), loads, 0.0)) == "r1"
    loads.end("r0")
    loads.end("r0")
    assert name(choose(endpoints(1, 1), loads, 0.0)) == "r0"


def test_ties_go_round() -> None:
    loads = Loads()
    order = []
    for _ in range(6):
        chosen = choose(endpoints(1, 1, 1), loads, 0.0)
        assert chosen is not None
        loads.begin(chosen.replica)
        loads.end(chosen.replica)
        order.append(chosen.replica)
    assert order == ["r0", "r1", "r2", "r0", "r1", "r2"]


@given(st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=5), st.integers(1, 60))
def test_load_follows_weight(weights: list[float], requests: int) -> None:
    loads = Loads()
    for _ in range(requests):
        chosen = choose(endpoints(*weights), loads, 0.0)
        assert chosen is not None
        loads.begin(chosen.replica)
    shares = [loads.of(f"r{n}").ongoing / weight for n, weight in enumerate(weights)]
    # Nobody could be relieved by giving one of its requests to somebody else.
    for n, weight in enumerate(weights):
        if loads.of(f"r{n}").ongoing:
            others = [(loads.of(f"r{m}").ongoing + 1) / w for m, w in enumerate(weights) if m != n]
            assert all(shares[n] <= other + 1e-9 for other in others), weight
    assert loads.total(f"r{n}" for n in range(len(weights))) == requests


def test_tried_weightless_and_none() -> None:
    loads = Loads()
    assert name(choose(endpoints(0, 1), loads, 0.0)) == "r1"
    assert choose(endpoints(0, 1), loads, 0.0, tried={"r1"}) is None
    assert choose([], loads, 0.0) is None


@pytest.mark.promise(28)
@pytest.mark.known_failure("litellm#40130")
def test_cooling_replica_is_a_last_resort_and_never_a_retry() -> None:
    loads = Loads()
    loads.cool("r0", until=10.0)
    loads.cool("r0", until=5.0)  # a shorter wish does not shorten the longer one
    for _ in range(3):
        loads.begin("r1")
    assert name(choose(endpoints(1, 1), loads, 9.0)) == "r1"
    assert name(choose(endpoints(1), loads, 9.0)) == "r0"
    assert choose(endpoints(1), loads, 9.0, tried={"r1"}, retrying=True) is None
    assert name(choose(endpoints(1), loads, 10.0, tried={"r1"}, retrying=True)) == "r0"


@pytest.mark.promise(28)
@pytest.mark.known_failure("litellm#34836")
def test_failing_replica_is_distrusted_longer_and_longer() -> None:
    loads = Loads()
    for _ in range(3):
        loads.begin("r1")
    waits = []
    for _ in range(8):
        loads.failed("r0", 100.0)
        waits.append(loads.of("r0").suspect_until - 100.0)
    assert waits == [1, 2, 4, 8, 16, 16, 16, 16]
    assert name(choose(endpoints(1, 1), loads, 115.9)) == "r1"
    assert name(choose(endpoints(1, 1), loads, 116.0)) == "r0"
    assert name(choose(endpoints(1), loads, 101.0, tried={"r1"}, retrying=True)) == "r0"
    loads.answered("r0")
    assert name(choose(endpoints(1, 1), loads, 101.0)) == "r0"


def test_forgotten_replicas() -> None:
    loads = Loads()
    loads.begin("busy")
    loads.begin("idle")
    loads.end("idle")
    loads.keep_only(set())
    assert loads.of("busy").ongoing == 1
    assert loads.of("idle").chosen_at == 0
    loads.end("busy")


@pytest.mark.promise(8)
@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 3)), max_size=200))
def test_budget_never_exceeds_its_share(steps: list[tuple[float, int]]) -> None:
    """At each granted retry the last minute holds at most 20 % of retries, or 3."""
    budget, now = RetryBudget(), 0.0
    requests: list[float] = []
    retries: list[float] = []
    for pause, tries in steps:
        now += pause
        budget.count_request(now)
        requests.append(now)
        for _ in range(tries):
            if budget.take(now):
                retries.append(now)
                recent = sum(t > now - 66 for t in requests)  # a window and the slice it began in
                assert sum(t > now - 60 for t in retries) <= max(3, 0.2 * recent)


def test_budget_floor_returns_after_a_minute() -> None:
    budget = RetryBudget()
    budget.count_request(0.0)
    assert [budget.take(0.0) for _ in range(4)] == [True, True, True, False]
    budget.count_request(61.0)
    assert budget.take(61.0)


def test_budget_grows_with_requests() -> None:
    budget = RetryBudget()
    for _ in range(100):
        budget.count_request(1.0)
    assert sum(budget.take(2.0) for _ in range(100)) == 20


@pytest.mark.promise(8)
@pytest.mark.known_failure("deer-flow#4294", "hermes-agent#100725")
def test_full_jitter() -> None:
    assert full_jitter(1, 0.0) == 0.0
    assert full_jitter(1, 0.999) < 0.05
    assert 0.09 < full_jitter(2, 0.999) < 0.1
    assert full_jitter(50, 0.5) == 0.5


@pytest.mark.promise(8)
@pytest.mark.known_failure("deer-flow#4294")
@given(st.integers(0, 2**32), st.integers(20, 200), st.sampled_from([0.5, 1.0, 5.0]))
@settings(max_examples=25, deadline=None)
def test_a_minute_of_outage_adds_a_fifth_and_no_new_beat(
    seed: int, crowd: int, every_s: float
) -> None:
    """Crowds that come together and all fail: what they try again comes spread over the wait, not
    as a second crowd."""
    budget, draw = RetryBudget(), random.Random(seed)
    requests, retries, spread = 0, 0, Counter[int]()
    for beat in range(round(60.0 / every_s)):
        now = beat * every_s
        for _ in range(crowd):
            budget.count_request(now)
            requests += 1
            waited_s = 0.0
            for attempt in (1, 2):  # three attempts at most
                if not budget.take(now):
                    break
                retries += 1
                waited_s += full_jitter(attempt, draw.random())
                spread[int(waited_s // _SLOT_S)] += 1
    assert retries <= max(3, 0.2 * requests)
    assert retries >= 0.2 * requests - 2  # what the budget gives is used
    # The first waits are even over ten slots, longer ones over more: a tenth, and six deviations.
    assert max(spread.values()) <= 0.1 * retries + 2 * math.sqrt(retries)


_SLOT_S = 0.005
