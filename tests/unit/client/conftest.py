"""Both clients against a scripted control API, driven by the same test."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest

from cloudlm.client import AsyncClient, Client

KEY = "clm_live_abc"


@dataclass
class Time:
    """A clock that jumps instead of waiting, for both clients."""

    seconds: float = 0.0
    slept: list[float] = field(default_factory=list)

    def now(self) -> float:
        return self.seconds

    def monotonic(self) -> float:
        return self.seconds

    def sleep_now(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds

    async def sleep(self, seconds: float) -> None:
        self.sleep_now(seconds)


@dataclass
class Control:
    """Answers each request with the next scripted answer (the last one again), or raises it."""

    kind: str
    answers: list[Any] = field(default_factory=list)
    requests: list[httpx2.Request] = field(default_factory=list)
    time: Time = field(default_factory=Time)

    def handle(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if not isinstance(answer, httpx2.Response):
            return httpx2.Response(200, json=answer)
        # A fresh one: a response belongs to the client that read it.
        return httpx2.Response(
            answer.status_code, headers=answer.headers.copy(), content=answer.content
        )

    def ask(self, what: Callable[[Any], Any], *answers: Any, **arguments: Any) -> Any:
        """Call the client; what it returns, or a list of what it yields."""
        self.answers = list(answers) or [{}]
        arguments.setdefault("api_key", KEY)
        if self.kind == "sync":
            transport = httpx2.MockTransport(self.handle)
            with Client(
                transport=transport,
                sleep=self.time.sleep_now,
                monotonic=self.time.monotonic,
                **arguments,
            ) as client:
                result = what(client)
                return list(result) if inspect.isgenerator(result) else result
        return asyncio.run(self._ask(what, arguments))

    async def _ask(self, what: Callable[[Any], Any], arguments: dict[str, Any]) -> Any:
        transport = httpx2.MockTransport(self.handle)
        async with AsyncClient(transport=transport, clock=self.time, **arguments) as client:
            result = what(client)
            if inspect.isasyncgen(result):
                return [line async for line in result]
            return await result

    @property
    def sent(self) -> tuple[str, str, Any]:
        """Method, path with query, and JSON of the last request."""
        request = self.requests[-1]
        body = json.loads(request.content) if request.content else None
        return request.method, request.url.raw_path.decode(), body


@pytest.fixture(params=["sync", "async"])
def control(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Control:
    for name in ("CLOUDLM_API_KEY", "OPENAI_API_KEY", "CLOUDLM_CONTROL_URL", "CLOUDLM_GATEWAY_URL"):
        monkeypatch.delenv(name, raising=False)
    return Control(request.param)
