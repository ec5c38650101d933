"""What may be said of a roll-out, and which changes make a revision."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.deployment import Deployment, DeploymentSpec, running
from cloudlm.core.errors import InvalidRequest, UnprocessableRequest
from cloudlm.core.rollout import (
    Kind,
    Outcome,
    Revision,
    Step,
    Strategy,
    check_strategy,
    longest_s,
    stages_of,
    strategy_body,
    strategy_from_body,
)
from cloudlm.core.wire_rollout import (
    RolloutView,
    Score,
    SideView,
    revision_body,
    revision_from_body,
    rollout_body,
    rollout_from_body,
    score_body,
    score_from_body,
)

SPEC = DeploymentSpec("bank", "models:/bank/1")
RUN = {"model", "driver", "engine", "options", "env", "adapters", "endpoints"}
AROUND = {
    "scaling",
    "placement",
    "name",
    "min_replicas",
    "max_replicas",
    "target_ongoing_requests",
    "max_surge",
    "asleep",
    "prices",
    "tenant",
    "routing",
    "rollout",
    "pinned",
    "memory_mb",
}

steps = st.lists(
    st.tuples(st.floats(0.1, 100.0), st.floats(0.0, 1e6)), min_size=1, max_size=20
).map(lambda found: tuple(Step(*one) for one in sorted(found)))
strategies = st.builds(
    Strategy,
    kind=st.sampled_from(Kind),
    steps=steps,
    bake_s=st.floats(0.0, 1e6),
    mirror_percent=st.floats(0.1, 100.0),
    max_error_rate=st.floats(0.0, 1.0),
    max_ttft_ratio=st.just(0.0) | st.floats(1.0, 1000.0),
    max_latency_ratio=st.just(0.0) | st.floats(1.0, 1000.0),
    min_requests=st.integers(0, 1000),
    min_score=st.floats(0.0, 1.0),
    min_scores=st.integers(1, 1000),
    auto_promote=st.booleans(),
    auto_rollback=st.booleans(),
)


@given(strategies)
def test_a_strategy_survives_json(strategy: Strategy) -> None:
    body = json.loads(json.dumps(strategy_body(strategy)))
    assert strategy_from_body(body) == check_strategy(strategy)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"strategy": "big_bang"}, "rollout.strategy"),
        ({"steps": []}, "rollout.steps"),
        ({"steps": [{"percent": 0, "duration_s": 1}]}, "rollout.steps.percent"),
        ({"steps": [{"percent": 101, "duration_s": 1}]}, "rollout.steps.percent"),
        ({"steps": [{"percent": 5}]}, "rollout.steps.duration_s"),
        ({"steps": [{"percent": 5, "duration_s": -1}]}, "rollout.steps.duration_s"),
        ({"steps": [{"percent": 50, "duration_s": 1}, {"percent": 5, "duration_s": 1}]}, "steps"),
        ({"steps": [{"percent": 1, "duration_s": 1}] * 21}, "rollout.steps"),
        ({"mirror_percent": 0}, "rollout.mirror_percent"),
        ({"max_error_rate": 1.5}, "rollout.max_error_rate"),
        ({"max_ttft_ratio": 0.5}, "rollout.max_ttft_ratio"),
        ({"max_latency_ratio": float("nan")}, "rollout.max_latency_ratio"),
        ({"min_requests": -1}, "rollout.min_requests"),
        ({"min_score": 2}, "rollout.min_score"),
        ({"bake_s": 1e9}, "rollout.bake_s"),
        ({"auto_promote": "yes"}, "rollout.auto_promote"),
    ],
)
def test_a_bad_strategy_names_its_field(body: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_strategy(strategy_from_body(body))
    assert field in str(caught.value.param)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(UnprocessableRequest, match=r"rollout\.canary_percent"):
        strategy_from_body({"canary_percent": 5})


@given(strategies)
def test_stages_send_ever_more_and_are_never_larger_than_the_whole(strategy: Strategy) -> None:
    stages = stages_of(strategy)
    shares = [one.share for one in stages]
    assert shares == sorted(shares)
    assert all(0 <= one.share <= 1 and 0 < one.size <= 1 for one in stages)
    assert all(one.size >= one.share for one in stages)
    assert longest_s(strategy) == sum(one.duration_s for one in stages)
    assert (stages == ()) == (strategy.kind is Kind.ROLLING)


# Revisions ----------------------------------------------------------------------------------------


def test_every_field_of_a_spec_is_either_run_or_around_it() -> None:
    """Whoever adds a field to the spec says here whether a change of it makes a revision."""
    assert {one.name for one in fields(DeploymentSpec)} == RUN | AROUND
    other = DeploymentSpec("bank", "m", "d", "e", options={"a": 1}, env={"B": "c"}, adapters={})
    changed = running(other, over=SPEC)
    for name in RUN | AROUND:
        assert getattr(changed, name) == getattr(other if name in RUN else SPEC, name)


def test_another_strategy_makes_a_generation_but_no_revision() -> None:
    changed = Deployment(SPEC).changed(replace(SPEC, rollout=Strategy(Kind.CANARY)), now=5.0)
    assert (changed.generation, changed.revision) == (2, 1)


def test_going_back_takes_the_number_back_and_never_gives_one_twice() -> None:
    second = Deployment(SPEC).changed(replace(SPEC, model="models:/bank/2"), now=1.0)
    scaled = second.changed(replace(second.spec, max_replicas=7), now=2.0)
    back = scaled.returned(SPEC, 1, now=3.0)
    assert (back.revision, back.generation, back.last_revision) == (1, 4, 2)
    assert (back.spec.model, back.spec.max_replicas) == ("models:/bank/1", 7)
    third = back.changed(replace(back.spec, model="models:/bank/2"), now=4.0)
    assert (third.revision, third.last_revision) == (3, 3)


# JSON ---------------------------------------------------------------------------------------------


def test_views_survive_json() -> None:
    side = SideView(2, 10, 1, 0.25, None, 3, 0.5)
    view = RolloutView(
        "bank", Kind.CANARY, 1, 2, True, 1, 3, 5.0, 0.0, 12.5, "note", "waits", (side,)
    )
    assert rollout_from_body(json.loads(json.dumps(rollout_body(view)))) == view
    assert view.under_way
    revision = Revision(3, SPEC, 1.5, "ada", Outcome.ROLLED_BACK, "bad", 2.5, "m", {"a": "b"}, 2, 1)
    assert revision_from_body(json.loads(json.dumps(revision_body(revision)))) == revision


@pytest.mark.parametrize("score", [Score(0.5, 3, revision=2), Score(1.0, request_id="req-1")])
def test_scores_survive_json(score: Score) -> None:
    assert score_from_body(json.loads(json.dumps(score_body(score)))) == score


@pytest.mark.parametrize(
    "body",
    [
        {"score": 0.5},
        {"score": 0.5, "revision": 1, "request_id": "x"},
        {"score": 1.5, "revision": 1},
        {"score": 0.5, "revision": 1, "count": 0},
    ],
)
def test_a_bad_score_is_refused(body: Any) -> None:
    with pytest.raises(InvalidRequest):
        score_from_body(body)
