"""The replica model: many steps at once are what single steps would be, and queues are queues."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.sim.cache import BlockCache
from cloudlm.sim.figures import Figures
from cloudlm.sim.fit import StepTime
from cloudlm.sim.replica import SimReplica, Work
from cloudlm.sim.timeline import Timeline

STEP = StepTime(base_s=0.02, prefill_token_s=0.001, sequence_s=0.003, context_token_s=0.00001)


@dataclass
class Diary:
    """When things were told."""

    timeline: Timeline
    first: dict[Work, float] = field(default_factory=dict)
    last: dict[Work, float] = field(default_factory=dict)

    def first_token(self, work: Work) -> None:
        assert work not in self.first
        self.first[work] = self.timeline.now

    def finished(self, work: Work) -> None:
        assert work not in self.last
        self.last[work] = self.timeline.now


def replica(
    step: StepTime = STEP, slots: int = 4, batch: int = 100, cache: int = 1 << 20
) -> tuple[Timeline, Diary, SimReplica]:
    timeline = Timeline()
    diary = Diary(timeline)
    figures = Figures("t", step, slots=slots, batch_tokens=batch, cache_tokens=cache)
    return timeline, diary, SimReplica(timeline, figures, diary)


def step_by_step(
    step: StepTime, slots: int, batch: int, asked: list[tuple[float, int, int]]
) -> list[tuple[float, float]]:
    """The same without any shortcut: first and last token of each request, in their order."""
    waiting = sorted(range(len(asked)), key=lambda n: asked[n][0])
    prompts: list[list[int]] = []  # [number, prompt tokens left]
    decoding: dict[int, int] = {}  # tokens produced
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    now = 0.0
    while waiting or prompts or decoding:
        if not prompts and not decoding:
            now = max(now, asked[waiting[0]][0])
        while (
            waiting and asked[waiting[0]][0] <= now + 1e-9 and len(prompts) + len(decoding) < slots
        ):
            number = waiting.pop(0)
            prompts.append([number, asked[number][1]])
        budget = max(batch - len(decoding), 1)
        left = budget
        for one in prompts:
            taken = min(one[1], left)
            one[1] -= taken
            left -= taken
        context = sum(asked[n][1] + produced for n, produced in decoding.items())
        now += step.base_s + step.prefill_token_s * (budget - left) if prompts else step.base_s
        now += step.sequence_s * len(decoding) + step.context_token_s * context
        for number in list(decoding):
            decoding[number] += 1
        for one in [one for one in prompts if one[1] == 0]:
            prompts.remove(one)
            first[one[0]] = now
            decoding[one[0]] = 1
        for number in [n for n, produced in decoding.items() if produced >= asked[n][2]]:
            del decoding[number]
            last[number] = now
    return [(first[n], last[n]) for n in range(len(asked))]


# No arrival falls on a step's boundary, where the order would be a matter of rounding.
REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 3000).map(lambda n: n * 0.0012345678),
        st.integers(1, 250),
        st.integers(1, 60),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda one: one[0],
)


@settings(deadline=None)
@given(REQUESTS, st.integers(1, 5), st.integers(20, 200))
def test_many_steps_at_once_are_single_steps(
    asked: list[tuple[float, int, int]], slots: int, batch: int
) -> None:
    timeline, diary, one = replica(slots=slots, batch=batch)
    works = [Work(prompt, output) for _, prompt, output in asked]
    for (at, _, _), work in zip(asked, works, strict=True):
        timeline.at(at, one.submit, work)
    timeline.run()
    for work, (first, last) in zip(works, step_by_step(STEP, slots, batch, asked), strict=True):
        assert diary.first[work] == pytest.approx(first, abs=1e-6)
        assert diary.last[work] == pytest.approx(last, abs=1e-6)
    assert one.running == one.waiting == 0


def erlang_c(servers: int, load: float) -> float:
    """The share of customers that wait in M/M/c (Erlang, 1917); ``load`` in servers."""
    terms = [load**n / math.factorial(n) for n in range(servers)]
    last = load**servers / math.factorial(servers) / (1 - load / servers)
    return last / (sum(terms) + last)


@pytest.mark.parametrize(("slots", "use"), [(1, 0.6), (4, 0.8)])
def test_waiting_is_that_of_the_queueing_formula(slots: int, use: float) -> None:
    """Poisson arrivals, exponential lengths, steps that take no longer with more sequences: M/M/c.
    The mean wait lies within the 99 % interval of independent repetitions."""
    step_s, mean_tokens = 0.001, 1000
    service_s = step_s * mean_tokens
    rate = slots * use / service_s
    means = []
    for seed in range(12):
        chance = Random(seed)
        timeline, _, one = replica(StepTime(step_s, 0.0, 0.0, 0.0), slots, batch=10_000)
        works, at = [], 0.0
        for _ in range(2500):
            at += chance.expovariate(rate)
            work = Work(1, max(1, round(chance.expovariate(1 / mean_tokens))))
            works.append((at, work))
            timeline.at(at, one.submit, work)
        timeline.run()
        means.append(sum(work.begun_at - at for at, work in works) / len(works))
    expected = erlang_c(slots, slots * use) * service_s / (slots * (1 - use))
    mean = sum(means) / len(means)
    spread = (sum((one - mean) ** 2 for one in means) / (len(means) - 1)) ** 0.5
    assert abs(mean - expected) < 3.106 * spread / len(means) ** 0.5 + 2 * step_s  # t of 11, 99 %


def test_a_known_beginning_is_not_computed_again() -> None:
    timeline, diary, one = replica(StepTime(0.0, 0.001, 0.0001, 0.0), batch=10_000)
    first, second = (Work(1000, 2, (1, 2, 3), 300) for _ in range(2))
    one.submit(first)
    timeline.run()
    assert diary.first[first] == pytest.approx(1.0)
    began = timeline.now
    one.submit(second)
    timeline.run()
    assert second.cached_tokens == 900
    assert diary.first[second] - began == pytest.approx(0.1)


def test_equal_prompts_at_once_are_computed_once() -> None:
    """As in the engine, who finds its beginning being computed waits for it."""
    timeline, _, one = replica(StepTime(0.01, 0.001, 0.0, 0.0), slots=8, batch=64)
    works = [Work(640, 2, tuple(range(9)), 64) for _ in range(4)]
    for work in works:
        one.submit(work)
    timeline.run()
    assert [work.cached_tokens for work in works] == [0, 576, 576, 576]


def test_a_small_cache_forgets_the_least_recently_used() -> None:
    cache = BlockCache(300)
    for name in (1, 2, 3):
        assert cache.reserve(100)
        held = cache.add([name], 100)
        cache.release(held, 100)
    assert cache.known([1]) == 1
    cache.hold([1], 100)
    cache.release([1], 100)  # used again
    assert cache.reserve(100)
    assert [cache.known([name]) for name in (1, 2, 3)] == [1, 0, 1]


def test_what_does_not_fit_the_cache_waits() -> None:
    timeline, diary, one = replica(cache=150, slots=4)
    works = [Work(50, 50), Work(50, 50)]
    for work in works:
        one.submit(work)
    timeline.run()
    assert works[1].begun_at == diary.last[works[0]]


def test_it_stands_still_and_goes_on() -> None:
    plain, diary, one = replica()
    work = Work(10, 30)
    one.submit(work)
    plain.run()
    undisturbed = diary.last[work]
    timeline, diary, one = replica()
    work = Work(10, 30)
    one.submit(work)
    timeline.at(0.2, one.pause)
    timeline.at(5.2, one.resume)
    timeline.run()
    assert diary.last[work] == pytest.approx(undisturbed + 5.0, abs=0.05)  # up to a step is lost


def test_cancelled_work_leaves_and_is_not_told() -> None:
    timeline, diary, one = replica(slots=1)
    works = [Work(10, 500), Work(10, 5)]
    for work in works:
        one.submit(work)
    timeline.at(1.0, one.cancel, works[0])
    timeline.run()
    assert works[0] not in diary.last
    assert 1.0 <= works[1].begun_at < 1.1
    assert one.running == 0


def test_too_many_that_wait_are_refused() -> None:
    timeline = Timeline()
    figures = Figures("t", STEP, slots=1, max_waiting=2)
    one = SimReplica(timeline, figures, Diary(timeline))
    assert [one.submit(Work(1, 100)) for _ in range(5)] == [True, True, True, False, False]


def test_a_request_is_on_its_way_before_it_is_before_the_engine() -> None:
    """It counts as waiting meanwhile; those on their way together do not wait for each other."""
    timeline, diary, one = replica(STEP._replace(request_s=0.5))
    plain, sooner, other = replica()
    works, same = ([Work(10, 5), Work(10, 5)] for _ in range(2))
    for here, there in zip(works, same, strict=True):
        assert one.submit(here)
        other.submit(there)
    assert (one.waiting, one.running) == (2, 0)
    timeline.run()
    plain.run()
    for here, there in zip(works, same, strict=True):
        assert diary.first[here] == pytest.approx(sooner.first[there] + 0.5)
        assert diary.last[here] == pytest.approx(sooner.last[there] + 0.5)
    assert one.waiting == one.running == 0


def test_who_gives_up_on_the_way_never_begins() -> None:
    timeline, diary, one = replica(STEP._replace(request_s=0.5))
    works = [Work(10, 5), Work(10, 5)]
    for work in works:
        one.submit(work)
    timeline.at(0.1, one.cancel, works[0])
    timeline.run()
    assert list(diary.last) == [works[1]]
    assert one.waiting == one.running == 0


def test_those_on_their_way_are_refused_too_if_they_are_too_many() -> None:
    timeline = Timeline()
    figures = Figures("t", STEP._replace(request_s=1.0), slots=1, max_waiting=2)
    one = SimReplica(timeline, figures, Diary(timeline))
    assert [one.submit(Work(1, 100)) for _ in range(4)] == [True, True, False, False]
