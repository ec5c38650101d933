"""The plan where something is dead: what gives no capacity holds up no change."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.control.plan import Apply, Delete, Plan, desired_group, plan
from cloudlm.core.deployment import (
    Deployment,
    DeploymentSpec,
    GroupObservation,
    Replica,
    ReplicaState,
)
from cloudlm.core.external import EXTERNAL, ExternalEndpoint

ENDPOINTS = tuple(ExternalEndpoint(f"https://{name}.example/v1", "big") for name in "abcdef")


def own(revision, surge=1):
    spec = DeploymentSpec("bank", "models:/bank/1", max_replicas=9, max_surge=surge)
    return Deployment(spec, revision, revision)


def foreign(revision, count):
    spec = DeploymentSpec("bank", "big", EXTERNAL, endpoints=ENDPOINTS[:count])
    return Deployment(spec, revision, revision)


class World:
    """Groups that become what the plan says; replicas answer, but those in ``dead``."""

    def __init__(self, dead=()):
        self.specs = {}
        self.dead = set(dead)

    def begin(self, deployment, count):
        spec = desired_group(deployment, deployment.spec.model, count)
        self.specs[spec.name] = spec

    def groups(self):
        return [GroupObservation(n, s, tuple(self._replicas(s))) for n, s in self.specs.items()]

    def _replicas(self, spec):
        for number in range(spec.replicas):
            replica = Replica(f"{spec.name}-{number}", ReplicaState.STARTING)
            if replica.id in self.dead:
                state = ReplicaState.FAILED if spec.endpoints else ReplicaState.BACKOFF
                replica = replace(replica, state=state, restarts=0 if spec.endpoints else 5)
            yield replica

    def ready(self):
        return {r.id for group in self.groups() for r in group.replicas} - self.dead

    def step(self, deployment, wanted):
        model = deployment.spec.model
        found = plan(deployment, wanted, self.groups(), self.ready(), model)
        for action in found.actions:
            if isinstance(action, Delete):
                del self.specs[action.name]
            else:
                self.specs[action.spec.name] = action.spec
        return found

    def living(self):
        return len(self.ready())


@pytest.mark.parametrize("surge", [0, 1, 2])
def test_a_dead_first_replica_of_the_old_revision_hinders_no_roll_out(surge):
    world = World(dead={"bank-r1-0"})
    world.begin(own(1), 2)
    for _ in range(10):
        before = world.living()
        world.step(own(2, surge), 2)
        assert world.living() >= min(before, 2 - (surge == 0))
    assert {n: s.replicas for n, s in world.specs.items()} == {"bank-r2": 2}


@pytest.mark.parametrize("surge", [0, 1])
def test_a_dead_first_endpoint_hinders_no_move_to_own_replicas(surge):
    world = World(dead={"bank-r1-0"})
    world.begin(foreign(1, 2), 2)
    for _ in range(10):
        world.step(own(2, surge), 2)
    assert {n: s.replicas for n, s in world.specs.items()} == {"bank-r2": 2}


def test_endpoints_of_others_take_no_room_and_go_whole_when_enough_answer():
    world = World()
    world.begin(foreign(1, 4), 4)
    target = own(2, surge=0)
    (grown,) = world.step(target, 2).actions
    assert grown == Apply(desired_group(target, "models:/bank/1", 2)), "all at once"
    world.dead = {"bank-r2-1"}
    assert world.step(target, 2) == Plan(), "one of two does not carry what four did"
    world.dead = set()
    (gone,) = world.step(target, 2).actions
    assert gone == Delete("bank-r1", frozenset(f"bank-r1-{n}" for n in range(4)))


def test_one_crash_makes_no_room():
    spec = desired_group(own(1), "models:/bank/1", 2)
    crashed = Replica("bank-r1-0", ReplicaState.BACKOFF, restarts=1)
    old = GroupObservation(spec.name, spec, (crashed, Replica("bank-r1-1", ReplicaState.READY)))
    (grown,) = plan(own(2), 2, [old], {"bank-r1-1"}, "models:/bank/1").actions
    assert grown.spec.replicas == 1


@settings(deadline=None)
@given(st.data(), st.integers(0, 3), st.integers(1, 5))
def test_whatever_is_dead_of_what_was_the_change_ends(data, surge, wanted):
    """Own replicas and endpoints in any mix before, any of them dead; the new ones come up."""
    world = World()
    for revision in range(1, data.draw(st.integers(1, 3)) + 1):
        count = data.draw(st.integers(1, 6))
        is_own = data.draw(st.booleans())
        world.begin(own(revision) if is_own else foreign(revision, count), count)
    world.dead = {one for one in sorted(world.ready()) if data.draw(st.booleans())}
    target = own(9, surge)
    for _ in range(30):
        before = world.living()
        world.step(target, wanted)
        assert world.living() >= min(before, wanted - (surge == 0))
        assert world.specs["bank-r9"].replicas <= wanted
    assert {n: s.replicas for n, s in world.specs.items()} == {"bank-r9": wanted}
