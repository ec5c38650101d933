"""A replica whose vLLM is the mock server, in this process, on a Unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from aiohttp import web
from mock_vllm import MockVllm

from cloudlm.core.clock import ManualClock
from cloudlm.engine.api import EngineInfo
from cloudlm.engine.scratch import Scratch
from cloudlm.worker.app import build_app, kind_of
from cloudlm.worker.config import WorkerConfig
from cloudlm.worker.replica import Replica
from cloudlm.worker.vllm.engine import VllmEngine
from cloudlm.worker.vllm.loading import VllmServing

INFO = EngineInfo("MockForCausalLM", 42, "float32", "vllm", 2000, 0, 0, 0, ())


class MockChild:
    """Stands for a process that runs."""

    def __init__(self) -> None:
        self.alive = True
        self.last_words = "exit code 3"
        self.stopped = False

    async def start(self) -> None:
        return None

    async def wait(self) -> int:
        return 3

    async def stop(self) -> None:
        self.stopped = True


@dataclass
class VllmBench:
    """Everything around one replica."""

    mock: MockVllm
    child: MockChild
    clock: ManualClock
    engine: VllmEngine
    replica: Replica[VllmServing]
    app: Any
    client: httpx2.AsyncClient

    async def post(self, path: str, **body: Any) -> httpx2.Response:
        return await self.client.post(path, json={"model": "mock", **body})

    async def looked(self) -> None:
        """Let the minding task look once more."""
        seen = self.engine._answered_at
        await self.clock.advance(1.0)
        async with asyncio.timeout(60):
            while self.engine._answered_at == seen:
                await asyncio.sleep(0.001)


@pytest.fixture
def options() -> dict[str, str]:
    return {"enable_lora": "true", "enable_sleep_mode": "true"}


@pytest.fixture
async def bench(tmp_path: Path, options: dict[str, str]) -> AsyncIterator[VllmBench]:
    mock = MockVllm("mock")
    scratch = Scratch("cloudlm-mock-")
    runner = web.AppRunner(mock.app(), handler_cancellation=True)
    await runner.setup()
    await web.UnixSite(runner, str(scratch.path / "socket")).start()
    config = WorkerConfig("models:/mock/1", "mock", tmp_path, token="t", engine_name="vllm")
    clock, child = ManualClock(), MockChild()
    engine = VllmEngine(child, scratch, options, clock, max_waiting=4)  # type: ignore[arg-type]
    replica: Replica[VllmServing] = Replica(config, clock)
    await engine.begin(INFO)
    replica.become_ready(VllmServing("mock", "models:/mock/1", engine, 7))
    app = build_app(replica, kind_of(config).routes)
    client = httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app, raise_app_exceptions=True),
        base_url="http://worker",
        headers={"authorization": "Bearer t"},
    )
    yield VllmBench(mock, child, clock, engine, replica, app, client)
    mock.frozen.set()
    await client.aclose()
    await replica.close()
    await runner.cleanup()
    assert not scratch.path.exists()
