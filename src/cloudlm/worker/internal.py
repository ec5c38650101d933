"""The internal dialect: ``POST /internal/v1/generate``, token ids in and out, with resume.

For the gateway, which continues a stream on another replica when the first one dies. The body:

    {"prompt_token_ids": [1, 2, …],      or "messages": [{"role", "content"}, …]
                                         or "prompt": "…"; exactly one of the three
     "output_token_ids": [7, 8, …],      tokens that were sent already; not sent again
     "sampling": {…},                    the fields of core.chat.Sampling; "seed" is needed to
                                         resume an answer that is drawn (temperature above 0);
                                         a constraint as in "response_format" or
                                         "structured_outputs"
     "index": 0,                         the choice's number, part of the draw
     "cache_salt": "…",                  keeps tenants' prefixes apart
     "priority": 0}                      lower goes first, as in vLLM

The answer is a stream of server-sent events:

    {"prompt_token_ids": [1, 2, …], "seed": 123}                        first, once
    {"token_ids": [9], "text": "…", "finish_reason": null, "logprobs": […] or null,
     "usage": {…}}                                                      per step
    [DONE]                                                              last

The last event before ``[DONE]`` has a ``finish_reason`` (``stop`` or ``length``). ``logprobs`` are
``{"token_id", "logprob", "top": [[id, logprob], …]}``. ``usage`` counts the prompt and the tokens
generated here, not those given in ``output_token_ids``. The answer resumed is token for token the
one that would have come. A failure is an ``{"error": …}`` event, and then no ``[DONE]``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from cloudlm.core.chat import Message, Sampling
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.requests import parse_chat, parse_completion, parse_sampling, token_ids
from cloudlm.engine.api import GenerateRequest, TokenEvent, TokenLogprob
from cloudlm.engine.intake import check_token_ids
from cloudlm.worker.generate import Numbered, Tally
from cloudlm.worker.limits import settle
from cloudlm.worker.logprobs import finite
from cloudlm.worker.prepare import (
    Offload,
    Prepared,
    cache_salt,
    guided,
    prompt_token_ids,
    render_messages,
)
from cloudlm.worker.serving import Serving, new_id
from cloudlm.worker.sharing import USUAL, Share, share_of
from cloudlm.worker.stream import DONE, event

FIELDS = (
    "prompt_token_ids",
    "messages",
    "prompt",
    "output_token_ids",
    "sampling",
    "index",
    "cache_salt",
    "priority",
)
_SOURCES = ("prompt_token_ids", "messages", "prompt")


@dataclass(frozen=True, slots=True)
class InternalRequest:
    """A validated body: either ``messages`` or ``prompt`` (a text or token ids) is given."""

    sampling: Sampling
    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] = ()
    output_token_ids: tuple[int, ...] = ()
    index: int = 0
    cache_salt: str = ""
    share: Share = USUAL


def parse_internal(body: Mapping[str, Any], headers: Mapping[str, str]) -> InternalRequest:
    """Read body and headers. Raises InvalidRequest with ``param``."""
    for name in body:
        if name not in FIELDS:
            raise InvalidRequest(
                f"unknown field {name[:60]!r}; known: {', '.join(FIELDS)}", param=name[:60]
            )
    sampling = body.get("sampling", {})
    if not isinstance(sampling, dict):
        raise InvalidRequest("sampling must be an object", param="sampling")
    index = body.get("index", 0)
    if type(index) is not int or not 0 <= index < 1_000_000:
        raise InvalidRequest("index must be a whole number from 0", param="index")
    outputs = token_ids(body.get("output_token_ids", []), "output_token_ids")
    parsed = parse_sampling(sampling)
    if outputs and parsed.temperature > 0 and parsed.seed is None:
        raise InvalidRequest(
            "sampling.seed is needed to resume a drawn answer: without it the rest would not "
            "belong to the beginning",
            param="sampling.seed",
        )
    messages, prompt = _prompt(body)
    share = share_of(headers, body)
    return InternalRequest(parsed, messages, prompt, outputs, index, cache_salt(body), share)


def _prompt(
    body: Mapping[str, Any],
) -> tuple[tuple[Message, ...] | None, str | tuple[int, ...]]:
    given = [name for name in _SOURCES if body.get(name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            f"exactly one of {', '.join(_SOURCES)} must be given, not {len(given)}", param="prompt"
        )
    if given[0] == "prompt_token_ids":
        return None, token_ids(body["prompt_token_ids"], "prompt_token_ids")
    if given[0] == "messages":
        return parse_chat({"model": "-", "messages": body["messages"]}).messages, ()
    if not isinstance(body["prompt"], str):
        raise InvalidRequest(
            "prompt must be a text; token ids go in prompt_token_ids", param="prompt"
        )
    return None, parse_completion({"model": "-", "prompt": body["prompt"]}).prompts[0]


async def prepare_internal(
    serving: Serving, offload: Offload, request: InternalRequest
) -> Prepared:
    """The one sequence. Raises InvalidRequest, ContextLengthExceeded."""
    if request.messages is not None:
        prompt = await render_messages(serving, offload, request.messages)
    else:
        size = len(request.prompt)
        prompt = await offload.sized(size, prompt_token_ids, serving, request.prompt)
    check_token_ids(request.output_token_ids, serving.info.vocab_size, "output_token_ids")
    sampling = settle(request.sampling, len(prompt), serving.info, "prompt")
    assert sampling.max_tokens is not None
    if len(request.output_token_ids) > sampling.max_tokens:
        raise InvalidRequest(
            f"output_token_ids holds {len(request.output_token_ids)} tokens, more than "
            f"max_tokens = {sampling.max_tokens}",
            param="output_token_ids",
        )
    made = GenerateRequest(
        request_id=new_id("gen"),
        prompt_token_ids=prompt,
        sampling=sampling,
        output_token_ids=request.output_token_ids,
        index=request.index,
        cache_salt=request.cache_salt,
        tenant=request.share.tenant,
        priority=request.share.priority,
        weight=request.share.weight,
    )
    return Prepared(made.request_id, await guided(serving, (made,)), 1)


async def stream_internal(
    prepared: Prepared, events: AsyncGenerator[Numbered, None]
) -> AsyncGenerator[bytes, None]:
    """The events of the answer, as the module's description has them."""
    request = prepared.requests[0]
    tally = Tally(prepared.prompt_tokens, 1)
    wants_logprobs = request.sampling.logprobs is not None
    head = {"prompt_token_ids": request.prompt_token_ids, "seed": request.sampling.seed}
    first = True
    async for number, one in events:
        if first:
            yield event(head)
            first = False
        tally.add(number, one)
        yield event(_step(one, wants_logprobs, tally))
    yield DONE


def _step(one: TokenEvent, wants_logprobs: bool, tally: Tally) -> dict[str, Any]:
    return {
        "token_ids": one.token_ids,
        "text": one.text,
        "finish_reason": one.finish_reason,
        "logprobs": [_entry(entry) for entry in one.logprobs] if wants_logprobs else None,
        "usage": tally.usage().body(),
    }


def _entry(entry: TokenLogprob) -> dict[str, Any]:
    top = [[token_id, finite(logprob)] for token_id, logprob in entry.top]
    return {"token_id": entry.token_id, "logprob": finite(entry.logprob), "top": top}
