"""rollout: what is sent, what is shown; deploy with a strategy."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cloudlm.cli.specs import read_strategy
from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import InvalidRequest, Unavailable
from cloudlm.core.rollout import Kind, Outcome, Revision, Step, Strategy
from cloudlm.core.wire_rollout import RolloutView, SideView, revision_body, rollout_body

PATH = "/deployments/helper/rollout"
SIDES = (SideView(1, 200, 1, 0.12, 0.5), SideView(2, 20, 4, 0.34, None, 3, 0.9))
VIEW = RolloutView(
    "helper", Kind.CANARY, 1, 2, False, 1, 3, 5.0, 0.0, 1.0, "step 1 of 3", "7 s more", SIDES
)
DONE = RolloutView("helper", Kind.CANARY, 2, 2)
REVISION = Revision(
    2,
    DeploymentSpec("helper", "models:/bank@champion"),
    1.0,
    "root",
    Outcome.ROLLED_BACK,
    "2 of 2 attempts failed",
    2.0,
    "models:/bank/2",
    {},
    4,
    3.0,
)
Ok = Callable[..., Any]


def test_status_shows_both_sides(control: Any, ok: Ok) -> None:
    control.answers[f"GET {PATH}"] = rollout_body(VIEW)
    shown = ok("rollout", "status", "helper").stdout
    for words in ("canary", "under way", "1/3", "step 1 of 3; waits for: 7 s more", "4 (20.0%)"):
        assert words in shown
    assert "0.340 s" in shown
    assert json.loads(ok("rollout", "status", "helper", "--json").stdout) == rollout_body(VIEW)


def test_status_waits_until_it_is_over(control: Any, ok: Ok) -> None:
    control.answers[f"GET {PATH}"] = deque([rollout_body(VIEW)] * 3 + [rollout_body(DONE)])
    assert "done" in ok("rollout", "status", "helper", "--wait").stdout
    assert len(control.requests) == 4


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        (["pause"], None),
        (["resume"], None),
        (["abort"], None),
        (["promote"], {"fully": False}),
        (["promote", "--full"], {"fully": True}),
        (["undo"], {"revision": None}),
        (["undo", "--to-revision", "3"], {"revision": 3}),
    ],
)
def test_steering(control: Any, ok: Ok, arguments: list[str], sent: Any) -> None:
    verb, *more = arguments
    control.answers[f"POST {PATH}/{verb}"] = rollout_body(VIEW)
    ok("rollout", verb, "helper", *more)
    assert control.sent(f"POST {PATH}/{verb}") == sent


def test_history(control: Any, ok: Ok) -> None:
    control.answers["GET /deployments/helper/revisions"] = {"data": [revision_body(REVISION)]}
    control.answers[f"GET {PATH}"] = rollout_body(RolloutView("helper", Kind.CANARY, 1, 1))
    shown = ok("rollout", "history", "helper").stdout
    for words in ("models:/bank/2", "root", "rolled back", "0.750", "2 of 2 attempts failed"):
        assert words in shown
    printed = json.loads(ok("rollout", "history", "helper", "--json").stdout)
    assert printed == [revision_body(REVISION)]


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (DONE, ("never ready", "current", "replaced")),
        (VIEW, ("never ready", "rolling out", "current")),
        (RolloutView("helper", Kind.CANARY, 1, 2, True), ("never ready", "paused", "current")),
    ],
)
def test_history_says_which_revision_answers(control: Any, ok: Ok, view: Any, words: Any) -> None:
    promoted = replace(REVISION, outcome=Outcome.PROMOTED)
    notes = [replace(REVISION, number=3, outcome=Outcome.PENDING)]
    notes += [promoted, replace(promoted, number=1)]
    control.answers["GET /deployments/helper/revisions"] = {
        "data": [revision_body(r) for r in notes]
    }
    control.answers[f"GET {PATH}"] = rollout_body(view)
    rows = ok("rollout", "history", "helper").stdout.splitlines()[1:]
    assert len(rows) == 3
    for row, status in zip(rows, words, strict=True):
        assert status in row


def test_score(control: Any, ok: Ok) -> None:
    control.answers["POST /deployments/helper/score"] = revision_body(REVISION)
    told = ok("rollout", "score", "helper", "0.5", "--revision", "2", "--count", "4")
    assert "revision 2 of helper has 4 scores, mean 0.750" in told.stderr
    sent = control.sent("POST /deployments/helper/score")
    assert sent == {"score": 0.5, "count": 4, "revision": 2}


def test_strategies_of_flags() -> None:
    assert read_strategy(Kind.ROLLING, None) == Strategy()
    assert read_strategy(Kind.MIRROR, None) == Strategy(Kind.MIRROR)
    steps = (Step(5.0, 300.0), Step(50.0, 0.5))
    assert read_strategy(Kind.ROLLING, "5:300,50:0.5") == Strategy(Kind.CANARY, steps=steps)
    with pytest.raises(InvalidRequest, match="blue_green"):
        read_strategy(Kind.BLUE_GREEN, "5:300")


@pytest.mark.parametrize("text", ["", "5", "5:", "a:b", "5:300,", "5;300"])
def test_a_bad_canary_is_named(text: str) -> None:
    with pytest.raises(InvalidRequest, match="PERCENT:SECONDS"):
        read_strategy(Kind.CANARY, text)


def test_deploying_says_that_the_revision_was_rolled_back(
    control: Any, cli: Any, deployment: Any
) -> None:
    new = {**deployment(phase="updating"), "revision": 2, "generation": 2}
    control.answers["PUT /deployments/helper"] = new
    control.answers["GET /deployments/helper"] = deque([new, deployment()])
    result = cli("deploy", "models:/bank/2", "--name", "helper", "--canary", "5:60")
    assert isinstance(result.exception, Unavailable)
    assert "revision 2 of 'helper' was rolled back" in str(result.exception)
    sent = control.sent("PUT /deployments/helper")["rollout"]
    assert (sent["strategy"], sent["steps"]) == ("canary", [{"percent": 5.0, "duration_s": 60.0}])
