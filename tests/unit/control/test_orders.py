"""Drivers that refuse, fail or never answer: what control tells them hinders nobody else."""

from __future__ import annotations

import asyncio

import pytest

from cloudlm.control import orders
from cloudlm.control.probe import Sample
from cloudlm.core.deployment import DeploymentPhase
from cloudlm.core.errors import Superseded, Unavailable

STANDS_STILL = Sample(True, ready=True, steps=9, running=1)


async def never(*arguments):
    await asyncio.Event().wait()


async def fails(*arguments):
    raise RuntimeError("a bug in a stranger's driver")


async def refuses(*arguments):
    raise Unavailable("the cluster is away")


async def overtaken(*arguments):
    raise Superseded("another leads")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(orders, "DRIVER_TIMEOUT_S", 0.01)


async def stalled(plane):
    """Two replicas that stand still, and control is about to notice."""
    await plane.ask(min_replicas=2, max_replicas=2)
    await plane.steps(2)
    for one in plane.running():
        plane.prober.samples[one] = STANDS_STILL
    await plane.steps(1)


@pytest.mark.parametrize("trouble", [never, fails, refuses])
async def test_a_driver_that_cannot_stop_a_replica_stops_not_the_loop(plane, monkeypatch, trouble):
    await stalled(plane)
    driver = plane.drivers.get("process")
    done, asked = driver.stop_replica, []

    async def stop(name, replica):
        asked.append(replica)
        await (trouble if replica == "bank-r1-0" else done)(name, replica)

    monkeypatch.setattr(driver, "stop_replica", stop)
    await plane.ask("other")
    async with asyncio.timeout(60):
        await plane.steps(25, seconds=1.0)
    assert "other-r1-0" in await plane.serving(), "its deployment is nobody's trouble"
    replicas = plane.world.groups["bank-r1"].replicas
    assert [replicas[one].restarts for one in ("bank-r1-0", "bank-r1-1")] == [0, 1]
    assert asked.count("bank-r1-0") > 1, "it is tried again"
    monkeypatch.undo()
    await plane.steps(1)
    assert replicas["bank-r1-0"].failures == 1


async def test_who_leads_no_longer_is_told_when_it_stops_a_replica(plane, monkeypatch):
    await stalled(plane)
    monkeypatch.setattr(plane.drivers.get("process"), "stop_replica", overtaken)
    with pytest.raises(Superseded):
        await plane.steps(25, seconds=1.0)


@pytest.mark.parametrize("trouble", [never, fails, refuses])
async def test_a_deployments_status_says_what_its_driver_does_not_do(plane, monkeypatch, trouble):
    await plane.ask()
    await plane.steps(2)
    monkeypatch.setattr(plane.drivers.get("process"), "apply", trouble)
    await plane.ask(min_replicas=2, max_replicas=2)
    await plane.ask("other", driver="memory")
    async with asyncio.timeout(60):
        await plane.steps(2)
    status = await plane.state.get_status("bank")
    assert status.phase is DeploymentPhase.DEGRADED
    assert ("'process'" in status.message) == (trouble is not refuses)
    assert "other-r1-0" in await plane.serving()
