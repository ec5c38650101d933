"""Roll-outs in virtual time: production's rules promote and roll back what a scenario deploys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.rollout import Kind, Outcome, Step, Strategy
from cloudlm.core.tenant import Outcome as End
from cloudlm.gateway.mirror import MIRROR_KEY
from cloudlm.sim.faults import Fault, FaultKind, drawn_faults
from cloudlm.sim.figures import Figures
from cloudlm.sim.fit import StepTime
from cloudlm.sim.ground import Zone
from cloudlm.sim.rollouts import RolloutResult
from cloudlm.sim.simulation import Policy, Result, Setting, World, simulate
from cloudlm.sim.traffic import Arrival, Lengths, drawn, poisson
from cloudlm.sim.versions import Release, Version

FIGURES = Figures("t", StepTime(0.02, 0.0002, 0.0, 0.0), slots=8, start_s=10.0, cache_tokens=50_000)
SPEC = DeploymentSpec("m", "models:/m/1", min_replicas=4, max_replicas=4)
AT_S = 30.0
STRATEGIES = {
    Kind.ROLLING: Strategy(Kind.ROLLING),
    Kind.BLUE_GREEN: Strategy(Kind.BLUE_GREEN, bake_s=30.0),
    Kind.CANARY: Strategy(Kind.CANARY, steps=(Step(25.0, 20.0), Step(50.0, 20.0))),
    Kind.MIRROR: Strategy(Kind.MIRROR, mirror_percent=50.0, bake_s=30.0),
}


def arrivals(duration_s: float = 240.0, rate: float = 4.0, seed: int = 1) -> Iterator[Arrival]:
    moments = poisson(Random(f"{seed} m"), rate, duration_s)
    return drawn(moments, Random(f"{seed} s"), Lengths(300), Lengths(30))


def version(speed: float = 1.0, **more: Any) -> Version:
    return Version("models:/m/2", FIGURES.faster(speed), **more)


def world_of(
    kind: Kind, new: Version, *faults: Fault, spec: DeploymentSpec = SPEC, **more: Any
) -> tuple[Policy, Setting]:
    strategy = replace(STRATEGIES[kind], **more)
    policy = Policy("p", replace(spec, rollout=strategy), releases=(Release(AT_S, "B", new),))
    return policy, Setting(FIGURES, (Zone("z", 2.0),), faults=faults, keep_rows=True)


def run(kind: Kind, new: Version, *faults: Fault, **more: Any) -> tuple[Result, RolloutResult]:
    result = simulate(*world_of(kind, new, *faults, **more), arrivals(), every_s=1.0)
    (course,) = result.rollouts
    assert result.open == 0
    return result, course


# What becomes of versions ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", Kind)
def test_a_good_version_is_promoted_and_nothing_is_dropped(kind: Kind) -> None:
    result, course = run(kind, version())
    assert course.outcome is Outcome.PROMOTED
    assert result.outcomes == {End.FINISHED: result.requests}
    assert course.unanswered == 0
    assert course.failed == 0 < course.attempts
    assert course.extra_cost == pytest.approx(2.0 * course.extra_replica_hours)
    assert course.extra_replica_hours > 0.0
    assert course.over_at is not None and course.over_at >= (course.decided_at or 0.0)
    last = [row for row in result.rows if row.key_id != MIRROR_KEY][-1]
    assert last.replica.startswith("m-r2-")
    assert (course.copies > 0) == (kind is Kind.MIRROR)


@pytest.mark.parametrize("kind", [one for one in Kind if one is not Kind.ROLLING])
def test_a_version_that_fails_is_rolled_back_before_many_notice(kind: Kind) -> None:
    result, course = run(kind, version(error_rate=0.5))
    assert course.outcome is Outcome.ROLLED_BACK
    assert "attempts failed, more than" in course.reason
    lost = result.requests - result.outcomes[End.FINISHED]
    assert lost == course.unanswered
    # Blue-green sends all at once; else the stable revision answers in its place.
    assert lost <= (10 if kind is Kind.BLUE_GREEN else 0)
    last = [row for row in result.rows if row.key_id != MIRROR_KEY][-1]
    assert last.replica.startswith("m-r1-")


def test_a_rolling_update_does_not_look_at_answers() -> None:
    result, course = run(Kind.ROLLING, version(error_rate=0.5))
    assert course.outcome is Outcome.PROMOTED
    assert result.outcomes[End.FAILED] > 0
    assert course.failed > 0


def test_a_slow_version_is_rolled_back() -> None:
    more = arrivals(600.0)
    policy, setting = world_of(
        Kind.CANARY, version(0.2), max_ttft_ratio=1.5, max_latency_ratio=1.5, min_requests=40
    )
    (course,) = simulate(policy, setting, more).rollouts
    assert course.outcome is Outcome.ROLLED_BACK
    assert "95th percentile" in course.reason


@pytest.mark.parametrize(
    ("score", "outcome"), [(0.95, Outcome.PROMOTED), (0.3, Outcome.ROLLED_BACK)]
)
def test_scores_decide_where_they_are_asked_for(score: float, outcome: Outcome) -> None:
    new = version(score=score, scored=1.0)
    _, course = run(Kind.CANARY, new, min_score=0.7, min_scores=10)
    assert course.outcome is outcome
    assert course.score == pytest.approx(score, abs=0.2)


def test_a_version_that_never_starts_is_rolled_back() -> None:
    result, course = run(Kind.CANARY, version(starts=False))
    assert course.outcome is Outcome.ROLLED_BACK
    assert "it ends again and again" in course.reason
    assert course.attempts == 0
    assert result.outcomes == {End.FINISHED: result.requests}


# How requests go ---------------------------------------------------------------------------------


def test_a_canary_gets_its_share_of_requests() -> None:
    long = (Step(25.0, 400.0),)
    policy, setting = world_of(Kind.CANARY, version(), steps=long)
    result = simulate(policy, setting, arrivals(300.0, 10.0))
    (course,) = result.rollouts
    assert course.outcome is Outcome.PENDING
    assert course.decided_at is course.over_at is None
    staged = [row for row in result.rows if row.started_at > result.rows[0].started_at + 60.0]
    share = sum(row.replica.startswith("m-r2-") for row in staged) / len(staged)
    assert share == pytest.approx(0.25, abs=0.03)
    assert [one.new for one in course.seen][-1] == 1  # a quarter of four
    assert max(one.share for one in course.seen) < 0.9


def test_copies_touch_nobody() -> None:
    policy, setting = world_of(Kind.MIRROR, version(), bake_s=1e4)
    result = simulate(policy, setting, arrivals())
    (course,) = result.rollouts
    copies = [row for row in result.rows if row.key_id == MIRROR_KEY]
    assert course.attempts == 0 < course.copies == len(copies)
    assert {(row.attempt, row.cost) for row in copies} == {(0, 0)}
    clients = [row for row in result.rows if row.key_id != MIRROR_KEY]
    assert len(clients) == result.requests == result.outcomes[End.FINISHED]
    assert not any(row.replica.startswith("m-r2-") for row in clients)
    assert course.copies / result.requests > 0.3  # half, once its replicas are ready


def test_a_policy_without_a_roll_out_is_untouched_by_the_machinery() -> None:
    plain = simulate(Policy("p", SPEC), Setting(FIGURES, keep_rows=True), arrivals())
    assert plain.rollouts == ()
    assert all(row.replica.startswith("m-r1-") for row in plain.rows)


# Faults meanwhile --------------------------------------------------------------------------------


def test_a_control_that_crashes_goes_on_where_it_was() -> None:
    crash = Fault(FaultKind.CONTROL_CRASH, 60.0, duration_s=20.0)
    _, course = run(Kind.CANARY, version(), crash)
    assert course.outcome is Outcome.PROMOTED
    _, back = run(Kind.CANARY, version(error_rate=0.5), crash)
    assert back.outcome is Outcome.ROLLED_BACK


def test_who_deploys_while_the_state_is_down_tries_again() -> None:
    down = Fault(FaultKind.STATE_DOWN, AT_S - 5.0, duration_s=20.0)
    _, course = run(Kind.CANARY, version(), down)
    assert course.began_at == pytest.approx(AT_S + 15.0, abs=1.5)
    assert course.outcome is Outcome.PROMOTED


def test_rows_written_twice_or_late_count_once() -> None:
    astray = Fault(FaultKind.REPORTS, 0.0, duration_s=1e6, doubled=0.5, late=0.3, delay_s=4.0)
    result, course = run(Kind.ROLLING, version(), astray)
    assert course.outcome is Outcome.PROMOTED
    at_it = {row.id for row in result.rows if row.replica.startswith("m-r2-")}
    assert 0 < course.attempts <= len(at_it)


def test_a_second_version_takes_the_place_of_the_first() -> None:
    first = Release(AT_S, "B", version())
    second = Release(AT_S + 30.0, "C", replace(version(), model="models:/m/3"))
    spec = replace(SPEC, rollout=STRATEGIES[Kind.CANARY])
    result = simulate(Policy("p", spec, releases=(first, second)), Setting(FIGURES), arrivals())
    assert [one.outcome for one in result.rollouts] == [Outcome.SUPERSEDED, Outcome.PROMOTED]
    assert result.outcomes == {End.FINISHED: result.requests}


RATES = st.dictionaries(st.sampled_from(FaultKind), st.sampled_from([30.0, 150.0]))


@settings(max_examples=15, deadline=None)
@given(RATES, st.integers(0, 2**32), st.sampled_from(Kind), st.sampled_from([0.0, 0.4]))
def test_every_arrival_ends_once_whatever_fails_in_a_roll_out(
    rates: dict[FaultKind, float], seed: int, kind: Kind, error_rate: float
) -> None:
    faults = drawn_faults(Random(seed), rates, 90.0, ["z"])
    policy, setting = world_of(kind, version(error_rate=error_rate), *faults)
    result = simulate(policy, replace(setting, seed=seed), arrivals(90.0, seed=seed))
    assert result.open == 0
    assert sum(result.outcomes.values()) == result.requests
    assert len({row.id for row in result.rows}) == len(result.rows) == result.attempts


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(Kind), st.sampled_from([0.0, 0.5]))
@example(28, Kind.BLUE_GREEN, 0.0)  # a stage that began while the clock was an hour ahead
def test_once_faults_end_one_revision_is_left(seed: int, kind: Kind, error_rate: float) -> None:
    # A zone without spot stays so for hours, longer than this looks on.
    rates = {one: 40.0 for one in FaultKind if one is not FaultKind.NO_SPOT}
    faults = drawn_faults(Random(seed), rates, 90.0, ["z"])
    policy, setting = world_of(kind, version(error_rate=error_rate), *faults)
    world = World(policy, replace(setting, seed=seed))
    world.warm_up()
    world.begin(arrivals(700.0, 2.0, seed), 10.0)
    world.timeline.run(650.0)
    (course,) = world.rollouts.results()
    assert course.outcome in (Outcome.PROMOTED, Outcome.ROLLED_BACK)
    assert course.over_at is not None
    (group,) = [one for one in world.fleet.observe() if one.replicas]
    assert len(group.replicas) == 4
    assert group.spec is not None
    assert group.spec.revision == (2 if course.outcome is Outcome.PROMOTED else 1)
