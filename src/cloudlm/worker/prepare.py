"""From a request's bytes to sequences for the engine: parse, render, tokenise, check.

Everything that takes time for a large body runs in a thread of its own pool, so that the event loop
serves others meanwhile. Raises only errors of ``core.errors``; sends nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

from cloudlm.core.chat import (
    ChatRequest,
    CompletionRequest,
    Message,
    Sampling,
    Tool,
    ToolChoice,
    ToolUse,
)
from cloudlm.core.errors import InvalidRequest, Overloaded
from cloudlm.engine.api import GenerateRequest
from cloudlm.engine.intake import check_token_ids
from cloudlm.worker import tokenise
from cloudlm.worker.dialect import check_tools, constraint_of, opens_reasoning, reader_of
from cloudlm.worker.limits import settle
from cloudlm.worker.serving import Serving, new_id
from cloudlm.worker.sharing import Share
from cloudlm.worker.speech import PlainReader, Reader

P = ParamSpec("P")
T = TypeVar("T")
MAX_SEQUENCES = 128
INLINE_SIZE = 4096
MAX_PENDING = 128_000_000
_LONGEST_SALT = 128
_NO_TOOLS = ToolUse()


class Offload:
    """A few threads for work that would hold up the event loop. What runs and waits there may
    have ``max_pending`` characters or tokens altogether: more is refused, not hoarded."""

    def __init__(self, threads: int = 2, max_pending: int = MAX_PENDING) -> None:
        self._max_pending = max_pending
        self._pending = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="cloudlm-prepare")

    async def sized(self, size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do small work (``size`` characters or tokens) at once, so that it never queues behind
        somebody's huge prompt, and the rest in a thread. Raises Overloaded."""
        if size <= INLINE_SIZE:
            return work(*args, **kwargs)
        if self._pending and self._pending + size > self._max_pending:
            raise Overloaded(
                "too many large requests are being read; try again later", retry_after_s=1.0
            )
        loop = asyncio.get_running_loop()
        self._pending += size
        try:
            return await loop.run_in_executor(self._pool, lambda: work(*args, **kwargs))
        finally:
            self._pending -= size

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One API request, ready to run. ``requests`` holds ``choices_per_prompt`` sequences per
    prompt, prompt by prompt; their place is the choice's index. ``prompt_texts`` are for echo.
    ``make_reader`` makes what takes a choice's text apart. ``answer_id`` is the id that clients
    see, where it is not the request's own."""

    id: str
    requests: tuple[GenerateRequest, ...]
    choices_per_prompt: int
    prompt_texts: tuple[str, ...] = ()
    make_reader: Callable[[], Reader] = PlainReader
    answer_id: str = ""

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        """Length of each prompt, in tokens."""
        firsts = self.requests[:: self.choices_per_prompt]
        return tuple(len(request.prompt_token_ids) for request in firsts)


def cache_salt(body: Mapping[str, Any]) -> str:
    """``cache_salt``, vLLM's field: prompts share cached prefixes only under the same salt."""
    value = body.get("cache_salt")
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > _LONGEST_SALT:
        raise InvalidRequest(
            f"cache_salt must be a text of at most {_LONGEST_SALT} characters", param="cache_salt"
        )
    return value


async def render_messages(
    serving: Serving,
    offload: Offload,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    use: ToolUse = _NO_TOOLS,
) -> tuple[int, ...]:
    """The token ids of a conversation in the model's own format."""
    check_tools(serving.dialect, use)
    tools = use.tools if use.choice is not ToolChoice.NONE else ()
    token_ids, _ = await _render(
        serving, offload, messages, tools, add_generation_prompt=add_generation_prompt
    )
    return token_ids


async def _render(
    serving: Serving,
    offload: Offload,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    *,
    add_generation_prompt: bool,
) -> tuple[tuple[int, ...], str]:
    """The token ids and the text of a conversation in the model's own format."""
    size = sum(len(message.content) for message in messages)
    if tools or any(message.tool_calls for message in messages):
        size += INLINE_SIZE  # their size is not known, so it is a thread's work
    bodies = [tool.body for tool in tools]
    defused = await offload.sized(size, tokenise.defuse, messages, serving.control, bodies)
    text = await serving.renderer.render(
        defused.messages, add_generation_prompt=add_generation_prompt, tools=defused.tools
    )
    token_ids = await offload.sized(
        len(text),
        tokenise.encode_rendered,
        serving.tokenizer,
        text,
        defused.marks,
        serving.info.max_model_len,
    )
    return token_ids, text


async def prepare_chat(
    serving: Serving, offload: Offload, request: ChatRequest, salt: str, share: Share
) -> Prepared:
    """The sequences of a chat request. Raises InvalidRequest, ContextLengthExceeded."""
    adapter = serving.check_model(request.model)
    dialect, use = serving.dialect, request.tool_use
    check_tools(dialect, use)
    uses_tools = use.choice is not ToolChoice.NONE
    shown_tools = use.tools if uses_tools else ()
    token_ids, text = await _render(
        serving, offload, request.messages, shown_tools, add_generation_prompt=True
    )
    begun = opens_reasoning(dialect, text)
    sampling = replace(request.sampling, constraint=constraint_of(dialect, request, begun=begun))
    made = _sequences(
        serving,
        new_id("chatcmpl"),
        [token_ids],
        sampling,
        request.n,
        "messages",
        salt,
        share,
        adapter=adapter,
        shown_token_ids=dialect.shown_token_ids(tools=uses_tools),
    )
    made = await guided(serving, made)
    reader = reader_of(dialect, use, begun=begun)
    return Prepared(made[0].request_id, made, request.n, make_reader=reader)


async def guided(
    serving: Serving, requests: tuple[GenerateRequest, ...]
) -> tuple[GenerateRequest, ...]:
    """The requests with guides, if they are constrained. Raises what ``Engine.guide`` does."""
    constraint = requests[0].sampling.constraint
    if constraint is None:
        return requests
    return tuple(
        [
            replace(one, guide=await serving.engine.guide(constraint, one.output_token_ids))
            for one in requests
        ]
    )


async def prepare_completion(
    serving: Serving, offload: Offload, request: CompletionRequest, salt: str, share: Share
) -> Prepared:
    """The sequences of a completion request. Raises InvalidRequest, ContextLengthExceeded."""
    adapter = serving.check_model(request.model)
    if len(request.prompts) * request.n > MAX_SEQUENCES:
        raise InvalidRequest(
            f"{len(request.prompts)} prompts with n = {request.n} are more than {MAX_SEQUENCES} "
            "choices in one request",
            param="n",
        )
    size = sum(len(prompt) for prompt in request.prompts)
    prepared = await offload.sized(size, _completion, serving, request, salt, share, adapter)
    return replace(prepared, requests=await guided(serving, prepared.requests))


def _completion(
    serving: Serving, request: CompletionRequest, salt: str, share: Share, adapter: str
) -> Prepared:
    prompts = [prompt_token_ids(serving, prompt) for prompt in request.prompts]
    request_id = new_id("cmpl")
    made = _sequences(
        serving,
        request_id,
        prompts,
        request.sampling,
        request.n,
        "prompt",
        salt,
        share,
        prompt_logprobs=request.echo and request.sampling.logprobs is not None,
        adapter=adapter,
    )
    texts: tuple[str, ...] = ()
    if request.echo:
        texts = tuple(
            given if isinstance(given, str) else serving.tokenizer.decode(token_ids)
            for given, token_ids in zip(request.prompts, prompts, strict=True)
        )
    return Prepared(request_id, made, request.n, texts)


def prompt_token_ids(
    serving: Serving, prompt: str | tuple[int, ...], param: str = "prompt"
) -> tuple[int, ...]:
    """A prompt's token ids. Raises InvalidRequest for an empty one or ids beyond the vocabulary,
    naming the field ``param``."""
    if isinstance(prompt, str):
        token_ids = tokenise.encode(
            serving.tokenizer,
            prompt,
            serving.info.max_model_len,
            add_special_tokens=True,
            param=param,
        )
    else:
        token_ids = prompt
        check_token_ids(token_ids, serving.info.vocab_size, param)
    if not token_ids:
        raise InvalidRequest(f"the {param} is empty: it needs at least one token", param=param)
    return token_ids


def _sequences(
    serving: Serving,
    request_id: str,
    prompts: Sequence[tuple[int, ...]],
    sampling: Sampling,
    n: int,
    param: str,
    salt: str,
    share: Share,
    **more: Any,
) -> tuple[GenerateRequest, ...]:
    return tuple(
        GenerateRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling=settled,
            index=index,
            cache_salt=salt,
            tenant=share.tenant,
            priority=share.priority,
            weight=share.weight,
            **more,
        )
        for prompt in prompts
        for settled in [settle(sampling, len(prompt), serving.info, param)]
        for index in range(n)
    )
