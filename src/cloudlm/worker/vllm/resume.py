"""The internal dialect (``worker.internal``) over vLLM's completions: token ids in and out.

What was sent already becomes part of the prompt, and vLLM goes on from there. That is exact where
the rest of an answer depends on nothing but the tokens before it: greedy answers. What vLLM keeps
besides them, it cannot be given back: its random numbers, which outputs count for the presence and
frequency penalties, how far a constraint is followed, a stop string that may have begun. Resuming
such an answer is refused rather than done wrongly.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import msgspec

from cloudlm.core.chat import Constraint, ConstraintKind, Sampling, Usage
from cloudlm.core.errors import ContextLengthExceeded, InvalidRequest, NotSupported, UpstreamFailed
from cloudlm.worker.internal import InternalRequest
from cloudlm.worker.limits import settle
from cloudlm.worker.stream import DONE, event
from cloudlm.worker.vllm.engine import VllmEngine
from cloudlm.worker.vllm.events import chunks_of


async def continue_answer(
    engine: VllmEngine, model: str, asked: InternalRequest, request_id: str
) -> AsyncGenerator[bytes, None]:
    """The events of the answer. Raises NotSupported (it cannot be resumed exactly),
    InvalidRequest, ContextLengthExceeded, and what ``VllmEngine.post`` raises."""
    prompt = await _prompt_token_ids(engine, model, asked, request_id)
    sampling = settle(asked.sampling, len(prompt), engine.info, "prompt")
    assert sampling.max_tokens is not None
    done = len(asked.output_token_ids)
    if done:
        check_resumable(sampling)
    if done > sampling.max_tokens:
        raise InvalidRequest(
            f"output_token_ids holds {done} tokens, more than max_tokens = {sampling.max_tokens}",
            param="output_token_ids",
        )
    yield event({"prompt_token_ids": prompt, "seed": sampling.seed})
    if done == sampling.max_tokens:
        yield event(_step((), "", "length", None, len(prompt), 0))
        yield DONE
        return
    body = completion_body(model, prompt, asked, sampling)
    async with (
        engine.post("/v1/completions", msgspec.json.encode(body), request_id) as answer,
        contextlib.aclosing(chunks_of(answer)) as chunks,
    ):
        async for data in _steps(chunks, sampling, len(prompt)):
            yield data


def check_resumable(sampling: Sampling) -> None:
    """Raise NotSupported if the rest of such an answer depends on more than its tokens."""
    hindrances = {
        "temperature above 0": sampling.temperature > 0,
        "presence_penalty": sampling.presence_penalty != 0,
        "frequency_penalty": sampling.frequency_penalty != 0,
        "a constraint": sampling.constraint is not None,
        "stop strings": bool(sampling.stop),
    }
    found = [name for name, hinders in hindrances.items() if hinders]
    if found:
        raise NotSupported(
            f"vLLM cannot resume an answer with {', '.join(found)} exactly; only greedy answers "
            "without them can be resumed on this engine"
        )


def completion_body(
    model: str, prompt: tuple[int, ...], asked: InternalRequest, sampling: Sampling
) -> dict[str, Any]:
    """The request for vLLM. ``sampling`` is settled."""
    assert sampling.max_tokens is not None
    body: dict[str, Any] = {
        "model": model,
        "prompt": [*prompt, *asked.output_token_ids],
        "max_tokens": sampling.max_tokens - len(asked.output_token_ids),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()} or None,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "logprobs": sampling.logprobs,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "priority": -asked.share.priority,
    }
    if sampling.seed is not None:  # each choice is drawn for itself
        body["seed"] = (sampling.seed + asked.index) % (1 << 63)
    if asked.cache_salt:
        body["cache_salt"] = asked.cache_salt
    if sampling.constraint is not None:
        body["structured_outputs"] = _structured(sampling.constraint)
    return body


def _structured(constraint: Constraint) -> dict[str, Any]:
    names = {
        ConstraintKind.JSON_SCHEMA: "json",
        ConstraintKind.REGEX: "regex",
        ConstraintKind.CHOICE: "choice",
        ConstraintKind.GRAMMAR: "grammar",
    }
    plain = constraint.kind in (ConstraintKind.REGEX, ConstraintKind.GRAMMAR)
    return {names[constraint.kind]: constraint.text if plain else json.loads(constraint.text)}


async def _prompt_token_ids(
    engine: VllmEngine, model: str, asked: InternalRequest, request_id: str
) -> tuple[int, ...]:
    """The prompt as vLLM tokenises it."""
    if not isinstance(asked.prompt, str) and asked.messages is None:
        prompt = asked.prompt
    else:
        body: dict[str, Any] = {"model": model}
        if asked.messages is None:
            body["prompt"] = asked.prompt
        else:
            body["messages"] = [{"role": m.role, "content": m.content} for m in asked.messages]
        async with engine.post("/tokenize", msgspec.json.encode(body), request_id) as answer:
            prompt = tuple(msgspec.json.decode(await answer.read())["tokens"])
    if not prompt:
        raise InvalidRequest("the prompt has no tokens", param="prompt")
    if len(prompt) + len(asked.output_token_ids) > engine.info.max_model_len:
        raise ContextLengthExceeded(
            f"prompt and answer have {len(prompt) + len(asked.output_token_ids)} tokens, but this "
            f"model's context is {engine.info.max_model_len} tokens",
            param="prompt",
        )
    return prompt


async def _steps(
    chunks: AsyncIterator[dict[str, Any] | None], sampling: Sampling, prompt_tokens: int
) -> AsyncGenerator[bytes, None]:
    generated = 0
    cached = 0
    async for chunk in chunks:
        if chunk is None:
            yield DONE
            return
        if "error" in chunk:
            raise UpstreamFailed("vLLM gave the answer up")
        details = (chunk.get("usage") or {}).get("prompt_tokens_details") or {}
        cached = max(cached, int(details.get("cached_tokens") or 0))
        for choice in chunk.get("choices", ()):
            token_ids = tuple(choice.get("token_ids") or ())
            generated += len(token_ids)
            logprobs = _logprobs(choice) if sampling.logprobs is not None else None
            step = _step(
                token_ids,
                choice.get("text") or "",
                choice.get("finish_reason"),
                logprobs,
                prompt_tokens,
                generated,
                cached,
            )
            yield event(step)
    raise UpstreamFailed("vLLM ended its answer too early")


def _step(
    token_ids: tuple[int, ...],
    text: str,
    finish_reason: str | None,
    logprobs: list[dict[str, Any]] | None,
    prompt_tokens: int,
    generated: int,
    cached: int = 0,
) -> dict[str, Any]:
    return {
        "token_ids": token_ids,
        "text": text,
        "finish_reason": finish_reason,
        "logprobs": logprobs,
        "usage": Usage(prompt_tokens, generated, cached).body(),
    }


def _logprobs(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """vLLM's lists as entries of the dialect; its tokens read ``token_id:42``."""
    given = choice.get("logprobs") or {}
    tops = given.get("top_logprobs") or [{} for _ in given.get("tokens", ())]
    return [
        {
            "token_id": _token_id(token),
            "logprob": logprob,
            "top": [[_token_id(other), value] for other, value in (top or {}).items()],
        }
        for token, logprob, top in zip(
            given.get("tokens", ()), given.get("token_logprobs", ()), tops, strict=False
        )
    ]


def _token_id(text: str) -> int:
    return int(text.removeprefix("token_id:"))
