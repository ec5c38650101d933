"""``python -m cloudlm.gateway`` as a process: start, stop, being killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpx2Client, RateLimitError

from cloudlm.core.access import Limits
from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.tenant import Outcome, Role
from cloudlm.gateway import compiled
from cloudlm.gateway.server import listen
from cloudlm.security.keys import mint
from cloudlm.state.home import Home, load_settings
from cloudlm.state.open import open_state

pytestmark = pytest.mark.flow


def start(home: Path, port: int) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "CLOUDLM_HOME": str(home),
        "CLOUDLM_GATEWAY_PORT": str(port),
        "CLOUDLM_GATEWAY_DRAIN_TIMEOUT_S": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "cloudlm.gateway"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str], how: signal.Signals) -> tuple[int, str]:
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


async def ready(port: int) -> None:
    def look() -> bool:
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").status == 200)
        return False

    deadline = time.monotonic() + 60
    while not await asyncio.to_thread(look):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def state_of(home: Path) -> AsyncIterator[Any]:
    settings, _ = load_settings({"home": str(home)}, {})
    state = await open_state(Home(home).ensure().state_url(settings))
    try:
        yield state
    finally:
        await state.close()


async def test_port_in_use_is_one_line_and_exit_1(tmp_path: Path) -> None:
    bound = listen("127.0.0.1", 0)
    try:
        process = start(tmp_path, bound.getsockname()[1])
        _, said = await asyncio.to_thread(process.communicate, timeout=30)
    finally:
        bound.close()
    assert process.returncode == 1
    assert len(said.splitlines()) == 1
    assert "is in use by another process" in said


@pytest.mark.skipif(compiled.find() is None, reason="not compiled here: make native")
async def test_what_was_compiled_is_used(tmp_path: Path) -> None:
    port = free_port()
    process = start(tmp_path, port)
    await ready(port)
    code, said = await asyncio.to_thread(end, process, signal.SIGTERM)
    assert code == 0
    listens = [json.loads(line) for line in said.splitlines() if "gateway_listens" in line]
    assert [one["compiled"] for one in listens] == [True]


@pytest.mark.promise(3)
async def test_killed_in_a_stream_and_stopped_by_a_signal(kit: Any, tmp_path: Path) -> None:
    """kill -9 in mid-stream: the attempt's row comes with the next start. SIGTERM: exit code 0."""
    replica, port = kit.MockReplica("m-r1-0"), free_port()
    await replica.start()
    replica.default = kit.Plan(tokens=10, stall_at=6)
    minted = mint("k", Role.USER, Home(tmp_path).ensure().pepper(), 1.0)
    async with state_of(tmp_path) as state:
        await state.put_key(minted.record)
        await state.put_deployment(DeploymentSpec("m", "models:/m/1"), now=1.0)
        await state.put_endpoints("m", [Endpoint("m", replica.name, replica.url, 1)])
    first = start(tmp_path, port)
    second: subprocess.Popen[str] | None = None
    try:
        await ready(port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"canary-81"}]}'
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-request-id: killed\r\n"
            + f"authorization: Bearer {minted.text}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        got = b""
        while b"t4 " not in got:
            got += await asyncio.wait_for(reader.read(4096), 10)
        await asyncio.sleep(1.3)  # by now the tokens so far are noted
        code, said = await asyncio.to_thread(end, first, signal.SIGKILL)
        assert code == -signal.SIGKILL
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        second = start(tmp_path, port)
        await ready(port)
        await asyncio.sleep(0.5)
        code, more = await asyncio.to_thread(end, second, signal.SIGTERM)
        assert code == 0, more
        async with state_of(tmp_path) as state:
            (row,) = await state.list_ledger()
        assert (row.request_id, row.outcome, row.completion_tokens) == ("killed", Outcome.FAILED, 5)
        assert list((tmp_path / "ledger").iterdir()) == []
        secret = minted.text.split("_")[3]
        said += more + "".join(
            path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()
        )
        assert "canary-81" not in said
        assert secret not in said
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                process.kill()
                process.communicate()
        await replica.stop()


async def test_a_limited_key_meets_its_limit_and_its_cost_is_written(
    tmp_path: Path, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The official client, a gateway of its own process, a restart between."""
    monkeypatch.setenv("CLOUDLM_GATEWAY_PRICES", "*=1000/100/10000")
    replica = kit.MockReplica(f"{kit.MODEL}-r1-0")
    await replica.start()
    limits = Limits(requests_per_minute=2, spend_per_month=0.45)
    minted = mint("limited", Role.USER, Home(tmp_path).ensure().pepper(), 1.0, limits=limits)
    async with state_of(tmp_path) as state:
        await state.put_deployment(DeploymentSpec(kit.MODEL, "models:/m/1"), now=1.0)
        await state.put_endpoints(kit.MODEL, [Endpoint(kit.MODEL, replica.name, replica.url, 1)])
        await state.put_key(minted.record)

    async def ask(port: int) -> Any:
        async with AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key=minted.text,
            max_retries=0,
            http_client=DefaultAsyncHttpx2Client(trust_env=False),
        ) as client:
            call = client.chat.completions.with_raw_response.create
            said: Any = [{"role": "user", "content": "hello"}]
            return await call(model=kit.MODEL, messages=said, max_tokens=5)

    for number in range(2):
        port = free_port()
        process = start(tmp_path, port)
        try:
            await ready(port)
            if number == 0:
                answer = await ask(port)
                assert answer.headers["x-ratelimit-remaining-requests"] == "1"
            with pytest.raises(RateLimitError) as refused:
                await ask(port)
            assert refused.value.code == "insufficient_quota"
        finally:
            end(process, signal.SIGKILL if number == 0 else signal.SIGTERM)
    await replica.stop()
    async with state_of(tmp_path) as state:
        (row,) = await state.list_ledger()
        assert (row.cost, row.outcome) == (55_200_000, Outcome.FINISHED)


async def test_it_follows_its_file_without_a_restart(kit: Any, tmp_path: Path) -> None:
    """Routes appear when the file is saved; a bad file leaves them and is told at ``/readyz``."""
    replica, port = kit.MockReplica("m-r1-0"), free_port()
    await replica.start()
    async with state_of(tmp_path) as state:
        await state.put_deployment(DeploymentSpec("m", "models:/m/1"), now=1.0)
        await state.put_endpoints("m", [Endpoint("m", replica.name, replica.url, 1)])
        minted = mint("test", Role.USER, Home(tmp_path).pepper(), 1.0)
        await state.put_key(minted.record)

    def write(text: str) -> None:
        (tmp_path / "fresh").write_text(text)
        (tmp_path / "fresh").replace(tmp_path / "config.yaml")

    def models() -> set[str]:
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/models", headers={"authorization": f"Bearer {minted.text}"}
        )
        return {one["id"] for one in json.load(urllib.request.urlopen(asked))["data"]}

    def notes() -> list[str]:
        return list(json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz"))["notes"])

    async def until(look: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not await asyncio.to_thread(look):
                await asyncio.sleep(0.1)

    write("gateway: {routes: 'chat = m'}")
    process = start(tmp_path, port)
    try:
        await ready(port)
        assert await asyncio.to_thread(models) == {"m", "chat"}
        write("gateway: {routes: 'chat = m; talk = m'}")
        await until(lambda: models() == {"m", "chat", "talk"})
        write("gateway: {routes: 'chat'}")
        await until(lambda: any("gateway.routes" in note for note in notes()))
        assert await asyncio.to_thread(models) == {"m", "chat", "talk"}
        write("gateway: {routes: 'talk = m'}")
        await until(lambda: models() == {"m", "talk"} and notes() == [])
    finally:
        code, said = await asyncio.to_thread(end, process, signal.SIGTERM)
        await replica.stop()
    assert code == 0
    assert "settings_not_renewed" in said
    assert said.count("settings_renewed") == 2
