"""Who stays in memory: rules over random fleets, and each rule by an example."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.control.residency import BUSY_STAYS, Claim, reside, too_large
from cloudlm.core.deployment import Residence

STAY_S = 5.0
NOW = 1000.0


def idle(name, size=1, used_at=0.0, loaded_at=0.0, **changes):
    return Claim(
        name,
        size,
        wanted=1,
        present=1,
        held_bytes=size,
        used_at=used_at,
        loaded_at=loaded_at,
        **changes,
    )


def busy(name, size=1, loaded_at=0.0, **changes):
    return idle(name, size, used_at=NOW, loaded_at=loaded_at, asked=True, **changes)


def waiting(name, size=1, asked_at=NOW, **changes):
    return Claim(name, size, wanted=1, asked=True, used_at=NOW, asked_at=asked_at, **changes)


def verdicts(claims, budget, now=NOW, **changes):
    return reside(claims, budget, now, STAY_S, **changes)


def unloaded(found):
    return {name for name, one in found.items() if one.unload}


@st.composite
def fleets(draw):
    claims = []
    for number in range(draw(st.integers(0, 8))):
        need = draw(st.integers(1, 40))
        present = draw(st.integers(0, 3))
        claims.append(
            Claim(
                f"m{number}",
                need,
                wanted=draw(st.integers(0, 3)),
                present=present,
                held_bytes=present * draw(st.sampled_from([need, need + 3])),
                asked=draw(st.booleans()),
                used_at=draw(st.floats(0, NOW)),
                asked_at=draw(st.floats(0, NOW)),
                loaded_at=draw(st.none() | st.floats(0, NOW)) if present else None,
                pinned=draw(st.booleans()),
                least=draw(st.integers(1, 2)),
                asleep=draw(st.booleans()),
                failing=draw(st.booleans()),
            )
        )
    return claims, draw(st.integers(0, 100)), draw(st.integers(0, 20))


@given(fleets())
@settings(max_examples=500)
def test_what_starts_always_fits_beside_all_that_is_there(fleet):
    claims, budget, other = fleet
    found = verdicts(claims, budget, other_bytes=other)
    held = other + sum(one.held_bytes for one in claims)
    started = sum(max(found[one.name].replicas - one.staying, 0) * one.need_bytes for one in claims)
    assert not started or held + started <= budget


@given(fleets())
@settings(max_examples=500)
def test_what_is_pinned_keeps_what_it_must(fleet):
    claims, budget, other = fleet
    found = verdicts(claims, budget, other_bytes=other)
    for one in claims:
        if one.pinned:
            assert not found[one.name].unload
            assert found[one.name].replicas >= min(one.staying, one.least)


@given(fleets())
@settings(max_examples=300)
def test_nobody_gets_more_than_is_wanted_and_nothing_goes_without_need(fleet):
    claims, budget, other = fleet
    found = verdicts(claims, budget, other_bytes=other)
    assert all(0 <= found[one.name].replicas <= one.wanted for one in claims)
    fits = other + sum(max(one.held_bytes, 0) for one in claims) <= budget
    if fits and all(one.staying == one.wanted for one in claims):
        assert not any(found[one.name].replicas < one.staying for one in claims)


@given(fleets())
@settings(max_examples=300)
def test_used_models_stay_for_their_shortest_time(fleet):
    claims, budget, other = fleet
    if other + sum(one.held_bytes for one in claims) > budget:
        return  # the budget was lowered: everybody may have to go
    found = verdicts(claims, budget, other_bytes=other)
    for one in claims:
        if one.loaded_at is None or one.failing or one.asleep:
            continue
        stays = STAY_S * (BUSY_STAYS if one.asked else 1)
        if one.used_at >= one.loaded_at and NOW - one.loaded_at < stays:
            assert not found[one.name].unload


def test_the_least_recently_used_goes_first_and_no_more_than_is_needed():
    claims = [idle("old", used_at=1), idle("older", used_at=0.5), idle("new", used_at=2)]
    found = verdicts([*claims, waiting("w")], 3)
    assert unloaded(found) == {"older"}
    assert found["w"].residence is Residence.WAITING
    assert found["older"].residence is Residence.LEAVING


def test_what_is_large_enough_alone_spares_the_others():
    found = verdicts([idle("a", 1, used_at=1), idle("b", 5, used_at=2), waiting("w", 5)], 6)
    assert unloaded(found) == {"b"}


def test_nothing_goes_when_it_would_not_be_enough():
    found = verdicts([idle("a"), busy("b", 5, loaded_at=NOW - 1), waiting("w", 5)], 6)
    assert not unloaded(found)


def test_it_starts_only_when_the_memory_is_there():
    leaving = replace(idle("a"), wanted=0)
    assert verdicts([leaving, waiting("w")], 1)["w"].replicas == 0
    assert verdicts([replace(leaving, present=0, held_bytes=0), waiting("w")], 1)["w"].replicas == 1


def test_what_is_asked_all_the_time_gives_way_after_its_turn():
    long_s = BUSY_STAYS * STAY_S
    early = verdicts([busy("a", loaded_at=NOW - long_s + 1), waiting("w")], 1)
    assert not unloaded(early)
    late = verdicts([busy("a", loaded_at=NOW - long_s), waiting("w")], 1)
    assert unloaded(late) == {"a"}


def test_idle_goes_before_busy_and_replicas_beside_the_first_between_them():
    crowd = replace(busy("crowd"), wanted=2, present=2, held_bytes=2)
    others = [idle("idle", used_at=1), busy("busy", loaded_at=1.0)]
    first = verdicts([crowd, *others, waiting("w")], 4)
    assert unloaded(first) == {"idle"}
    second = verdicts([crowd, others[1], waiting("w")], 3)
    assert not unloaded(second)
    assert second["crowd"].replicas == 1
    assert second["busy"].replicas == 1


def test_a_large_model_is_not_overtaken_for_ever():
    claims = [busy("a", loaded_at=NOW - 1), waiting("large", 3, asked_at=1.0)]
    found = verdicts([*claims, waiting("small", 1, asked_at=2.0)], 3)
    assert found["small"].replicas == 0
    assert found["large"].residence is Residence.WAITING


def test_who_stands_behind_may_use_what_the_first_does_not_need():
    leaving = replace(idle("a", 3), wanted=0)
    found = verdicts([leaving, waiting("large", 3, 1.0), waiting("small", 1, 2.0)], 4)
    assert (found["large"].replicas, found["small"].replicas) == (0, 1)


def test_what_nobody_asks_is_loaded_where_there_is_room():
    eager = [Claim(f"m{number}", 1, wanted=1, used_at=float(number)) for number in range(5)]
    found = verdicts(eager, 3)
    assert {name for name, one in found.items() if one.replicas} == {"m2", "m3", "m4"}
    assert found["m0"].residence is Residence.UNLOADED


def test_more_replicas_take_the_place_of_what_nobody_asks_only():
    grows = replace(busy("a"), wanted=3)
    assert unloaded(verdicts([grows, idle("b", used_at=1)], 2)) == {"b"}
    assert not unloaded(verdicts([grows, busy("b")], 2))


def test_pinned_is_loaded_before_all_others():
    claims = [waiting("w", asked_at=1.0), Claim("p", 1, wanted=1, pinned=True, asked_at=NOW)]
    found = verdicts(claims, 1)
    assert found["p"].replicas == 1
    assert found["w"].residence is Residence.TOO_LARGE  # pinned leaves nothing


def test_a_replica_that_sleeps_or_does_not_come_up_goes_first():
    claims = [idle("asleep", used_at=9, asleep=True), idle("old", used_at=1)]
    assert unloaded(verdicts([*claims, waiting("w")], 2)) == {"asleep"}
    broken = replace(busy("broken"), loaded_at=None, failing=True)
    assert unloaded(verdicts([broken, idle("old", used_at=1), waiting("w")], 2)) == {"broken"}


def test_what_was_loaded_and_never_asked_goes_at_once():
    fresh = idle("eager", used_at=1.0, loaded_at=NOW)
    assert unloaded(verdicts([fresh, waiting("w")], 1)) == {"eager"}
    asked = idle("asked", used_at=NOW, loaded_at=NOW)
    assert not unloaded(verdicts([asked, waiting("w")], 1))


def test_a_lowered_budget_is_kept_to():
    found = verdicts([idle("a", used_at=1), idle("b", used_at=2), busy("c")], 1)
    assert unloaded(found) == {"a", "b"}


def test_too_large_is_said_of_what_pinned_ones_shut_out():
    pinned = Claim("p", 6, wanted=1, pinned=True)
    assert too_large([pinned, waiting("w", 5)], 10) == {"w"}
    assert too_large([pinned, waiting("w", 4)], 10) == frozenset()
    assert too_large([waiting("w", 11)], 10) == {"w"}


def test_a_pinned_one_that_does_not_fit_shuts_out_nobody():
    large = Claim("large", 11, wanted=1, pinned=True)
    small = Claim("small", 4, wanted=1, pinned=True)
    assert too_large([large, small, waiting("w", 6)], 10) == {"large"}
    found = verdicts([large, small, waiting("w", 6)], 10)
    assert (found["small"].replicas, found["w"].replicas) == (1, 1)


def test_of_pinned_ones_that_exclude_each_other_the_one_that_is_there_stays():
    first = Claim("a", 6, wanted=1, pinned=True)
    there = Claim("b", 6, wanted=1, present=1, held_bytes=6, pinned=True)
    assert too_large([first, replace(there, present=0, held_bytes=0)], 10) == {"b"}
    assert too_large([first, there], 10) == {"a"}


def moving(*sizes, **changes):
    """A deployment of two revisions; the first of ``sizes`` goes first."""
    return replace(
        idle("moving", **changes),
        wanted=len(sizes),
        present=len(sizes),
        held_bytes=sum(sizes),
        sizes_bytes=sizes,
    )


def test_replicas_of_different_size_count_with_their_own():
    found = verdicts([moving(5, 1), waiting("w", 5)], 6)
    assert found["moving"].replicas == 1
    found = verdicts([moving(1, 5), waiting("w", 5)], 6)
    assert found["moving"].replicas == 0, "the small one goes first, and is not enough"


def test_what_is_on_its_way_out_counts_with_its_own_size():
    leaving = replace(moving(5, 1), wanted=1)
    found = verdicts([leaving, idle("other", 2), waiting("w", 5)], 8)
    assert not unloaded(found)


@dataclass
class Machine:
    """A machine that does what it is told: starts and stops take ``lag`` seconds, and whoever is
    loaded answers its requests within a second."""

    sizes: dict
    wanted: dict
    budget: int
    lag: int

    def __post_init__(self):
        # name: its replicas as [since, loaded_at or None, leaving since or None]
        self.held = {name: [] for name in self.sizes}
        self.asked_at = {}
        self.used_at = {}
        self.waits = {}

    def step(self, now, asked):
        for replicas in self.held.values():
            # Held requests hold up nobody.
            replicas[:] = [one for one in replicas if not one[2] or now - one[2] < self.lag]
            for one in replicas:
                if one[1] is None and now - one[0] >= self.lag:
                    one[1] = now
        claims = [self._claim(name, now, name in asked) for name in self.sizes]
        assert sum(one.held_bytes for one in claims) <= self.budget
        for name, verdict in reside(claims, self.budget, now, STAY_S).items():
            replicas = self.held[name]
            missing = verdict.replicas - len(replicas)
            replicas += [[now, None, None] for _ in range(missing)]
            for number, one in enumerate(replicas):
                one[2] = (one[2] or now) if number >= verdict.replicas else None
        return {n for n in asked if any(one[1] and not one[2] for one in self.held[n])}

    def _claim(self, name, now, asked):
        replicas, size = self.held[name], self.sizes[name]
        loaded = [one[1] for one in replicas if one[1]]
        if asked:
            self.used_at[name] = now
        if asked and not replicas:
            self.asked_at.setdefault(name, now)
        else:
            self.asked_at.pop(name, None)
        return Claim(
            name,
            size,
            wanted=self.wanted[name],
            present=len(replicas),
            held_bytes=size * len(replicas),
            asked=asked,
            used_at=self.used_at.get(name, float("-inf")),
            asked_at=self.asked_at.get(name, now),
            loaded_at=min(loaded, default=None),
        )


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 2)), min_size=2, max_size=7),
    st.integers(4, 8),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
@settings(max_examples=15, deadline=None)
def test_under_any_contention_everybody_has_a_turn(sizes, budget, lag, random):
    """All models are asked at random, some without a pause; each is answered after a bounded
    time: a turn of every other one."""
    named = {f"m{number}": size for number, (size, _) in enumerate(sizes)}
    wanted = {f"m{number}": count for number, (_, count) in enumerate(sizes)}
    machine = Machine(named, wanted, budget, lag)
    greedy = set(random.sample(sorted(named), k=len(named) // 2))
    since = {}
    longest = (len(sizes) + 1) * (BUSY_STAYS * STAY_S + 3 * lag + 3)
    for now in range(1, 400):
        for name in named:
            if name in greedy or random.random() < 0.05:
                since.setdefault(name, now)
        for name in machine.step(float(now), set(since)):
            if name not in greedy or random.random() < 0.5:
                del since[name]
            else:
                since[name] = now
        assert all(now - began <= longest for began in since.values())


@pytest.mark.parametrize("budget", [0, 1])
def test_nothing_to_judge_is_nothing(budget):
    assert verdicts([], budget) == {}
