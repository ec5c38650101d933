"""Sleep and wake over HTTP."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest

from cloudlm.core.clock import SystemClock
from cloudlm.core.errors import BrokenModel, NotSupported
from cloudlm.registry.bundled import bundled_folder
from cloudlm.worker.config import WorkerConfig
from cloudlm.worker.loading import load_model
from cloudlm.worker.replica import Replica


async def is_sleeping(bench: Any) -> bool:
    body: dict[str, bool] = (await bench.client.get("/is_sleeping")).json()
    return body["is_sleeping"]


async def test_asleep_and_awake_again(bench: Any) -> None:
    assert not await is_sleeping(bench)
    assert (await bench.client.post("/sleep?level=2")).status_code == 200
    assert bench.engine.level == 2
    assert await is_sleeping(bench)
    for answer in (await bench.chat(), await bench.chat(stream=True), await bench.complete()):
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "asleep" in answer.json()["error"]["message"]
    assert (await bench.client.get("/readyz")).status_code == 503
    assert (await bench.client.get("/health")).status_code == 200
    report = (await bench.client.get("/health?verbose=1")).json()
    assert (report["phase"], report["ready"], report["alive"]) == ("sleeping", False, True)
    assert (await bench.client.post("/sleep")).status_code == 200  # sleeps on as it did
    assert bench.engine.level == 2
    assert (await bench.client.post("/wake_up")).status_code == 200
    assert (await bench.client.post("/wake_up")).status_code == 200
    assert not await is_sleeping(bench)
    assert (await bench.client.get("/readyz")).status_code == 200
    assert (await bench.chat()).status_code == 200
    assert (await bench.client.post("/sleep")).status_code == 200
    assert bench.engine.level == 1


async def test_running_requests_are_finished_first(bench: Any) -> None:
    bench.engine.gate.clear()
    running = asyncio.create_task(bench.chat())
    while not bench.engine.open:
        await asyncio.sleep(0)
    falling = asyncio.create_task(bench.client.post("/sleep"))
    while not await is_sleeping(bench):
        await asyncio.sleep(0)
    waking = asyncio.create_task(bench.client.post("/wake_up"))
    assert (await bench.chat()).status_code == 503
    assert not falling.done()
    bench.engine.gate.set()
    assert (await running).json()["choices"][0]["message"]["content"] == "Hello, world"
    assert (await falling).status_code == 200
    assert (await waking).status_code == 200
    assert (await bench.chat()).status_code == 200


async def test_what_goes_wrong_is_told(bench: Any) -> None:
    for level in ("0", "3", "x", "-1"):
        answer = await bench.client.post(f"/sleep?level={level}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "level")
    bench.engine.refusal = NotSupported("cannot")
    assert (await bench.client.post("/sleep")).status_code == 501
    bench.engine.refusal = None
    assert (await bench.chat()).status_code == 200
    await bench.client.post("/sleep")
    bench.engine.refusal = BrokenModel("gone")
    assert (await bench.client.post("/wake_up")).status_code == 422
    assert await is_sleeping(bench)


async def test_not_before_it_is_loaded_and_not_while_it_stops(make_bench: Any) -> None:
    loading = make_bench(ready=False)
    for path in ("/sleep", "/wake_up"):
        assert (await loading.client.post(path)).status_code == 503
    stopping = make_bench()
    await stopping.client.post("/sleep")
    stopping.replica.stop_accepting()
    for path in ("/sleep", "/wake_up"):
        assert (await stopping.client.post(path)).status_code == 503


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/sleep"), ("POST", "/wake_up"), ("GET", "/is_sleeping")]
)
async def test_only_who_has_the_token(make_bench: Any, method: str, path: str) -> None:
    bench = make_bench(token="secret")
    answer = await bench.client.request(method, path, headers={"authorization": "Bearer no"})
    assert answer.status_code == 401


async def test_the_starter_model_wakes_quickly(config: WorkerConfig) -> None:
    asked = replace(config, model=str(bundled_folder()), options={"kv_cache_mb": 16})
    replica = Replica(asked, SystemClock())
    replica.become_ready(await load_model(asked, lambda share, what: None))
    try:
        times = []
        for level in (1, 2, 1):
            await replica.sleep(level)
            began = time.monotonic()
            await replica.wake()
            times.append(time.monotonic() - began)
        assert min(times) < 10.0  # within a second on a quiet machine: bench/engine/abilities.py
    finally:
        await replica.close()
