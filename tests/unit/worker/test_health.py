"""Progress, not an open port."""

from __future__ import annotations

import pytest

from cloudlm.engine.api import EngineStats
from cloudlm.worker.health import Progress


def run(progress: Progress, stats: EngineStats, begin: float, seconds: float) -> float:
    """Observe every half second; the time at which the verdict turned bad, or infinity."""
    now = begin
    while now < begin + seconds:
        if not progress.observe(stats, now).good:
            return now
        now += 0.5
    return float("inf")


def test_an_idle_engine_is_healthy_for_ever() -> None:
    assert run(Progress(5.0), EngineStats(steps=3), 0.0, 1000.0) == float("inf")


@pytest.mark.promise(11)
def test_work_without_steps_is_a_stall() -> None:
    progress = Progress(5.0)
    assert run(progress, EngineStats(steps=3), 0.0, 100.0) == float("inf")
    stalled = run(progress, EngineStats(steps=3, waiting=1), 100.0, 100.0)
    assert 105.0 <= stalled <= 106.0


def test_a_step_makes_it_healthy_again() -> None:
    progress = Progress(5.0)
    assert run(progress, EngineStats(steps=1, running=2), 0.0, 100.0) < 100.0
    assert progress.observe(EngineStats(steps=2, running=2), 100.5).good


@pytest.mark.promise(11)
@pytest.mark.known_failure("vllm#39863")
def test_a_dead_engine_is_known_at_once() -> None:
    health = Progress(5.0).observe(EngineStats(alive=False), 0.0)
    assert health.fault == "the engine has stopped"


def test_time_in_which_the_whole_process_stood_still_does_not_count() -> None:
    progress = Progress(5.0)
    stats = EngineStats(steps=1, running=1)
    assert progress.observe(stats, 0.0).good
    assert progress.observe(stats, 0.5).good
    assert progress.observe(stats, 3600.0).good  # stopped for an hour, then continued
    assert run(progress, stats, 3600.5, 20.0) < 3606.0
