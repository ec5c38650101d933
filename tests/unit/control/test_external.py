"""Deployments of others' endpoints, through the loop and the API."""

from __future__ import annotations

import asyncio

import pytest

from cloudlm.control.api.deployments import check_can_run
from cloudlm.control.external import check_secrets
from cloudlm.core.deployment import DeploymentPhase
from cloudlm.core.errors import CloudlmError, InvalidRequest
from cloudlm.core.external import ExternalEndpoint
from cloudlm.core.wire import spec_from_body
from cloudlm.drivers.external_look import Look
from cloudlm.security.credentials import Credential, Credentials

FIRST, SECOND = "https://one.example/v1", "https://two.example/v1"


def spec_of(*endpoints, **more):
    return spec_from_body({"name": "chat", "model": "big", "endpoints": list(endpoints), **more})


async def put(plane, spec):
    return await plane.state.put_deployment(spec, now=plane.clock.now())


async def settle(plane, count=6):
    for _ in range(count):
        await plane.steps()
        for _ in range(5):  # looks are taken in the background
            await asyncio.sleep(0)


async def status(plane):
    return await plane.state.get_status("chat")


async def test_endpoints_serve_with_their_facts(plane):
    second = {"url": SECOND, "model": "big-2", "secret": "two", "weight": 3, "priority": 1}
    await put(plane, spec_of({"url": FIRST}, second))
    await settle(plane)
    one, two = await plane.state.list_endpoints()
    assert (one.replica, one.url, one.upstream_model, one.secret) == ("chat-r1-0", FIRST, "big", "")
    assert (two.url, two.upstream_model, two.secret) == (SECOND, "big-2", "two")
    assert (two.weight, two.priority, two.is_external) == (3.0, 1, True)
    found = await status(plane)
    assert (found.phase, found.ready_replicas, found.wanted_replicas) == (
        DeploymentPhase.READY,
        2,
        2,
    )
    assert [replica.url for replica in found.replicas] == [FIRST, SECOND]
    assert plane.running() == []  # nothing was started


async def test_one_that_fails_is_shown_and_gets_nothing(plane):
    plane.looks.found[SECOND] = Look("it does not accept the key (401)")
    await put(plane, spec_of({"url": FIRST}, {"url": SECOND}))
    await settle(plane)
    assert await plane.serving() == ["chat-r1-0"]
    found = await status(plane)
    assert found.phase is DeploymentPhase.DEGRADED
    assert "it does not accept the key (401)" in found.message
    plane.looks.found[FIRST] = plane.looks.found[SECOND]
    await plane.steps(80)
    await settle(plane)
    assert await plane.serving() == []
    assert (await status(plane)).phase is DeploymentPhase.FAILED
    plane.looks.found.clear()
    await settle(plane, 20)
    assert (await status(plane)).phase is DeploymentPhase.READY


async def test_one_miss_that_passes_takes_nothing_away(plane):
    await put(plane, spec_of({"url": FIRST}))
    await settle(plane)
    plane.looks.found[FIRST] = Look("cannot be reached", passing=True)
    looked = len(plane.looks.looked)
    while len(plane.looks.looked) == looked:
        await settle(plane, 1)
        assert await plane.serving() == ["chat-r1-0"]
    await settle(plane, 15)
    assert await plane.serving() == []


async def test_a_change_leaves_nobody_without_an_endpoint(plane):
    await put(plane, spec_of({"url": FIRST}))
    await settle(plane)
    await put(plane, spec_of({"url": FIRST, "weight": 2}, {"url": SECOND}))
    for _ in range(20):
        await settle(plane, 1)
        assert await plane.serving()
    assert await plane.serving() == ["chat-r2-0", "chat-r2-1"]


async def test_deleting_waits_for_nobody(plane):
    await put(plane, spec_of({"url": FIRST}, {"url": SECOND}))
    await settle(plane)
    await plane.state.mark_deleting("chat", now=plane.clock.now())
    await settle(plane, 8)  # 4 s: requests there go on by themselves
    assert await plane.state.get_deployment("chat") is None
    assert await plane.state.list_endpoints() == []


async def test_a_new_control_knows_the_endpoints(plane):
    await put(plane, spec_of({"url": FIRST}))
    await settle(plane)
    plane.restart()
    await settle(plane)
    assert await plane.serving() == ["chat-r1-0"]


class TestSecrets:
    @pytest.fixture
    def credentials(self, tmp_path):
        kept = Credentials(tmp_path / "secrets", {})
        kept.put(Credential("ours", "https://one.example:443", "sk-1"))
        kept.put(Credential("theirs", "https://one.example:443", "sk-2", tenant="acme"))
        return kept

    @pytest.mark.parametrize(
        ("url", "secret", "tenant", "good"),
        [
            (FIRST, "ours", "", True),
            (FIRST, "unknown", "", True),  # may be in the gateway's environment
            (FIRST, "theirs", "acme", True),
            (FIRST, "", "acme", True),
            (SECOND, "ours", "", False),  # the key of another address
            (FIRST, "theirs", "", False),
            (FIRST, "ours", "acme", False),
            (FIRST, "theirs", "other", False),
            (FIRST, "unknown", "acme", False),
        ],
    )
    def test_whose_key_may_be_named(self, credentials, url, secret, tenant, good):
        spec = spec_of({"url": url, "secret": secret}, tenant=tenant)
        if good:
            check_secrets(spec, credentials)
            return
        with pytest.raises(InvalidRequest) as refused:
            check_secrets(spec, credentials)
        assert refused.value.param == "endpoints.0.secret"

    def test_without_any_kept_nothing_of_a_tenant_goes(self):
        check_secrets(spec_of({"url": FIRST, "secret": "one"}), None)
        with pytest.raises(InvalidRequest):
            check_secrets(spec_of({"url": FIRST, "secret": "one"}, tenant="acme"), None)


async def test_what_only_our_replicas_can_is_refused(plane):
    from dataclasses import replace
    from types import SimpleNamespace

    services = SimpleNamespace(drivers=plane.drivers, state=plane.state, credentials=None)
    spec = spec_of({"url": FIRST}, {"url": SECOND})
    await check_can_run(services, spec)
    for wrong in (
        replace(spec, min_replicas=1, max_replicas=1),
        replace(spec, max_replicas=5),
        replace(spec, asleep=True),
        replace(spec, endpoints=()),
        replace(spec, endpoints=(ExternalEndpoint("https://h?", "m"),)),
    ):
        with pytest.raises(CloudlmError):
            await check_can_run(services, wrong)
