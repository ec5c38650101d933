"""The plan: rolling updates that never exceed the surge, never give up what answers, and end."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.control.plan import (
    Apply,
    Delete,
    Plan,
    desired_group,
    plan,
    plan_deletion,
    plan_target,
)
from cloudlm.core.deployment import (
    Deployment,
    DeploymentSpec,
    GroupObservation,
    Replica,
    ReplicaState,
)

MODEL = "models:/bank/1"


def deployment(revision=1, surge=1, **changes):
    spec = DeploymentSpec("bank", MODEL, max_replicas=9, max_surge=surge, **changes)
    return Deployment(spec, generation=revision, revision=revision)


class Fleet:
    """A driver that does what it is told; replicas become ready or fail when a test says so."""

    def __init__(self):
        self.specs = {}
        self.ready = set()

    def groups(self):
        return [
            GroupObservation(
                name,
                spec,
                tuple(
                    Replica(f"{name}-{n}", ReplicaState.STARTING, f"http://h/{name}/{n}")
                    for n in range(spec.replicas)
                ),
            )
            for name, spec in self.specs.items()
        ]

    def replicas(self):
        return {replica.id for group in self.groups() for replica in group.replicas}

    def apply(self, action):
        if isinstance(action, Delete):
            self.specs.pop(action.name, None)
        else:
            self.specs[action.spec.name] = action.spec
        self.ready &= self.replicas()

    def plan(self, wish, wanted):
        return plan(wish, wanted, self.groups(), self.ready, MODEL)

    def step(self, wish, wanted):
        for action in self.plan(wish, wanted).actions:
            self.apply(action)


def rolled_out(wish, wanted):
    return {f"bank-r{wish.revision}": desired_group(wish, MODEL, wanted)}


def test_a_new_deployment_gets_all_its_replicas_at_once():
    assert plan(deployment(), 3, [], set(), MODEL) == Plan(
        (Apply(desired_group(deployment(), MODEL, 3)),)
    )


def test_nothing_to_do_is_an_empty_plan():
    fleet = Fleet()
    fleet.step(deployment(), 2)
    assert fleet.plan(deployment(), 2) == Plan()


def test_scaling_down_names_the_replicas_that_leave():
    fleet = Fleet()
    fleet.step(deployment(), 3)
    (action,) = fleet.plan(deployment(), 1).actions
    assert action.spec.replicas == 1
    assert action.leaving == {"bank-r1-1", "bank-r1-2"}


@pytest.mark.parametrize(
    ("size", "wanted", "answering", "staying"),
    [
        (4, 1, {1, 2, 3}, 2),  # the one that would be left is dead
        (4, 2, {0, 2, 3}, 3),
        (4, 3, {0, 3}, 4),  # none that answers goes while fewer than wanted do
        (4, 2, {0, 1, 3}, 2),
        (4, 1, {0}, 1),
        (4, 1, set(), 1),
        (4, 0, {0, 1, 2, 3}, 0),
    ],
)
def test_scaling_down_gives_up_none_that_answers_before_enough_others_do(
    size, wanted, answering, staying
):
    fleet = Fleet()
    fleet.step(deployment(), size)
    fleet.ready = {f"bank-r1-{number}" for number in answering}
    fleet.step(deployment(), wanted)
    assert fleet.specs["bank-r1"].replicas == staying
    fleet.ready = fleet.replicas()
    fleet.step(deployment(), wanted)
    assert fleet.specs == rolled_out(deployment(), wanted)


def test_a_revision_that_is_tried_gives_up_none_that_answers_before_enough_others_do():
    fleet = Fleet()
    fleet.step(deployment(), 4)
    ready = {"bank-r1-2", "bank-r1-3"}
    target = desired_group(deployment(), MODEL, 1)
    (action,) = plan_target(target, fleet.groups(), ready).actions
    assert action.leaving == {"bank-r1-3"}
    ready = {"bank-r1-0"}
    (action,) = plan_target(target, fleet.groups(), ready).actions
    assert action.leaving == {"bank-r1-1", "bank-r1-2", "bank-r1-3"}


def test_a_rollout_step_by_step_with_a_surge_of_one():
    fleet = Fleet()
    fleet.step(deployment(), 2)
    fleet.ready = fleet.replicas()
    new = deployment(revision=2)
    sizes = []
    for _ in range(12):
        fleet.step(new, 2)
        sizes.append(tuple(spec.replicas for spec in fleet.specs.values()))
        fleet.ready = fleet.replicas()
    assert sizes[:4] == [(2, 1), (1, 1), (1, 2), (2,)]
    assert fleet.specs == rolled_out(new, 2)


def test_without_surge_one_is_stopped_first():
    fleet = Fleet()
    fleet.step(deployment(surge=0), 2)
    fleet.ready = fleet.replicas()
    new = deployment(revision=2, surge=0)
    fleet.step(new, 2)
    assert {n: s.replicas for n, s in fleet.specs.items()} == {"bank-r1": 1, "bank-r2": 0}
    fleet.step(new, 2)
    assert {n: s.replicas for n, s in fleet.specs.items()} == {"bank-r1": 1, "bank-r2": 1}


def test_a_broken_revision_does_not_take_the_old_one_down():
    fleet = Fleet()
    fleet.step(deployment(), 3)
    old = fleet.replicas()
    for _ in range(20):
        fleet.ready = set(old) & fleet.replicas()  # the new ones never answer
        fleet.step(deployment(revision=2), 3)
    assert old <= fleet.replicas()
    assert fleet.specs["bank-r2"].replicas == 1


def test_a_moment_without_answers_gives_up_no_old_replica():
    fleet = Fleet()
    fleet.step(deployment(), 2)
    fleet.ready = set()
    fleet.step(deployment(revision=2), 2)
    fleet.step(deployment(revision=2), 2)
    assert fleet.specs["bank-r1"].replicas == 2


def test_a_repair_takes_the_place_of_a_broken_revision():
    fleet = Fleet()
    fleet.step(deployment(), 1)
    fleet.ready = fleet.replicas()
    fleet.step(deployment(revision=2), 1)  # broken
    third = deployment(revision=3)
    for _ in range(6):
        fleet.step(third, 1)
        fleet.ready = {one for one in fleet.replicas() if not one.startswith("bank-r2")}
    assert fleet.specs == rolled_out(third, 1)


def test_a_leftover_of_an_earlier_deployment_of_this_name_goes_first():
    fleet = Fleet()
    fleet.step(deployment(options={"dtype": "float32"}), 1)
    (action,) = fleet.plan(deployment(), 1).actions
    assert action == Delete("bank-r1", frozenset({"bank-r1-0"}))


def test_a_replica_still_on_its_way_out_takes_room():
    fleet = Fleet()
    fleet.step(deployment(surge=0), 2)
    (old,) = fleet.groups()
    shrunk = GroupObservation(old.name, replace(old.spec, replicas=1), old.replicas)
    new = deployment(revision=2, surge=0)
    started = plan(new, 2, [shrunk], {"bank-r1-0"}, MODEL).actions[0]
    assert started.spec.replicas == 0


def test_a_lost_replica_is_asked_for_again():
    spec = desired_group(deployment(), MODEL, 2)
    found = GroupObservation("bank-r1", spec, ())
    assert plan(deployment(), 2, [found], set(), MODEL).actions == (Apply(spec),)


def test_deletion_removes_every_group():
    fleet = Fleet()
    fleet.step(deployment(), 2)
    fleet.step(deployment(revision=2), 2)
    wish = replace(deployment(revision=2), deleting=True)
    assert {a.name for a in fleet.plan(wish, 2).actions} == {"bank-r1", "bank-r2"}
    assert fleet.plan(wish, 2) == plan_deletion(fleet.groups())
    fleet.step(wish, 2)
    assert fleet.specs == {}


events = st.lists(
    st.tuples(st.sampled_from(["ready", "fail", "update", "scale", "hold"]), st.integers(0, 10**6)),
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(events, st.integers(0, 3), st.integers(1, 5))
def test_from_any_state_within_the_surge_and_without_giving_up_answers(happenings, surge, wanted):
    fleet = Fleet()
    wish = deployment(surge=surge)
    for kind, number in happenings:
        replicas = sorted(fleet.replicas())
        if kind == "ready" and replicas:
            fleet.ready.add(replicas[number % len(replicas)])
        elif kind == "fail" and replicas:
            fleet.ready.discard(replicas[number % len(replicas)])
        elif kind == "update":
            wish = deployment(revision=wish.revision + 1, surge=surge)
        elif kind == "scale":
            wanted = 1 + number % 5
        step = fleet.plan(wish, wanted)
        assert fleet.plan(wish, wanted) == step
        before, ready_before = fleet.replicas(), set(fleet.ready)
        assert step.leaving <= before
        for action in step.actions:
            if kind == "hold" and action.leaving:
                continue  # it is still being drained
            fleet.apply(action)
        assert len(fleet.replicas()) <= max(len(before), wanted + surge)
        if ready_before - fleet.ready:
            assert len(fleet.ready) >= wanted - (1 if surge == 0 else 0)
        if kind != "hold":
            # Applied twice is applied once: with nothing new, only what made room may follow.
            again = fleet.plan(wish, wanted)
            assert not {
                a.spec.name for a in again.actions if isinstance(a, Apply) and a.leaving
            } & {a.spec.name for a in step.actions if isinstance(a, Apply) and a.leaving}
    for _ in range(4 * (wanted + len(happenings)) + 8):
        fleet.ready = fleet.replicas()
        fleet.step(wish, wanted)
    assert fleet.specs == rolled_out(wish, wanted)
    assert fleet.plan(wish, wanted) == Plan()


@pytest.mark.parametrize("surge", [0, 1, 3])
def test_a_rollout_ends_even_if_old_replicas_never_answer(surge):
    fleet = Fleet()
    fleet.step(deployment(surge=surge), 3)
    new = deployment(revision=2, surge=surge)
    for _ in range(30):
        fleet.ready = {one for one in fleet.replicas() if one.startswith("bank-r2")}
        fleet.step(new, 3)
    assert fleet.specs == rolled_out(new, 3)


def test_a_target_of_none_gets_no_empty_group():
    target = desired_group(Deployment(DeploymentSpec("bank", "models:/bank/2"), 2, 2), "m", 0)
    assert plan_target(target, [], ()) == Plan()
