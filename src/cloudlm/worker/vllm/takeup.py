"""Going on with a stream that another vLLM began: ``POST /internal/v1/resume``.

The body is that of ``worker.resume``. What the client has becomes part of the prompt of a text
completion, and vLLM's chunks are written as those of the stream that was begun: its id, its time,
its kind, its counts. ``begun.seed`` is no seed, since nothing was drawn: it holds the check of the
prompt that the first replica saw (``exact.prompt_check``), so that another reading of the prompt is
an error and never another answer. Must not know HTTP.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from cloudlm.core.errors import Conflict, InvalidRequest, NotSupported, UpstreamFailed
from cloudlm.worker.resume import Begun, BegunChoice, read_begun
from cloudlm.worker.stream import DONE, event
from cloudlm.worker.vllm.engine import VllmEngine
from cloudlm.worker.vllm.events import chunks_of
from cloudlm.worker.vllm.exact import ExactStream, exact_stream, prompt_check
from cloudlm.worker.vllm.noted import NotedStream

_LONGEST_CHARACTER = 8
"""How many tokens may wait for a character to be whole; more are no text."""
_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Rest:
    """A validated body: what was asked, and what the client has."""

    stream: ExactStream
    begun: Begun
    choice: BegunChoice


def read_rest(body: Mapping[str, Any], fingerprint: str, *, parses: bool) -> Rest:
    """Raises InvalidRequest, NotSupported (it cannot be gone on with exactly), Conflict (it was
    begun by another version). ``parses`` as for ``exact_stream``."""
    request, known = body.get("request"), body.get("begun")
    if not isinstance(request, dict) or not isinstance(known, dict):
        raise InvalidRequest("request and begun must be objects", param="begun")
    stream = exact_stream(str(body.get("path")), request, parses=parses)
    if stream is None:
        raise NotSupported(
            "this stream cannot be gone on with exactly by the engine vllm: only plain greedy text "
            "of one choice can"
        )
    begun = read_begun(known)
    if begun.fingerprint != fingerprint:
        raise Conflict(
            f"the answer was begun as {begun.fingerprint}, but this replica serves {fingerprint}; "
            "only the same version can go on with it"
        )
    if [choice.index for choice in begun.choices] != [0]:
        raise InvalidRequest("begun.choices must hold choice 0 alone", param="begun.choices")
    return Rest(stream, begun, begun.choices[0])


async def go_on(engine: VllmEngine, rest: Rest, request_id: str) -> AsyncGenerator[bytes, None]:
    """The events of the rest. Raises Conflict (the prompt has other tokens here), InvalidRequest,
    NotSupported, and what ``VllmEngine.post`` raises."""
    stream, given = rest.stream, rest.choice.token_ids
    prompt = await _prompt(engine, stream, request_id)
    if rest.begun.seed != prompt_check(prompt):
        raise Conflict("this replica reads the prompt as other tokens than where the answer began")
    if rest.choice.finished:
        for data in _ending(rest, len(prompt)):
            yield data
        return
    begun = await _shown(engine, stream, given, request_id)
    left = stream.limit(len(prompt), engine.info.max_model_len) - len(begun)
    if left < 1:
        raise InvalidRequest("begun.choices has all the tokens asked for", param="begun.choices")
    form = _Form(rest, len(prompt), len(begun))
    noted = NotedStream(
        rest.begun.fingerprint, stream.stops, goes_on=True, known=given[len(begun) :]
    )
    body = msgspec.json.encode(stream.rest(prompt, begun, left))
    async with (
        engine.post("/v1/completions", body, request_id) as answer,
        contextlib.aclosing(chunks_of(answer)) as chunks,
    ):
        async for chunk in chunks:
            if chunk is None:
                yield DONE
                return
            if chunk.get("error"):
                raise UpstreamFailed("vLLM gave the answer up")
            for ready in noted.take(form.of(chunk)):
                yield event(ready)
    raise UpstreamFailed("vLLM ended its answer too early")


async def _prompt(engine: VllmEngine, stream: ExactStream, request_id: str) -> list[int]:
    asked = stream.tokenising()
    if asked is None:
        return list(stream.request["prompt"])
    async with engine.post("/tokenize", msgspec.json.encode(asked), request_id) as answer:
        return list(msgspec.json.decode(await answer.read())["tokens"])


async def _shown(
    engine: VllmEngine, stream: ExactStream, ids: Sequence[int], request_id: str
) -> Sequence[int]:
    """``ids`` without those at the end that were waiting for the rest of a character. vLLM would
    begin in its middle, and its decoder does not find its way from there."""
    for waiting in range(min(len(ids), _LONGEST_CHARACTER + 1)):
        whole = ids[: len(ids) - waiting]
        asked = msgspec.json.encode({"model": stream.request["model"], "tokens": whole})
        async with engine.post("/detokenize", asked, request_id) as answer:
            text = msgspec.json.decode(await answer.read())["prompt"]
        if not text.endswith(_BROKEN):
            return whole
    if len(ids) <= _LONGEST_CHARACTER:
        return ()
    raise NotSupported("what was begun ends with what is no text, which vLLM cannot go on with")


def _ending(rest: Rest, prompt_tokens: int) -> list[bytes]:
    """What is left of a stream whose text is whole."""
    if not rest.stream.wants_usage or rest.begun.usage_shown:
        return [DONE]
    form = _Form(rest, prompt_tokens, rest.choice.tokens)
    names = ("prompt_tokens", "total_tokens", "completion_tokens")  # in vLLM's order
    usage = {**dict.fromkeys(names, 0), "prompt_tokens_details": {}}
    chunk = {"model": rest.stream.request["model"], "choices": [], "usage": usage}
    noted = NotedStream(rest.begun.fingerprint, (), goes_on=True)
    return [*map(event, noted.take(form.of(chunk))), DONE]


@dataclass(frozen=True, slots=True)
class _Form:
    """How chunks of vLLM's text completions become those of the stream: ``begun`` tokens of the
    answer are part of the prompt for vLLM, but not for the client."""

    rest: Rest
    prompt_tokens: int
    begun: int

    def of(self, chunk: dict[str, Any]) -> dict[str, Any]:
        head = self.rest.begun
        kind = "chat.completion.chunk" if self.rest.stream.is_chat else "text_completion"
        chunk = {
            "id": head.id,
            "object": kind,
            "created": head.created,
            **{name: chunk[name] for name in chunk if name not in ("id", "object", "created")},
        }
        if self.rest.stream.is_chat:
            chunk["choices"] = [_spoken(choice) for choice in chunk["choices"]]
        if chunk.get("usage"):
            self._count(chunk["usage"])
        return chunk

    def _count(self, usage: dict[str, Any]) -> None:
        """As of one answer, with the cached tokens that the client was told."""
        answered = int(usage["completion_tokens"]) + self.begun
        usage["prompt_tokens"] = self.prompt_tokens
        usage["completion_tokens"] = answered
        usage["total_tokens"] = self.prompt_tokens + answered
        if usage.get("prompt_tokens_details") is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.rest.begun.cached_tokens}


def _spoken(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of a text completion as one of a chat."""
    reason = choice.get("finish_reason")
    spoken = {
        "index": choice["index"],
        "delta": {"content": choice.get("text") or ""},
        "logprobs": None,
        "finish_reason": reason,
    }
    if reason is not None:
        spoken["stop_reason"] = choice.get("stop_reason")
    return {**spoken, "token_ids": choice.get("token_ids")}
