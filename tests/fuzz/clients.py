"""Clients of a run: each asks once, as a server would hand its request on, and reads, slowly or not
at all. Must not know what the right answer is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from tests.fuzz.loop import VirtualLoop
from tests.fuzz.schedule import Ask
from tests.fuzz.story import CANCEL_WITHIN_S, NAMES, Seen, Story

from cloudlm.gateway.app import Gateway
from cloudlm.gateway.exchange import GatewayRequest
from cloudlm.security.keys import MintedKey


class Clients:
    """All clients. ``gateway`` is the one that lives (None: none does)."""

    def __init__(
        self, loop: VirtualLoop, story: Story, keys: list[MintedKey], tell: Callable[..., None]
    ) -> None:
        self.loop, self.story, self.keys, self.tell = loop, story, keys, tell
        self.gateway: Gateway | None = None
        self._serving: dict[asyncio.Task[Any], Seen] = {}

    def cut_off(self) -> None:
        """The gateway's process is dead, and all that it served."""
        self.gateway = None
        for task, seen in list(self._serving.items()):
            seen.killed = True
            task.cancel()

    async def ask(self, seen: Seen) -> None:
        """Ask when its time has come, and read what comes."""
        await self.loop.pause(seen.ask.at_s)
        serving = asyncio.current_task()
        assert serving is not None
        serving.set_name(f"request {seen.ask.number}")
        self._serving[serving] = seen
        try:
            await self._served(seen)
        except asyncio.CancelledError:
            if not seen.killed:
                raise
            seen.ended = "cut"
        finally:
            self._serving.pop(serving, None)
            seen.over_at = self.loop.time()
            self.tell("end", seen.ask.number, seen.ended, seen.status, len(seen.pieces))

    async def _served(self, seen: Seen) -> None:
        if self.gateway is None:
            seen.ended = "no gateway"
            return
        ask = seen.ask
        gone: asyncio.Future[None] = self.loop.create_future()
        if ask.leaves_after_s is not None:
            self.loop.call_later(ask.leaves_after_s, self._leave, seen, gone)
        seen.asked, seen.began_at = True, self.loop.time()
        request = self._request(ask, gone)
        response = await self.gateway.handler.handle(request)
        seen.status = response.status
        if isinstance(response.body, bytes):
            seen.pieces.append(response.body)
            seen.stream = response.headers.get("content-type", "") != "application/json"
            seen.ended = "whole"
            return
        seen.stream = True

        def pour(piece: bytes) -> bool:
            seen.pieces.append(piece)
            return not (gone.done() or ask.slow_s)

        try:  # as the server does
            async for piece in response.body:
                seen.pieces.append(piece)
                if gone.done():
                    break
                if ask.slow_s:
                    await self.loop.pause(ask.slow_s)
                await response.body.pump(pour)
        finally:
            await response.body.aclose()
        seen.ended = "left" if seen.left else "read"

    def _request(self, ask: Ask, gone: asyncio.Future[None]) -> GatewayRequest:
        headers = {
            "authorization": f"Bearer {self.keys[ask.key].text}",
            "content-type": "application/json",
            "x-request-id": f"q{ask.number}",
        }
        if ask.deadline_ms is not None:
            headers["x-cloudlm-deadline-ms"] = str(ask.deadline_ms)
        body = _body(NAMES[ask.model], ask.prompt, ask.stream, ask.usage, ask.max_tokens)
        return GatewayRequest("POST", "/v1/chat/completions", headers, body, gone)

    def _leave(self, seen: Seen, gone: asyncio.Future[None]) -> None:
        if seen.ended or gone.done():
            return
        seen.left = True
        gone.set_result(None)
        self.loop.call_later(CANCEL_WITHIN_S, self._is_free, seen)

    def _is_free(self, seen: Seen) -> None:
        name = f"q{seen.ask.number}"
        sends = () if self.story.upstream is None else self.story.upstream.sends
        if any(send.open for send in sends if send.request_id == name):
            self.story.note("cancel", f"a replica still works for {name}, whose client left")


@lru_cache(16_384)
def _body(model: str, prompt: int, stream: bool, usage: bool, max_tokens: int) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": f"prompt {prompt}"}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    if stream:
        body["stream"] = True
        if usage:
            body["stream_options"] = {"include_usage": True}
    return json.dumps(body).encode()
