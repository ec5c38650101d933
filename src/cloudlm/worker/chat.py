"""Token events to ``/v1/chat/completions`` answers, whole and streamed. Must not know HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from cloudlm.core.chat import ChatRequest
from cloudlm.engine.api import TokenEvent
from cloudlm.worker.generate import Numbered, Tally
from cloudlm.worker.logprobs import LogprobGate, chat_logprobs
from cloudlm.worker.prepare import Prepared
from cloudlm.worker.serving import Serving
from cloudlm.worker.stream import DONE, event


async def whole_chat(
    serving: Serving,
    request: ChatRequest,
    prepared: Prepared,
    events: AsyncGenerator[Numbered, None],
    created: int,
) -> dict[str, Any]:
    """The ``chat.completion`` object; ``created`` is Unix time, seconds."""
    texts = [""] * request.n
    gates = [LogprobGate(serving.tokenizer) for _ in range(request.n)]
    entries: list[list[Any]] = [[] for _ in range(request.n)]
    reasons: list[str | None] = [None] * request.n
    tally = Tally(prepared.prompt_tokens, request.n)
    async for number, one in events:
        tally.add(number, one)
        texts[number] += one.text
        entries[number] += gates[number].admit(one)
        reasons[number] = one.finish_reason
    wants_logprobs = request.sampling.logprobs is not None
    choices = [
        {
            "index": number,
            "message": {"role": "assistant", "content": texts[number], "refusal": None},
            "logprobs": chat_logprobs(entries[number], serving.tokenizer)
            if wants_logprobs
            else None,
            "finish_reason": reasons[number],
        }
        for number in range(request.n)
    ]
    head = _head(serving, prepared, created, "chat.completion")
    return {**head, "choices": choices, "usage": tally.usage().body()}


async def stream_chat(
    serving: Serving,
    request: ChatRequest,
    prepared: Prepared,
    events: AsyncGenerator[Numbered, None],
    created: int,
) -> AsyncGenerator[bytes, None]:
    """The ``chat.completion.chunk`` events up to ``[DONE]``."""
    chunks = _Chunks(serving, request, _head(serving, prepared, created, "chat.completion.chunk"))
    tally = Tally(prepared.prompt_tokens, request.n)
    options = request.stream_options
    begun: set[int] = set()
    async for number, one in events:
        tally.add(number, one)
        usage = tally.usage().body() if options.continuous_usage_stats else None
        if number not in begun:
            begun.add(number)
            yield chunks.chunk(number, {"role": "assistant", "content": ""}, None, None, usage)
        for data in chunks.of_event(number, one, usage):
            yield data
    if options.include_usage:
        yield chunks.last(tally.usage().body())
    yield DONE


class _Chunks:
    """Makes the chunks of one stream."""

    def __init__(self, serving: Serving, request: ChatRequest, head: Mapping[str, Any]) -> None:
        self._tokenizer = serving.tokenizer
        self._head = head
        self._wants_logprobs = request.sampling.logprobs is not None
        self._says_usage = request.stream_options.include_usage
        self._gates = [LogprobGate(serving.tokenizer) for _ in range(request.n)]

    def of_event(
        self, number: int, one: TokenEvent, usage: Mapping[str, Any] | None
    ) -> list[bytes]:
        """What one event says: its text, and the end of the choice in a chunk of its own."""
        made: list[bytes] = []
        entries = self._gates[number].admit(one) if self._wants_logprobs else []
        if one.text or entries or (usage is not None and one.finish_reason is None):
            logprobs = chat_logprobs(entries, self._tokenizer) if self._wants_logprobs else None
            made.append(self.chunk(number, {"content": one.text}, logprobs, None, usage))
        if one.finish_reason is not None:
            made.append(self.chunk(number, {}, None, one.finish_reason, usage))
        return made

    def chunk(
        self,
        number: int,
        delta: Mapping[str, Any],
        logprobs: Mapping[str, Any] | None,
        finish_reason: str | None,
        usage: Mapping[str, Any] | None,
    ) -> bytes:
        choice = {
            "index": number,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        body: dict[str, Any] = {**self._head, "choices": [choice]}
        if usage is not None or self._says_usage:
            body["usage"] = usage
        return event(body)

    def last(self, usage: Mapping[str, Any]) -> bytes:
        return event({**self._head, "choices": [], "usage": usage})


def _head(serving: Serving, prepared: Prepared, created: int, kind: str) -> dict[str, Any]:
    return {
        "id": prepared.id,
        "object": kind,
        "created": created,
        "model": prepared.requests[0].adapter or serving.name,
        "system_fingerprint": serving.fingerprint,
    }
