"""What people are told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloudlm.control.status import readable, summarise
from cloudlm.core.deployment import (
    Deployment,
    DeploymentPhase,
    DeploymentSpec,
    GroupObservation,
    GroupSpec,
    Replica,
    ReplicaState,
)

WISH = Deployment(DeploymentSpec("bank", "models:/bank/1", max_replicas=9))


def group(*replicas, revision=1):
    name = f"bank-r{revision}"
    spec = GroupSpec(name, "bank", revision, "models:/bank/1", len(replicas))
    return GroupObservation(
        name, spec, tuple(replace(r, id=f"{name}-{n}") for n, r in enumerate(replicas))
    )


def replica(state=ReplicaState.STARTING, **changes):
    return Replica("x", state, **changes)


def told(groups, ready=(), wanted=1, leaving=(), problem="", wish=WISH):
    return summarise(wish, wanted, groups, ready, leaving, problem, 7.0)


@pytest.mark.parametrize(
    ("status", "phase"),
    [
        (told([]), DeploymentPhase.STARTING),
        (told([group(replica())]), DeploymentPhase.STARTING),
        (told([group(replica())], ["bank-r1-0"]), DeploymentPhase.READY),
        (told([group(replica())], ["bank-r1-0"], wanted=2), DeploymentPhase.DEGRADED),
        (told([], problem="no such model"), DeploymentPhase.FAILED),
        (told([group(replica())], ["bank-r1-0"], problem="x"), DeploymentPhase.DEGRADED),
        (told([group(replica(ReplicaState.BACKOFF, restarts=1))]), DeploymentPhase.STARTING),
        (told([group(replica(ReplicaState.BACKOFF, restarts=2))]), DeploymentPhase.FAILED),
        (told([group(replica(ReplicaState.FAILED, misses=1))]), DeploymentPhase.STARTING),
        (told([group(replica(ReplicaState.FAILED, misses=2))]), DeploymentPhase.FAILED),
        (told([], wish=replace(WISH, deleting=True)), DeploymentPhase.DELETING),
        (
            told([group(replica()), group(replica(), revision=2)], ["bank-r2-0"]),
            DeploymentPhase.UPDATING,
        ),
    ],
)
def test_one_word_for_where_it_stands(status, phase):
    assert status.phase is phase


def test_a_replica_that_crashed_long_ago_and_answers_is_no_trouble():
    crashed = replica(restarts=5, message="exit code 1")
    status = told([group(crashed)], ["bank-r1-0"])
    assert (status.phase, status.message) == (DeploymentPhase.READY, "")
    assert status.replicas[0].message == ""


def test_a_crash_loop_in_the_moment_of_its_next_start_is_still_failed():
    status = told([group(replica(restarts=5, message="exit code 1: why"))])
    assert (status.phase, status.message) == (DeploymentPhase.FAILED, "bank-r1-0: exit code 1: why")


def test_the_newest_revision_comes_first():
    groups = [group(replica()), group(replica(), revision=2)]
    wish = replace(WISH, revision=2)
    assert [r.id for r in told(groups, wish=wish).replicas] == ["bank-r2-0", "bank-r1-0"]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("exit code 1: plain", "exit code 1: plain"),
        ('exit code 1: {"event": "failed", "reason": "no memory"}', "exit code 1: no memory"),
        ('{"event": "died", "error": "Traceback\\n  x\\nValueError: y\\n"}', "ValueError: y"),
        ('killed by SIGKILL: {"level": "info", "event": "worker_ready"}', "killed by SIGKILL"),
        ("exit code 1: {half", "exit code 1: {half"),
        ('exit code 1: {"other": 1}', 'exit code 1: {"other": 1}'),
        ("", ""),
    ],
)
def test_last_words_are_made_readable(said, shown):
    assert readable(said) == shown


def test_replicas_that_stay_behind_one_that_never_answers_are_told_of():
    dead = replica(ReplicaState.BACKOFF, restarts=5, message="out of memory")
    groups = [group(dead, replica(), replica())]
    ready = ["bank-r1-1", "bank-r1-2"]
    message = told(groups, ready, wanted=2).message
    assert message.startswith("bank-r1-0: out of memory; 3 replicas stay where 2 would do")
    assert message.endswith("there is bank-r1-0, which does not")
    silent = [group(replica(), replica(), replica())]
    assert "3 replicas stay where 1 would do" in told(silent, ["bank-r1-2"]).message


@pytest.mark.parametrize(
    ("ready", "leaving", "wanted"),
    [
        (["bank-r1-0", "bank-r1-1"], (), 2),
        (["bank-r1-0"], ("bank-r1-1",), 1),
        (["bank-r1-1"], (), 2),
        (["bank-r1-0"], (), 1),
        ([], (), 1),
        (["bank-r1-1"], (), 0),
    ],
)
def test_nothing_is_said_of_replicas_that_hold_up_nothing(ready, leaving, wanted):
    status = told([group(replica(), replica())], ready, wanted, leaving)
    assert "would do" not in status.message
