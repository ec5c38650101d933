"""Texts in, texts out: what the prediction protocols make of a language model.

They have no words for prompts and sampling of their own, so all use the same: a text is a prompt as
it is, and the parameters are those of ``/v1/completions``. Shared by the dialects that predict;
must not know any of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from cloudlm.core.errors import InvalidRequest, UpstreamFailed
from cloudlm.core.fields import Fields, kind_of, shown
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.base import Asker, WholeRendering
from cloudlm.gateway.dialects.heard import Heard, choices_of, copied, renamed
from cloudlm.gateway.dialects.openai import Call, Operation

DEFAULT_MAX_TOKENS = 100
PARAMETERS = (
    "frequency_penalty",
    "ignore_eos",
    "max_tokens",
    "min_p",
    "presence_penalty",
    "priority",
    "repetition_penalty",
    "seed",
    "stop",
    "temperature",
    "top_k",
    "top_p",
)

Say = Callable[[list[Heard]], Any]
SayVectors = Callable[[list[Any]], Any]


def parameters(value: Any, param: str) -> dict[str, Any]:
    """The sampling parameters of a request, by OpenAI's names. ``max_new_tokens`` is another name
    of ``max_tokens``. Raises UnprocessableRequest for what is none of them."""
    fields = Fields({} if value is None else value, param, path=f"{param}.")
    found = {"max_tokens": DEFAULT_MAX_TOKENS}
    found |= copied(fields, {"max_new_tokens": "max_tokens"})
    found |= copied(fields, {name: name for name in PARAMETERS})
    fields.end()
    return found


def texts_call(
    model: str, prompts: list[Any], sampling: Mapping[str, Any], asker: Asker, say: Say, param: str
) -> Call:
    """A call that continues each prompt. ``param`` is where the prompts stand in the request."""
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            where = f"{param}[{number}]"
            raise InvalidRequest(f"{where} must be a text, not {kind_of(prompt)}", param=where)
    if not prompts:
        raise InvalidRequest(f"{param} must hold at least one text", param=param)
    body = {"model": model, "prompt": prompts, **sampling}
    with renamed({"prompt": param}):
        call = openai.parse_body(Operation.COMPLETION, body, asker.salted, may_lead=asker.may_lead)
    made = functools.partial(_texts, say, len(prompts))
    return replace(call, translate=lambda _: WholeRendering(made))


def chat_call(
    model: str, messages: Any, sampling: Mapping[str, Any], asker: Asker, say: Say
) -> Call:
    """A call that answers a conversation."""
    body = {"model": model, "messages": messages, **sampling}
    call = openai.parse_body(Operation.CHAT, body, asker.salted, may_lead=asker.may_lead)
    made = functools.partial(_texts, say, 1)
    return replace(call, translate=lambda _: WholeRendering(made))


def vectors_call(model: str, texts: list[Any], asker: Asker, say: SayVectors, param: str) -> Call:
    """A call that embeds each text."""
    with renamed({"input": param}):
        body = {"model": model, "input": texts}
        call = openai.parse_body(Operation.EMBEDDING, body, asker.salted)
    made = functools.partial(_vectors, say, len(texts))
    return replace(call, translate=lambda _: WholeRendering(made))


def wants_vectors(task: Any, param: str) -> bool:
    """Whether ``task`` asks for embeddings rather than for text."""
    if task not in (None, "generate", "embed"):
        raise InvalidRequest(f"{param} must be generate or embed, not {shown(task)}", param=param)
    return bool(task == "embed")


def _texts(say: Say, count: int, body: dict[str, Any]) -> Any:
    choices = choices_of(body)
    if len(choices) != count:
        raise UpstreamFailed(f"a replica sent {len(choices)} answers to {count} inputs")
    return say(choices)


def _vectors(say: SayVectors, count: int, body: dict[str, Any]) -> Any:
    vectors = openai.vectors_of(body)
    if len(vectors) != count:
        raise UpstreamFailed(f"a replica sent {len(vectors)} vectors to {count} inputs")
    return say(vectors)
