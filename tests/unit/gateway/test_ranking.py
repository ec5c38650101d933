"""Large fleets: a kept order chooses exactly whom looking at everybody would."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.core.deployment import Endpoint
from cloudlm.core.routing import Policy
from cloudlm.gateway.loads import Loads, Turn
from cloudlm.gateway.prefixes import KEPT_S
from cloudlm.gateway.ranking import RANKED, RANKED_FROM
from cloudlm.gateway.router import choose


def fleet(count: int, weight: float = 1.0) -> tuple[Endpoint, ...]:
    return tuple(Endpoint("m", f"r{n}", f"http://h:{n}", 1, weight) for n in range(count))


def prompt(chance: random.Random) -> list[bytes]:
    """A beginning out of a few, and something of its own behind it."""
    if chance.random() < 0.3:
        return []
    shared = chance.randrange(4)
    keys = [b"s%d-%d" % (shared, n) for n in range(chance.randrange(5))]
    return keys + [chance.randbytes(8) for _ in range(chance.randrange(4))]


@settings(deadline=None)
@given(st.sampled_from(sorted(RANKED)), st.integers(RANKED_FROM, 80), st.integers(0, 2**32))
def test_the_order_chooses_as_looking_at_all_does(policy: Policy, count: int, seed: int) -> None:
    chance = random.Random(seed)
    loads, serving, now = Loads(), fleet(count), 0.0
    running: list[tuple[str, Turn]] = []
    for _ in range(150):
        now += chance.choice((0.0, 0.1, KEPT_S / 20))
        keys = prompt(chance)
        tried = frozenset(chance.sample([one.replica for one in serving], chance.choice((0, 0, 2))))
        chosen = choose(serving, loads, now, keys=keys, policy=policy, tried=tried)
        looked = choose(list(serving), loads, now, keys=keys, policy=policy, tried=tried)
        assert chosen is looked
        assert chosen is not None
        running.append((chosen.replica, loads.begin(chosen.replica, keys, now)))
        event = chance.random()
        if event < 0.4:
            loads.end(*running.pop(chance.randrange(len(running))))
        elif event < 0.6:
            loads.computed(*chance.choice(running))
        elif event < 0.65:
            loads.failed(chance.choice(serving).replica, now, unreachable=chance.random() < 0.5)
        elif event < 0.7:
            loads.cool(chance.choice(serving).replica, now + chance.random())
        elif event < 0.8:
            loads.answered(chance.choice(serving).replica)
        elif event < 0.85:  # others serve now
            serving = fleet(chance.randrange(RANKED_FROM, 80))
            loads.keep_only({one.replica for one in serving})


@pytest.mark.parametrize("policy", sorted(RANKED))
def test_the_order_is_really_used(policy: Policy) -> None:
    loads = Loads()
    choose(fleet(RANKED_FROM), loads, 0.0, policy=policy)
    assert "m" in loads.ranked
    loads = Loads()
    choose(fleet(RANKED_FROM - 1), loads, 0.0, policy=policy)
    assert not loads.ranked


def test_most_of_a_fleet_that_failed_is_looked_at_one_by_one() -> None:
    """The panic threshold holds in large fleets too."""
    loads, serving = Loads(), fleet(RANKED_FROM)
    for one in serving[: RANKED_FROM // 2 + 1]:
        loads.failed(one.replica, 0.0)
    chosen = {choose(serving, loads, 0.0, keys=()).replica for _ in range(1)}  # type: ignore[union-attr]
    assert chosen == {"r0"}  # all are equal again, and the first was never chosen


def test_different_weights_are_looked_at_one_by_one() -> None:
    loads = Loads()
    serving = (*fleet(RANKED_FROM), Endpoint("m", "big", "http://big", 1, 2.0))
    found = choose(serving, loads, 0.0)
    assert found is not None
    assert found.replica == "big"
