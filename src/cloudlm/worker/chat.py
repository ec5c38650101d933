"""Token events to ``/v1/chat/completions`` answers, whole and streamed. Must not know HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from cloudlm.core.chat import ChatRequest, FinishReason
from cloudlm.engine.api import TokenEvent
from cloudlm.worker.generate import Numbered, Tally, stop_of
from cloudlm.worker.logprobs import LogprobGate, chat_logprobs
from cloudlm.worker.prepare import Prepared
from cloudlm.worker.resume import Thread
from cloudlm.worker.serving import Serving
from cloudlm.worker.speech import Speech, delta_of
from cloudlm.worker.stream import DONE, event


async def whole_chat(
    serving: Serving,
    request: ChatRequest,
    prepared: Prepared,
    events: AsyncGenerator[Numbered, None],
    created: int,
) -> dict[str, Any]:
    """The ``chat.completion`` object; ``created`` is Unix time, seconds."""
    readers = [prepared.make_reader() for _ in range(request.n)]
    speeches = [Speech() for _ in range(request.n)]
    gates = [LogprobGate(serving.tokenizer, one.shown_token_ids) for one in prepared.requests]
    entries: list[list[Any]] = [[] for _ in range(request.n)]
    reasons: list[str | None] = [None] * request.n
    stops: list[dict[str, Any]] = [{}] * request.n
    tally = Tally(prepared.prompt_tokens, request.n)
    async for number, one in events:
        tally.add(number, one)
        speeches[number].add(readers[number].push(one.text))
        entries[number] += gates[number].admit(one)
        if one.finish_reason is not None:
            speeches[number].add(readers[number].finish())
            reasons[number] = _reason(one.finish_reason, speeches[number].calls_tools)
            stops[number] = stop_of(one)
    wants_logprobs = request.sampling.logprobs is not None
    choices = [
        {
            "index": number,
            "message": speeches[number].message(),
            "logprobs": chat_logprobs(entries[number], serving.tokenizer)
            if wants_logprobs
            else None,
            "finish_reason": reasons[number],
            **stops[number],
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
    thread: Thread | None = None,
) -> AsyncGenerator[bytes, None]:
    """The ``chat.completion.chunk`` events up to ``[DONE]``, without those that ``thread`` has."""
    head = _head(serving, prepared, created, "chat.completion.chunk")
    thread = thread or Thread()
    chunks = _Chunks(serving, request, prepared, head)
    tally = thread.tally(prepared)
    options = request.stream_options
    begun: set[int] = set()
    async for number, one in events:
        tally.add(number, one)
        usage = tally.usage().body() if options.continuous_usage_stats else None
        made = chunks.of_event(number, one, usage)
        thread.note(made, one.token_ids)
        if number not in begun:
            begun.add(number)
            first = chunks.chunk(number, {"role": "assistant", "content": ""}, None, None, usage)
            thread.note([first], (), prepared.requests[number].sampling.seed)
            made.insert(0, first)
        for body in made:
            if not thread.has(number):
                yield event(body)
    if options.include_usage and not thread.usage_shown:
        yield event(chunks.last(tally.usage().body()))
    yield DONE


class _Chunks:
    """Makes the chunks of one stream."""

    def __init__(
        self, serving: Serving, request: ChatRequest, prepared: Prepared, head: Mapping[str, Any]
    ) -> None:
        self._tokenizer = serving.tokenizer
        self._head = head
        self._wants_logprobs = request.sampling.logprobs is not None
        self._says_usage = request.stream_options.include_usage
        self._gates = [
            LogprobGate(serving.tokenizer, one.shown_token_ids) for one in prepared.requests
        ]
        self._readers = [prepared.make_reader() for _ in range(request.n)]
        self._calls_tools = [False] * request.n

    def of_event(
        self, number: int, one: TokenEvent, usage: Mapping[str, Any] | None
    ) -> list[dict[str, Any]]:
        """What one event says: its text, and the end of the choice in a chunk of its own. A piece
        of text that a reader holds back is said later."""
        made: list[dict[str, Any]] = []
        entries = self._gates[number].admit(one) if self._wants_logprobs else []
        delta = self._delta(number, one)
        if delta or entries or (usage is not None and one.finish_reason is None):
            logprobs = chat_logprobs(entries, self._tokenizer) if self._wants_logprobs else None
            made.append(self.chunk(number, delta or {"content": ""}, logprobs, None, usage))
        if one.finish_reason is not None:
            reason = _reason(one.finish_reason, self._calls_tools[number])
            made.append(self.chunk(number, {}, None, reason, usage, stop_of(one)))
        return made

    def _delta(self, number: int, one: TokenEvent) -> dict[str, Any]:
        reader = self._readers[number]
        pieces = reader.push(one.text)
        if one.finish_reason is not None:
            pieces += reader.finish()
        delta = delta_of(pieces)
        self._calls_tools[number] = self._calls_tools[number] or "tool_calls" in delta
        return delta

    def chunk(
        self,
        number: int,
        delta: Mapping[str, Any],
        logprobs: Mapping[str, Any] | None,
        finish_reason: str | None,
        usage: Mapping[str, Any] | None,
        stop: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": number,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            **(stop or {}),
        }
        body: dict[str, Any] = {**self._head, "choices": [choice]}
        if usage is not None or self._says_usage:
            body["usage"] = usage
        return body

    def last(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage}


def _reason(reason: FinishReason, calls_tools: bool) -> str:
    """OpenAI's word: an answer that ended by itself and calls tools waits for their results."""
    return "tool_calls" if calls_tools and reason is FinishReason.STOP else reason.value


def _head(serving: Serving, prepared: Prepared, created: int, kind: str) -> dict[str, Any]:
    return {
        "id": prepared.answer_id or prepared.id,
        "object": kind,
        "created": created,
        "model": prepared.requests[0].adapter or serving.name,
        "system_fingerprint": serving.fingerprint,
    }
