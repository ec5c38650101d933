"""When the client goes, its sequences end at once and nothing stays behind."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

CHAT = "/v1/chat/completions"


class Caller:
    """One raw ASGI request whose client may go at any moment."""

    def __init__(self, app: Any, path: str, body: dict[str, Any]) -> None:
        self.app, self.path = app, path
        self.raw = json.dumps(body).encode()
        self.sent: list[dict[str, Any]] = []
        self.leaves = asyncio.Event()
        self.progress = asyncio.Event()
        self.leave_after: int | None = None
        self._delivered = False

    async def run(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [],
        }
        await self.app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if not self._delivered:
            self._delivered = True
            return {"type": "http.request", "body": self.raw, "more_body": False}
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self.progress.set()
        if self.leave_after is not None and len(self.sent) >= self.leave_after:
            self.leaves.set()
            await asyncio.sleep(0)


def body(stream: bool, n: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {"model": "echo", "messages": messages, "stream": stream, "n": n}


async def until_open(engine: Any, count: int) -> None:
    while len(engine.open) < count:
        await asyncio.sleep(0.001)


@pytest.mark.promise(2)
@pytest.mark.known_failure("vllm#54947")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 4])
async def test_leaving_while_waiting_frees_every_slot(bench: Any, stream: bool, n: int) -> None:
    bench.engine.gate.clear()
    caller = Caller(bench.app, CHAT, body(stream, n))
    running = asyncio.create_task(caller.run())
    await until_open(bench.engine, n)
    caller.leaves.set()
    await asyncio.wait_for(running, 60.0)
    assert bench.engine.open == {}
    assert bench.engine.cancelled == [bench.engine.requests[0].request_id]
    assert caller.sent == []
    text = bench.replica.metrics.exposition().decode()
    assert f'finished_reason="abort",model_name="echo"}} {n}.0' in text
    assert 'status="499"} 1.0' in text


@pytest.mark.promise(2)
@pytest.mark.known_failure("vllm#54947")
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("after", [1, 2, 3, 5, 8])
async def test_leaving_in_the_middle_of_a_stream(bench: Any, n: int, after: int) -> None:
    bench.engine.answer = "x" * 200
    caller = Caller(bench.app, CHAT, body(True, n))
    caller.leave_after = after
    await asyncio.wait_for(caller.run(), 60.0)
    assert bench.engine.open == {}
    assert len(bench.engine.cancelled) == 1
    assert len(caller.sent) < 100
    assert not any(b"[DONE]" in message.get("body", b"") for message in caller.sent)


@pytest.mark.promise(2)
async def test_many_who_drop_leave_nothing_behind(bench: Any) -> None:
    bench.engine.answer = "y" * 50
    before = len(asyncio.all_tasks())

    async def drop(number: int) -> None:
        caller = Caller(bench.app, CHAT, body(number % 2 == 0, 1 + number % 3))
        caller.leave_after = 1 + number % 7
        if number % 5 == 0:
            caller.leaves.set()
        await caller.run()

    for first in range(0, 200, 20):
        await asyncio.gather(*(drop(first + k) for k in range(20)))
    assert bench.engine.open == {}
    assert bench.replica._running == set()
    assert len(asyncio.all_tasks()) == before
    assert (await bench.chat()).status_code == 200


@pytest.mark.promise(10)
async def test_a_reader_that_reads_nothing_is_given_up(bench: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("cloudlm.worker.stream.SEND_TIMEOUT_S", 0.02)
    bench.engine.answer = "x" * 200
    caller = Caller(bench.app, CHAT, body(True, 1))

    async def stuck(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    caller._send = stuck  # type: ignore[method-assign]
    await asyncio.wait_for(caller.run(), 60.0)
    assert bench.engine.open == {}


async def test_a_client_that_goes_while_it_sends(bench: Any) -> None:
    caller = Caller(bench.app, CHAT, body(False, 1))
    caller._delivered = True
    caller.leaves.set()
    await caller.run()
    assert caller.sent == []
    assert bench.engine.requests == []


async def test_a_stopping_replica_ends_what_still_runs(bench: Any) -> None:
    bench.engine.gate.clear()
    waiting = asyncio.create_task(bench.chat())
    await until_open(bench.engine, 1)
    assert bench.replica.end_running() == 1
    bench.engine.gate.set()
    answer = await waiting
    assert answer.status_code == 503
    assert "stopped before" in answer.json()["error"]["message"]
