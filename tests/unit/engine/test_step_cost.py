"""What a step costs besides its arithmetic grows no worse than linearly with the sequences in it.

Counted are calls of functions, Python's and C's, which no slow machine changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from cloudlm.core.chat import Sampling
from cloudlm.engine.limits import Limits
from cloudlm.engine.scheduler import Scheduler
from cloudlm.engine.sequence import Sequence
from cloudlm.engine.step import Sampled, Step

BLOCK = 16
ANSWER = 64


def _sequence(number: int, tenants: int, prompt_tokens: int = 40) -> Sequence:
    prompt = tuple(number * 1000 + at for at in range(prompt_tokens))
    return Sequence(
        sequence_id=number,
        request_id=f"r{number}",
        prompt=prompt,
        sampling=Sampling(max_tokens=ANSWER),
        token_limit=prompt_tokens + ANSWER,
        tenant=f"t{number % tenants}",
    )


def _scheduler(running: int) -> Scheduler:
    bounds = Limits(
        max_model_len=256,
        block_size=BLOCK,
        blocks_total=running * 16,
        max_batch_tokens=running * 64,
        max_batch_sequences=running,
    )
    return Scheduler(bounds)


def _sampled(step: Step) -> list[Sampled]:
    return [Sampled(chunk.sequence_id, 7) for chunk in step.chunks if chunk.samples]


def _calls(work: Callable[[], Any]) -> int:
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    former = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(former)
    return count


def _decoding_calls(running: int, waiting: int, tenants: int) -> int:
    """The calls of eight steps in which ``running`` sequences decode and others wait."""
    scheduler = _scheduler(running)
    for number in range(running + waiting):
        scheduler.add(_sequence(number, tenants))
    while not scheduler.running or any(one.remaining != 1 for one in scheduler.running):
        scheduler.apply(_sampled(scheduler.schedule()))
    assert len(scheduler.running) == running and len(scheduler.waiting) == waiting

    def steps() -> None:
        for _ in range(8):
            step = scheduler.schedule()
            assert len(step.chunks) == running
            scheduler.apply(_sampled(step))

    return _calls(steps)


@pytest.mark.parametrize("tenants", [1, 8])
def test_decoding_costs_each_sequence_the_same_however_many_there_are(tenants: int) -> None:
    few, many = (_decoding_calls(running, 0, tenants) / running for running in (16, 256))
    assert many <= 1.05 * few
    assert many / 8 < 60, "calls for a sequence in a step"


def test_who_waits_for_a_place_costs_those_who_run_nothing_worth_mentioning() -> None:
    alone, crowded = _decoding_calls(64, 0, 8), _decoding_calls(64, 2000, 8)
    assert crowded < 1.5 * alone
