"""The plan for endpoints of others: a change ends, whichever of them answer."""

from __future__ import annotations

import pytest

from cloudlm.control.plan import Apply, Delete, desired_group, plan
from cloudlm.core.deployment import (
    Deployment,
    DeploymentSpec,
    GroupObservation,
    Replica,
    ReplicaState,
)
from cloudlm.core.external import EXTERNAL, ExternalEndpoint

A, B, C = (ExternalEndpoint(f"https://{name}.example/v1", "big") for name in "abc")


def wish(revision, *endpoints):
    spec = DeploymentSpec("chat", "big", EXTERNAL, endpoints=endpoints)
    return Deployment(spec, revision, revision)


def group(deployment, states):
    """The deployment's group as its driver sees it; a state for each endpoint."""
    spec = desired_group(deployment, "big", len(states))
    replicas = (Replica(f"{spec.name}-{n}", state) for n, state in enumerate(states))
    return GroupObservation(spec.name, spec, tuple(replicas))


def step(deployment, *groups):
    ready = {r.id for g in groups for r in g.replicas if r.state is ReplicaState.READY}
    count = len(deployment.spec.endpoints)
    return plan(deployment, count, groups, ready, "big").actions


UP, DOWN, NEW = ReplicaState.READY, ReplicaState.FAILED, ReplicaState.STARTING


@pytest.mark.parametrize("endpoints", [(C, B), (B,), (A, B)])
def test_a_dead_first_endpoint_hinders_no_change(endpoints):
    old = group(wish(1, A, B), (DOWN, UP))
    target = wish(2, *endpoints)
    (applied,) = step(target, old)
    assert applied == Apply(desired_group(target, "big", len(endpoints)))
    unseen = group(target, [NEW] * len(endpoints))
    assert step(target, old, unseen) == ()
    states = [UP if one is B else DOWN for one in endpoints]
    leaving = frozenset(one.id for one in old.replicas)
    assert step(target, old, group(target, states)) == (Delete("chat-r1", leaving),)


def test_what_answers_stays_until_another_does():
    old = group(wish(1, A, B), (UP, UP))
    target = wish(2, A, C)
    assert step(target, old, group(target, (DOWN, DOWN))) == ()
    assert step(target, old, group(target, (UP, NEW))) == (), "the other may answer in a moment"
    assert step(target, old, group(target, (UP, DOWN)))
