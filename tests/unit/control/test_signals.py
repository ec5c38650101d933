"""Whether a revision's answers are worse than may be."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.control.signals import (
    Signals,
    breach,
    lacking,
    quantile,
    quantile_bounds,
    signals_of,
)
from cloudlm.core.rollout import Strategy
from cloudlm.core.tenant import LedgerRow, Outcome

USUAL = Strategy()


def row(outcome=Outcome.FINISHED, status=200, ttft=0.1, latency=0.5):
    return LedgerRow(
        "i", "r", 1, "t", "k", "m", "m-r1-0", outcome, status, 1, 1, 0, 0.0, latency, ttft
    )


def good(count, seconds=0.1):
    return Signals(count, 0, (seconds,) * count, (seconds,) * count)


def test_what_counts_as_an_error():
    found = signals_of(
        [
            row(),
            row(Outcome.FAILED, 502),
            row(Outcome.REFUSED, 400),
            row(Outcome.REFUSED, 429),
            row(Outcome.CANCELLED, 499),
            row(Outcome.CACHED),
        ]
    )
    assert (found.attempts, found.failed) == (3, 2)
    assert found.ttft_s == (0.1,)
    assert found.latency_s == (0.5,)


def test_a_revision_that_fails_everything_is_known_after_two_requests():
    assert not breach(USUAL, Signals(1, 1), good(100))
    assert "2 of 2 attempts failed" in breach(USUAL, Signals(2, 2), good(100))


@given(st.integers(0, 300), st.integers(0, 300), st.floats(0, 0.5), st.integers(1, 100))
def test_errors_count_beyond_the_stable_share_alone(failed, more, rate, least):
    strategy = Strategy(max_error_rate=rate, min_requests=least)
    new = Signals(failed + more, failed)
    told = breach(strategy, new, good(50))
    assert bool(told) == (failed > Fraction(str(rate)) * max(failed + more, least))
    assert not breach(strategy, new, new)  # trouble on both sides is not the revision's


def test_times_are_compared_once_both_have_enough():
    slow = good(100, 1.0)
    assert "time to first token" in breach(USUAL, slow, good(100))
    assert not breach(USUAL, slow, good(USUAL.min_requests - 1))
    assert not breach(USUAL, good(USUAL.min_requests - 1, 1.0), good(100))
    assert not breach(USUAL, good(100, 0.149), good(100))
    off = Strategy(max_ttft_ratio=0.0, max_latency_ratio=0.0)
    assert not breach(off, slow, good(100))


@pytest.mark.parametrize("count", [20, 60, 200, 500])
def test_equal_revisions_are_rarely_told_apart(count):
    """Heavy-tailed times as those of real answers: at most the stated chance of an error each way,
    so far less for both at once."""
    draw = random.Random(count)
    wrong = 0
    for _ in range(200):
        a, b = (sorted(draw.lognormvariate(0.0, 1.0) for _ in range(count)) for _ in range(2))
        wrong += bool(
            breach(
                Strategy(max_ttft_ratio=1.0, max_latency_ratio=0.0),
                Signals(count, 0, tuple(a)),
                Signals(count, 0, tuple(b)),
            )
        )
    assert wrong <= 10


def test_a_revision_twice_as_slow_is_told_apart():
    draw = random.Random(1)
    a = sorted(2.0 * draw.lognormvariate(0.0, 0.5) for _ in range(300))
    b = sorted(draw.lognormvariate(0.0, 0.5) for _ in range(300))
    assert breach(
        Strategy(max_ttft_ratio=1.2), Signals(300, 0, tuple(a)), Signals(300, 0, tuple(b))
    )


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=500).map(sorted))
def test_bounds_lie_around_the_quantile(ordered):
    least, most = quantile_bounds(ordered)
    assert least <= quantile(ordered) <= most


@pytest.mark.parametrize("count", [59, 100, 237, 500])
def test_bounds_hold_as_often_as_they_say(count):
    """Numbers drawn evenly from 0 to 1: their 95th percentile is 0.95."""
    draw = random.Random(count)
    below = above = 0
    for _ in range(1000):
        least, most = quantile_bounds(sorted(draw.random() for _ in range(count)))
        below += least <= 0.95
        above += most >= 0.95
    assert below >= 930
    assert above >= 930


def test_scores_are_judged_once_there_are_enough():
    strategy = Strategy(min_score=0.7, min_scores=5)
    assert lacking(strategy, good(20)) == ["5 more scores"]
    few = Signals(20, scores=4, score_total=0.4)
    assert not breach(strategy, few, good(20))
    assert "mean score 0.100" in breach(strategy, Signals(20, scores=5, score_total=0.5), good(20))
    assert not breach(strategy, Signals(20, scores=5, score_total=3.6), good(20))
    assert not breach(Strategy(), Signals(20, scores=5), good(20))
    assert lacking(USUAL, good(3)) == ["17 more requests"]
