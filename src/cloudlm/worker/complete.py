"""Token events to ``/v1/completions`` answers, whole and streamed. Must not know HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from cloudlm.core.chat import CompletionRequest
from cloudlm.engine.api import TokenEvent
from cloudlm.worker.generate import Numbered, Tally, stop_of
from cloudlm.worker.logprobs import CompletionLogprobs, LogprobGate, joined
from cloudlm.worker.prepare import Prepared
from cloudlm.worker.resume import Thread
from cloudlm.worker.serving import Serving
from cloudlm.worker.stream import DONE, event


class _Choice:
    """One choice in the making. The first event brings the echo of the prompt, if wanted."""

    def __init__(
        self, serving: Serving, request: CompletionRequest, prepared: Prepared, number: int
    ) -> None:
        self._wants_logprobs = request.sampling.logprobs is not None
        shown = prepared.requests[number].shown_token_ids
        self._gate = LogprobGate(serving.tokenizer, shown)
        self._shape = CompletionLogprobs(serving.tokenizer)
        self._prompt = prepared.requests[number].prompt_token_ids
        self._echo = prepared.prompt_texts[number // request.n] if request.echo else None

    def take(self, one: TokenEvent) -> tuple[str, dict[str, Any] | None]:
        """The text and log probabilities that this event adds."""
        text, logprobs = one.text, None
        if self._wants_logprobs:
            entries = self._gate.admit(one)
            if self._echo is not None:
                echoed = self._shape.echo(self._prompt, one.prompt_logprobs)
                logprobs = joined(echoed, self._shape.shape(entries))
            else:
                logprobs = self._shape.shape(entries)
        if self._echo is not None:
            text, self._echo = self._echo + text, None
        return text, logprobs


async def whole_completion(
    serving: Serving,
    request: CompletionRequest,
    prepared: Prepared,
    events: AsyncGenerator[Numbered, None],
    created: int,
) -> dict[str, Any]:
    """The ``text_completion`` object; ``created`` is Unix time, seconds."""
    count = len(prepared.requests)
    makers = [_Choice(serving, request, prepared, number) for number in range(count)]
    choices: list[dict[str, Any]] = [
        {"index": number, "text": "", "logprobs": None, "finish_reason": None}
        for number in range(count)
    ]
    tally = Tally(prepared.prompt_tokens, request.n)
    async for number, one in events:
        tally.add(number, one)
        text, logprobs = makers[number].take(one)
        choice = choices[number]
        choice["text"] += text
        choice["finish_reason"] = one.finish_reason
        choice |= stop_of(one)
        if logprobs is not None:
            known = choice["logprobs"] = choice["logprobs"] or {name: [] for name in logprobs}
            for name, values in logprobs.items():
                known[name] += values
    head = _head(serving, prepared, created)
    return {**head, "choices": choices, "usage": tally.usage().body()}


async def stream_completion(
    serving: Serving,
    request: CompletionRequest,
    prepared: Prepared,
    events: AsyncGenerator[Numbered, None],
    created: int,
    thread: Thread | None = None,
) -> AsyncGenerator[bytes, None]:
    """The streamed ``text_completion`` events up to ``[DONE]``, without those that ``thread``
    has."""
    head = _head(serving, prepared, created)
    thread = thread or Thread()
    makers = [_Choice(serving, request, prepared, n) for n in range(len(prepared.requests))]
    tally = thread.tally(prepared)
    options = request.stream_options
    async for number, one in events:
        tally.add(number, one)
        text, logprobs = makers[number].take(one)
        speaks = text or (logprobs is not None and logprobs["tokens"])
        if not speaks and one.finish_reason is None and not options.continuous_usage_stats:
            continue
        choice = {
            "index": number,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": one.finish_reason,
            **stop_of(one),
        }
        body: dict[str, Any] = {**head, "choices": [choice]}
        if options.continuous_usage_stats:
            body["usage"] = tally.usage().body()
        elif options.include_usage:
            body["usage"] = None
        thread.note([body], one.token_ids, prepared.requests[number].sampling.seed)
        if not thread.has(number):
            yield event(body)
    if options.include_usage and not thread.usage_shown:
        yield event({**head, "choices": [], "usage": tally.usage().body()})
    yield DONE


def _head(serving: Serving, prepared: Prepared, created: int) -> dict[str, Any]:
    return {
        "id": prepared.answer_id or prepared.id,
        "object": "text_completion",
        "created": created,
        "model": prepared.requests[0].adapter or serving.name,
        "system_fingerprint": serving.fingerprint,
    }
