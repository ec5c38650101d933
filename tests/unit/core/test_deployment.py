"""When a change makes a new generation, and when a new revision."""

from dataclasses import replace

from cloudlm.core.deployment import Deployment, DeploymentSpec
from cloudlm.core.placement import Placement
from cloudlm.core.routing import Policy, Routing

SPEC = DeploymentSpec(name="bank", model="models:/bank/1")


def test_an_equal_spec_changes_nothing() -> None:
    deployment = Deployment(SPEC)
    assert deployment.changed(replace(SPEC), now=5.0) is deployment


def test_scaling_makes_a_generation_but_no_revision() -> None:
    scaled = replace(SPEC, min_replicas=2, max_replicas=5, target_ongoing_requests=3, max_surge=2)
    changed = Deployment(SPEC).changed(scaled, now=5.0)
    assert (changed.generation, changed.revision, changed.updated_at) == (2, 1, 5.0)


def test_other_routing_makes_a_generation_but_no_revision() -> None:
    routed = replace(SPEC, routing=Routing(Policy.ROUND_ROBIN))
    changed = Deployment(SPEC).changed(routed, now=5.0)
    assert (changed.generation, changed.revision) == (2, 1)


def test_another_placement_makes_a_generation_but_no_revision() -> None:
    placed = replace(SPEC, placement=Placement(regions=("eu",)))
    changed = Deployment(SPEC).changed(placed, now=5.0)
    assert (changed.generation, changed.revision) == (2, 1)


def test_what_a_replica_runs_makes_a_revision() -> None:
    deployment = Deployment(SPEC)
    for other in (
        replace(SPEC, model="models:/bank/2"),
        replace(SPEC, driver="memory"),
        replace(SPEC, options={"max_model_len": 64}),
        replace(SPEC, env={"A": "b"}),
    ):
        assert deployment.changed(other, now=1.0).revision == 2


def test_asking_again_ends_a_deletion() -> None:
    deleting = replace(Deployment(SPEC), deleting=True)
    again = deleting.changed(SPEC, now=1.0)
    assert not again.deleting
    assert again.generation == 2
