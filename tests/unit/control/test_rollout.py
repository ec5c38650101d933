"""Control over real processes: rollouts under requests, and a successor that adopts everything."""

from __future__ import annotations

import asyncio
import os
import sys

import aiohttp
import pytest

from cloudlm.control.drivers import Drivers
from cloudlm.control.metrics import ControlMetrics
from cloudlm.control.probe import HttpProber
from cloudlm.control.reconcile import Reconciler
from cloudlm.core.clock import SystemClock
from cloudlm.core.deployment import DeploymentPhase, DeploymentSpec
from cloudlm.core.settings import ControlSettings
from cloudlm.drivers.base import DriverContext
from cloudlm.drivers.launch import GuardTiming
from cloudlm.drivers.process import ProcessDriver
from cloudlm.state.memory import MemoryState

pytestmark = pytest.mark.flow

SERVER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        health = {"ready": True, "alive": True, "steps": 1, "running": 0, "waiting": 0}
        body = json.dumps(health if "health" in self.path else {"model": sys.argv[1]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


@pytest.fixture
async def control(tmp_path, plane):
    """Makes one control after the other over the same home and state."""
    read_end, write_end = os.pipe()
    environment = {**os.environ, "CLOUDLM_LIFELINE_FD": str(read_end)}
    context = DriverContext(tmp_path, SystemClock(), environment, {}, 18900)
    state = MemoryState()
    used = []

    def build(context):
        return ProcessDriver(
            context,
            command_builder=lambda spec, port: [sys.executable, "-c", SERVER, spec.model, port],
            timing=GuardTiming(grace_s=1.0, backoff_first_s=0.05),
        )

    async with HttpProber(2.0) as prober:

        def make():
            used.append(Drivers(context, {"process": build}))
            return Reconciler(
                state,
                used[-1],
                plane.registry,
                prober,
                SystemClock(),
                ControlSettings(reconcile_interval_s=0.05),
                ControlMetrics(),
                plane.turner,
            )

        yield state, make
    for drivers in used:
        await drivers.close()
    os.close(write_end)
    async with asyncio.timeout(60):
        while list(tmp_path.glob("run/*/*.lock")):
            await asyncio.sleep(0.05)
    os.close(read_end)


async def ready(state, generation):
    async with asyncio.timeout(120):
        while True:
            status = await state.get_status("bank")
            seen = status is not None and status.observed_generation == generation
            if seen and status.phase is DeploymentPhase.READY:
                return status
            await asyncio.sleep(0.02)


@pytest.mark.promise(20)
async def test_rollouts_under_requests_fail_none_of_them(control):
    state, make = control
    loop = asyncio.create_task(make().run())
    answered, failed, stop = set(), [], asyncio.Event()

    async def ask_without_end():
        """As a gateway: endpoints read anew a few times a second, requests to any of them."""
        patience = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(timeout=patience) as session:
            while not stop.is_set():
                for endpoint in await state.list_endpoints():
                    for _ in range(10):
                        try:
                            async with session.get(endpoint.url) as answer:
                                answered.add((await answer.json())["model"])
                        except (aiohttp.ClientError, TimeoutError) as error:
                            failed.append(f"{endpoint.replica}: {error!r}")
                        await asyncio.sleep(0.005)
                await asyncio.sleep(0.01)

    spec = DeploymentSpec("bank", "models:/bank/1", min_replicas=2, max_replicas=2)
    await state.put_deployment(spec, now=0.0)
    await ready(state, 1)
    asking = asyncio.create_task(ask_without_end())
    for generation, version in ((2, 2), (3, 1)):
        spec = DeploymentSpec("bank", f"models:/bank/{version}", min_replicas=2, max_replicas=2)
        await state.put_deployment(spec, now=0.0)
        status = await ready(state, generation)
        assert [replica.id for replica in status.replicas] == [
            f"bank-r{generation}-0",
            f"bank-r{generation}-1",
        ]
    stop.set()
    await asking
    assert failed == []
    assert answered == {"models:/bank/1", "models:/bank/2"}
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)


async def test_a_successor_adopts_what_runs(control):
    state, make = control
    first = asyncio.create_task(make().run())
    spec = DeploymentSpec("bank", "models:/bank/1", min_replicas=2, max_replicas=2)
    await state.put_deployment(spec, now=0.0)
    before = await ready(state, 1)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    second = asyncio.create_task(make().run())
    await asyncio.sleep(0.5)
    after = await ready(state, 1)
    assert [r.pid for r in after.replicas] == [r.pid for r in before.replicas]
    await state.mark_deleting("bank", now=0.0)
    async with asyncio.timeout(60):
        while await state.list_deployments():
            await asyncio.sleep(0.05)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
