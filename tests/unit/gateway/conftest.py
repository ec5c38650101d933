"""A gateway with a memory state and scriptable replicas on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop

from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.settings import ExternalSettings, GatewaySettings
from cloudlm.core.tenant import LedgerRow, Role
from cloudlm.gateway.app import Gateway
from cloudlm.gateway.exchange import GatewayRequest, GatewayResponse
from cloudlm.security.issuer import Issuer
from cloudlm.security.keys import mint
from cloudlm.state.memory import MemoryState

PEPPER = b"p" * 32
_ON_SOCKETS = ("test_drops", "test_leaks", "test_pool", "test_server", "test_tls", "test_wire")
MODEL = "tiny"
USAGE = "usage"


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], Any]]:
    """What meets sockets is tested on the loop that serves and on the one where there is no other:
    their transports differ."""
    factories: dict[str, Callable[[], Any]] = {"asyncio": asyncio.new_event_loop}
    if item.path.stem in _ON_SOCKETS:
        factories["uvloop"] = uvloop.new_event_loop
    return factories


@dataclass
class Plan:
    """How a replica answers one request. ``cut_at`` and ``stall_at`` count events of the stream
    (the role event is the first); ``cut_byte`` counts bytes of the body on the wire."""

    kind: str = "ok"
    tokens: int = 5
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut_byte: int | None = None
    stall_at: int | None = None
    garbage_at: int | None = None
    pause_s: float = 0.0
    gate: asyncio.Event | None = None  # an answer that is not streamed waits for it
    say_usage: bool = True
    done: bool = True
    pad: int = 0
    error: dict[str, Any] | None = None
    body: bytes | None = None
    notes: bool = False
    fingerprint: str = "fp_1"


class MockReplica:
    """A replica that does what its plans say, one after the other, then ``default`` for ever."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.plans: deque[Plan] = deque()
        self.default = Plan()
        self.requests: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.tokens_sent = 0
        self.active = 0
        self.dropped_at: list[float] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = next(
            int(line.split(":")[1])
            for line in head.splitlines()
            if line.lower().startswith("content-length")
        )
        body = json.loads(await reader.readexactly(length))
        self.heads.append(head)
        self.requests.append(body)
        notes = "x-cloudlm-resumable: 1" in head.lower()
        plan = self.plans.popleft() if self.plans else self.default
        plan = replace(plan, notes=plan.notes and notes)
        self.active += 1
        watch = asyncio.create_task(reader.read(1))
        try:
            return await self._answer(plan, body, writer, watch)
        finally:
            self.active -= 1
            if watch.done() and not watch.cancelled() and not watch.result():
                self.dropped_at.append(time.monotonic())
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch

    async def _answer(
        self,
        plan: Plan,
        body: dict[str, Any],
        writer: asyncio.StreamWriter,
        watch: asyncio.Task[bytes],
    ) -> bool:
        if plan.kind == "close":
            return False
        if plan.kind == "silence":
            await asyncio.wait({watch}, timeout=30)
            return False
        if plan.kind == "status":
            raw = plan.body if plan.body is not None else json.dumps(plan.error or {}).encode()
            writer.write(_head(plan.status, len(raw), plan.headers) + raw)
            await writer.drain()
            return True
        if "begun" not in body and not body.get("stream"):
            raw = plan.body if plan.body is not None else _whole(body, plan)
            await self._pause(plan.pause_s, watch)
            if plan.gate is not None:
                opened = asyncio.create_task(plan.gate.wait())
                await asyncio.wait({watch, opened}, return_when=asyncio.FIRST_COMPLETED)
                opened.cancel()
            if watch.done():
                return False
            self.tokens_sent += plan.tokens
            writer.write(_head(200, len(raw), {}) + raw)
            await writer.drain()
            return True
        return await self._stream(plan, body, writer, watch)

    async def _stream(
        self,
        plan: Plan,
        body: dict[str, Any],
        writer: asyncio.StreamWriter,
        watch: asyncio.Task[bytes],
    ) -> bool:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        sent = 0
        for number, (data, tokens) in enumerate(_events(body, plan)):
            if plan.stall_at == number:
                await asyncio.wait({watch}, timeout=30)
                return False
            if plan.garbage_at == number:
                writer.write(b"c\r\ndata: {not\n\n\r\n")
                await writer.drain()
                return False
            wire = b"%x\r\n%s\r\n" % (len(data), data)
            if plan.cut_byte is not None and sent + len(wire) > plan.cut_byte:
                rest = wire[: plan.cut_byte - sent]
                writer.write(rest)
                if len(rest) >= len(wire) - 2:
                    self.tokens_sent += tokens
                await writer.drain()
                return False
            writer.write(wire)
            sent += len(wire)
            self.tokens_sent += tokens
            await writer.drain()
            await self._pause(plan.pause_s, watch)
            if watch.done():
                return False
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _pause(self, seconds: float, watch: asyncio.Task[bytes]) -> None:
        if seconds:
            await asyncio.wait({watch}, timeout=seconds)


def _head(status: int, length: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _usage(tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": 7,
        "completion_tokens": tokens,
        "total_tokens": 7 + tokens,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def _whole(body: dict[str, Any], plan: Plan) -> bytes:
    text = " ".join(f"t{n}" for n in range(plan.tokens))
    return json.dumps(
        {
            "id": "cmpl-1",
            "object": "chat.completion",
            "model": "upstream-name",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop",
                }
            ],
            USAGE: _usage(plan.tokens),
        }
    ).encode()


def _events(body: dict[str, Any], plan: Plan) -> Iterator[tuple[bytes, int]]:
    """The stream's events with the tokens that each brings."""
    if plan.error is not None:
        yield b"data: " + json.dumps(plan.error).encode() + b"\n\n", 0
        return
    begun = body.get("begun", {"choices": [{}], "usage_shown": False, "id": "c1"})
    options = body.get("request", body).get("stream_options") or {}
    shown = begun["choices"][0].get("chunks", 0)

    def chunk(choices: list[dict[str, Any]], so_far: int, usage: bool) -> bytes:
        fields: dict[str, Any] = {"object": "chat.completion.chunk", "created": 1}
        fields |= {"id": begun["id"], "system_fingerprint": plan.fingerprint}
        fields |= {"model": "upstream-name", "choices": choices}
        if usage and plan.say_usage:
            fields[USAGE] = _usage(so_far)
        if plan.notes and choices:
            ids = [100 + so_far] if choices[0]["delta"].get("content") else []
            fields["cloudlm_resume"] = {"token_ids": ids, "seed": 7}
        return b"data: " + json.dumps(fields).encode() + b"\n\n"

    def choice(delta: dict[str, Any], finish: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "finish_reason": finish}]

    each = bool(options.get("continuous_usage_stats"))
    made = [(chunk(choice({"role": "assistant", "content": ""}), 0, each), 0)]
    for n in range(plan.tokens):
        made.append((chunk(choice({"content": f"t{n} " + "x" * plan.pad}), n + 1, each), 1))
    made.append((chunk(choice({}, "stop"), plan.tokens, each), 0))
    yield from made[shown:]
    if options.get("include_usage") and not begun["usage_shown"]:
        yield chunk([], plan.tokens, True), 0
    if plan.done:
        yield b"data: [DONE]\n\n", 0


@dataclass
class Result:
    """A response read to its end, as a client sees it."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        parts = [part for part in self.body.decode().split("\n\n") if part]
        assert all(part.startswith("data: ") for part in parts)
        datas = [part.removeprefix("data: ") for part in parts]
        return [data if data == "[DONE]" else json.loads(data) for data in datas]

    @property
    def tokens(self) -> int:
        """Tokens in a stream's chunks."""
        chunks = [e for e in self.events if isinstance(e, dict) and e.get("choices")]
        return sum(1 for e in chunks if e["choices"][0]["delta"].get("content"))

    @property
    def error(self) -> dict[str, Any] | None:
        errors = [e["error"] for e in self.events if isinstance(e, dict) and "error" in e]
        return errors[0] if errors else None


class Rig:
    """A running gateway over ``replicas``."""

    def __init__(self, gateway: Gateway, state: MemoryState, replicas: list[MockReplica]) -> None:
        self.gateway = gateway
        self.state = state
        self.replicas = replicas
        self.key = ""
        self.key_id = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}", "content-type": "application/json"}

    def request(
        self,
        body: Any = None,
        *,
        method: str = "POST",
        path: str = "/v1/chat/completions",
        headers: dict[str, str] | None = None,
        raw: bytes | None = None,
    ) -> GatewayRequest:
        content = raw if raw is not None else json.dumps(body).encode()
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sent = self.headers if headers is None else headers
        return GatewayRequest(method, path, sent, content, gone)

    async def ask(self, body: Any = None, **how: Any) -> Result:
        return await self.finish(await self.gateway.handler.handle(self.request(body, **how)))

    async def finish(self, response: GatewayResponse) -> Result:
        if isinstance(response.body, bytes):
            return Result(response.status, dict(response.headers), response.body)
        pieces: list[bytes] = []

        def pour(piece: bytes) -> bool:
            pieces.append(piece)
            return True

        try:  # as the server does
            async for piece in response.body:
                pieces.append(piece)
                await response.body.pump(pour)
        finally:
            await response.body.aclose()
        return Result(response.status, dict(response.headers), b"".join(pieces))

    async def rows(self) -> list[LedgerRow]:
        await self.gateway.ledger.flush()
        return await self.state.list_ledger()

    def assert_nothing_open(self) -> None:
        """Every place, every load and every exchange was given back."""
        assert self.gateway.admission.total == 0
        loads = self.gateway.loads
        assert [loads.of(replica.name).ongoing for replica in self.replicas] == [0] * len(
            self.replicas
        )
        assert not self.gateway.handler._open


def chat_body(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], **more}


@contextlib.asynccontextmanager
async def open_rig(
    replicas: int = 1,
    home: Path | None = None,
    issuer: Issuer | None = None,
    networks: str = "",
    **settings: Any,
) -> Any:
    """A running gateway with so many ready replicas of MODEL."""
    with contextlib.ExitStack() as stack:
        folder = home or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        mocks = [MockReplica(f"{MODEL}-r1-{n}") for n in range(replicas)]
        for mock in mocks:
            await mock.start()
        state = MemoryState()
        await state.put_deployment(DeploymentSpec(MODEL, "models:/m/1"), now=1_700_000_000.0)
        await state.put_endpoints(MODEL, [Endpoint(MODEL, m.name, m.url, 1) for m in mocks])
        minted = mint("test", Role.USER, PEPPER, 1.0)
        await state.put_key(minted.record)
        fast = {"first_token_timeout_s": 5.0, "idle_timeout_s": 5.0, "connect_timeout_s": 1.0}
        gateway = Gateway(
            GatewaySettings(**{**fast, **settings}),
            state,
            home=folder,
            pepper=PEPPER,
            worker_token="worker-token-for-tests",
            issuer=issuer,
            external=ExternalSettings(networks=networks),
        )
        rig = Rig(gateway, state, mocks)
        rig.key, rig.key_id = minted.text, minted.record.id
        try:
            async with gateway.running():
                yield rig
        finally:
            for mock in mocks:
                await mock.stop()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(home=tmp_path) as one:
        yield one


@pytest.fixture
def kit() -> SimpleNamespace:
    """What tests build with, since test modules cannot import each other."""
    return SimpleNamespace(
        open_rig=open_rig,
        chat_body=chat_body,
        Plan=Plan,
        MockReplica=MockReplica,
        Result=Result,
        MODEL=MODEL,
        PEPPER=PEPPER,
        until=until,
    )


async def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)
