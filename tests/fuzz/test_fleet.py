"""The fleet under faults: time is virtual, a seed is always the same run, the invariants bite."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest
from tests.fuzz import bugs
from tests.fuzz.loop import Stuck, VirtualClock, VirtualLoop
from tests.fuzz.run import judge, shrunk
from tests.fuzz.schedule import draw

SEEDS = 16


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    made = VirtualLoop()
    yield made
    made.close()


def test_time_jumps_to_the_next_timer(loop: VirtualLoop) -> None:
    async def slept() -> list[float]:
        clock, times = VirtualClock(loop), []
        for seconds in (3600.0, 0.25):
            await clock.sleep(seconds)
            times.append(clock.monotonic())
        return times

    assert loop.run_until_complete(slept()) == pytest.approx([3600.0, 3600.25])


def test_what_would_wait_for_ever_is_a_deadlock(loop: VirtualLoop) -> None:
    future: asyncio.Future[None] = loop.create_future()
    with pytest.raises(Stuck, match="deadlock"):
        loop.run_until_complete(future)


def test_a_wall_clock_that_jumps_moves_no_timer(loop: VirtualLoop) -> None:
    clock = VirtualClock(loop)
    before = clock.now()
    clock.jump_s = -3600.0
    assert clock.now() == before - 3600.0
    assert clock.monotonic() == 0.0


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_invariant_is_broken(seed: int) -> None:
    verdict = judge(draw(seed))
    assert not verdict.broken, verdict.told()


def test_the_same_seed_is_the_same_run() -> None:
    traces = [judge(draw(seed)).trace for seed in (3, 4, 3, 4)]
    assert traces[:2] == traces[2:]
    assert traces[0] != traces[1]


@pytest.mark.parametrize(
    "name",
    [
        "place never given back",
        "resumed one token too early",
        "cached answers are shared by all",
        "no row for a cancelled attempt",
    ],
)
def test_a_planted_bug_is_caught(name: str) -> None:
    found = bugs.caught(name, 60)
    assert found is not None, name


def test_a_failing_schedule_is_shrunk() -> None:
    with bugs.BUGS["a client that left is not noticed"]():
        whole = next(one for one in map(draw, range(20)) if judge(one).broken)
        small = shrunk(whole)
        assert judge(small).broken
    assert len(small.asks) == 1
    assert len(small.faults) <= 1
