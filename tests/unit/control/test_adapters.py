"""Adapters of a deployment: fixed with the revision, carried by groups, endpoints of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.wire import spec_body, spec_from_body

POLITE = {"polite": "models:/polite@champion"}


def adapters_known(plane, manifest_of):
    made = [manifest_of("polite", number) for number in (1, 2)]
    plane.registry.versions["polite"] = [replace(one, task="adapter") for one in made]
    plane.registry.aliases["polite"] = {"champion": 1}


@pytest.fixture
def manifest_of(plane):
    return lambda name, number: replace(
        plane.registry.versions["bank"][0], name=name, version=number
    )


async def endpoints(plane):
    return [(e.model, e.replica) for e in await plane.state.list_endpoints()]


async def test_each_adapter_has_the_endpoints_that_carry_it(plane, manifest_of):
    adapters_known(plane, manifest_of)
    await plane.ask(adapters=POLITE)
    await plane.steps(4)
    assert await endpoints(plane) == [("bank", "bank-r1-0"), ("polite", "bank-r1-0")]
    (group,) = plane.world.groups.values()
    assert group.spec.adapters == {"polite": "models:/polite/1"}
    assert "models:/polite/1" in plane.reconciler.models_in_use()

    plane.registry.aliases["polite"]["champion"] = 2  # moves nothing that runs
    plane.restart()
    await plane.steps(4)
    assert list(plane.world.groups) == ["bank-r1"]

    await plane.ask(adapters={})
    await plane.steps(40)
    assert await endpoints(plane) == [("bank", "bank-r2-0")]


async def test_while_an_adapter_is_rolled_out_only_its_carriers_get_requests(plane, manifest_of):
    adapters_known(plane, manifest_of)
    await plane.ask(min_replicas=2, max_replicas=2)
    await plane.steps(4)
    plane.prober.silence("bank-r2-1")
    await plane.ask(min_replicas=2, max_replicas=2, adapters=POLITE)
    await plane.steps(10)
    found = await endpoints(plane)
    assert [replica for model, replica in found if model == "polite"] == ["bank-r2-0"]
    assert len([replica for model, replica in found if model == "bank"]) >= 2


async def test_with_its_deployment_an_adapter_goes(plane, manifest_of):
    adapters_known(plane, manifest_of)
    await plane.ask(adapters=POLITE)
    await plane.steps(4)
    await plane.state.mark_deleting("bank", now=plane.clock.now())
    await plane.steps(40)
    assert await endpoints(plane) == []
    assert plane.running() == []


def test_on_the_wire_it_is_a_list():
    spec = DeploymentSpec("bank", "models:/bank/1", adapters={"polite": "models:/polite/1"})
    body = spec_body(spec)
    assert body["adapters"] == [{"name": "polite", "model": "models:/polite/1"}]
    assert spec_from_body(body) == spec


@pytest.mark.parametrize(
    ("adapters", "said"),
    [
        ([{"name": "bank", "model": "models:/x/1"}], "own name"),
        ([{"name": "a", "model": "models:/x/1"}] * 2, "named twice"),
        ([{"name": "a", "model": "/tmp/x"}], "import it first"),
        ([{"name": "A b", "model": "models:/x/1"}], "not valid"),
        ([{"name": f"a{n}", "model": "models:/x/1"} for n in range(65)], "more than 64"),
    ],
)
def test_a_bad_list_is_refused(adapters, said):
    with pytest.raises(InvalidRequest, match=said):
        spec_from_body({"name": "bank", "model": "models:/bank/1", "adapters": adapters})
