"""Runs the sequences of one API request together: all start or none, all end or are cancelled.

Yields (choice number, event) in the order in which the engine produced them. Knows nothing of HTTP
or of either API's shapes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from cloudlm.core.chat import FinishReason, Usage
from cloudlm.core.errors import Unavailable
from cloudlm.engine.api import Engine, GenerateRequest, TokenEvent
from cloudlm.worker.metrics import RequestWatch

Numbered = tuple[int, TokenEvent]


async def generate(
    engine: Engine, requests: Sequence[GenerateRequest], watch: RequestWatch
) -> AsyncGenerator[Numbered, None]:
    """The events of all ``requests``, which share one request id, numbered by their place.

    Closing it at any point frees every slot at once. Raises what ``submit`` raises, and Unavailable
    if the engine gives a sequence up before its end.
    """
    streams = _start(engine, requests)
    try:
        merged = _numbered(streams[0]) if len(streams) == 1 else _merge(streams)
        async with contextlib.aclosing(merged):
            async for number, event in merged:
                watch.on_event(number, event)
                if event.finish_reason is FinishReason.ABORT:
                    raise _broken_off()
                yield number, event
        if watch.unfinished:
            raise _broken_off()
    finally:
        if watch.unfinished:
            engine.cancel(requests[0].request_id)
        watch.close()


def stop_of(event: TokenEvent) -> dict[str, str]:
    """The field of a choice that names the stop text that ended it (vLLM's ``stop_reason``), if one
    did."""
    return {"stop_reason": event.stop_match} if isinstance(event.stop_match, str) else {}


def _broken_off() -> Unavailable:
    return Unavailable("the replica stopped before the answer was complete", retry_after_s=1.0)


def _start(engine: Engine, requests: Sequence[GenerateRequest]) -> list[AsyncIterator[TokenEvent]]:
    streams: list[AsyncIterator[TokenEvent]] = []
    try:
        for request in requests:
            streams.append(engine.submit(request))
    except Exception:
        if streams:
            engine.cancel(requests[0].request_id)
        raise
    return streams


async def _numbered(
    stream: AsyncIterator[TokenEvent], number: int = 0
) -> AsyncGenerator[Numbered, None]:
    try:
        async for event in stream:
            yield number, event
    finally:
        await _close(stream)


async def _merge(streams: Sequence[AsyncIterator[TokenEvent]]) -> AsyncGenerator[Numbered, None]:
    queue: asyncio.Queue[Numbered | BaseException | None] = asyncio.Queue()

    async def pump(number: int, stream: AsyncIterator[TokenEvent]) -> None:
        try:
            async for numbered in _numbered(stream, number):
                queue.put_nowait(numbered)
            queue.put_nowait(None)
        except Exception as error:  # raised again where the events are read
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(n, stream)) for n, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _close(stream: AsyncIterator[TokenEvent]) -> None:
    close = getattr(stream, "aclose", None)
    if close is not None:
        await close()


class Tally:
    """Counts tokens as they come. ``prompt_tokens`` holds one length per prompt; each prompt counts
    once, however many choices share it. A stream that began elsewhere brings its
    ``completion_tokens`` along, and the ``cached_tokens`` that were stated then stay."""

    def __init__(
        self,
        prompt_tokens: Sequence[int],
        choices_per_prompt: int,
        *,
        cached_tokens: int | None = None,
        completion_tokens: int = 0,
    ) -> None:
        self._prompt_tokens = sum(prompt_tokens)
        self._choices_per_prompt = choices_per_prompt
        self._stated = cached_tokens
        self._cached: dict[int, int] = {}
        self._completion_tokens = completion_tokens

    def add(self, number: int, event: TokenEvent) -> None:
        self._completion_tokens += len(event.token_ids)
        if number % self._choices_per_prompt == 0:
            prompt = number // self._choices_per_prompt
            self._cached[prompt] = max(self._cached.get(prompt, 0), event.cached_tokens)

    def usage(self) -> Usage:
        cached = sum(self._cached.values()) if self._stated is None else self._stated
        return Usage(self._prompt_tokens, self._completion_tokens, cached)
