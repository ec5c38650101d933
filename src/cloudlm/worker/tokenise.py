"""Text to token ids, bounded and safe. Called in a thread: a long text takes its time.

Two dangers are met here. A huge text is not tokenised to its end only to learn that it is too long:
its beginning tells. And control tokens inside what people wrote (``<|im_end|>`` in a message) stay
plain text: before rendering they are replaced by marks, which afterwards become the characters that
were meant, never the control token, so that nobody can forge a turn of the conversation.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cloudlm.core.chat import Message
from cloudlm.core.errors import ContextLengthExceeded
from cloudlm.worker.serving import Tokenizer

_HEAD_CHARACTERS_PER_TOKEN = 8
_SHORT_CHARACTERS = 32_768  # up to here the error names the exact number of tokens
_SLACK_TOKENS = 64


def encode(
    tokenizer: Tokenizer,
    text: str,
    max_model_len: int,
    *,
    add_special_tokens: bool,
    param: str,
) -> tuple[int, ...]:
    """The token ids of ``text``. Raises ContextLengthExceeded early for a text whose beginning
    alone fills the context."""
    head = max(max_model_len * _HEAD_CHARACTERS_PER_TOKEN, _SHORT_CHARACTERS)
    if len(text) > head:
        count = len(tokenizer.encode(text[:head], add_special_tokens=add_special_tokens))
        if count > max_model_len + _SLACK_TOKENS:
            raise _too_long(count, max_model_len, param)
    return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def _too_long(at_least: int, max_model_len: int, param: str) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"the prompt has at least {at_least} tokens, but this model's context is {max_model_len} "
        "tokens for prompt and answer together; shorten the prompt",
        param=param,
    )


@dataclass(frozen=True, slots=True)
class Defused:
    """Messages and tools without control tokens; ``marks`` says which text each mark stands
    for."""

    messages: tuple[Message, ...]
    marks: dict[str, str]
    tools: tuple[Mapping[str, Any], ...] = ()


def control_pattern(special_tokens: Sequence[str]) -> re.Pattern[str] | None:
    """Finds any control token in a text; None if the model has none."""
    longest_first = sorted({text for text in special_tokens if text}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def defuse(
    messages: Sequence[Message],
    control: re.Pattern[str] | None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Defused:
    """Replace control tokens in what the caller wrote, wherever it stands in messages and tools,
    by marks that nobody can foresee."""
    nonce = f"{secrets.randbelow(10**18):018d}"
    names: dict[str, str] = {}

    def mark(match: re.Match[str]) -> str:
        return names.setdefault(match[0], f"\ue000{nonce}{len(names)}\ue001")

    written = (text for m in messages for text in _texts_of(m))
    in_tools = (text for tool in tools for text in _texts_in(tool))
    if control is None or not (
        any(map(control.search, written)) or any(map(control.search, in_tools))
    ):
        return Defused(tuple(messages), {}, tuple(tools))
    found = control

    def clean(text: str) -> str:
        return found.sub(mark, text)

    safe = tuple(_cleaned(message, clean) for message in messages)
    safe_tools = tuple(_mapped(tool, clean) for tool in tools)
    return Defused(safe, {name: text for text, name in names.items()}, safe_tools)


def _texts_of(message: Message) -> Iterator[str]:
    yield from (message.content, message.name or "", message.tool_call_id or "")
    yield message.reasoning or ""
    for call in message.tool_calls:
        yield call.id
        yield from _texts_in(call.arguments)


def _texts_in(value: Any) -> Iterator[str]:
    """All texts in a JSON value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_in(inner)


def _cleaned(message: Message, clean: Callable[[str], str]) -> Message:
    return replace(
        message,
        content=clean(message.content),
        name=message.name and clean(message.name),
        tool_call_id=message.tool_call_id and clean(message.tool_call_id),
        reasoning=message.reasoning and clean(message.reasoning),
        tool_calls=tuple(
            replace(call, id=clean(call.id), arguments=_mapped(call.arguments, clean))
            for call in message.tool_calls
        ),
    )


def _mapped(value: Any, clean: Callable[[str], str]) -> Any:
    """A JSON value with every text in it cleaned."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {clean(key): _mapped(inner, clean) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mapped(inner, clean) for inner in value]
    return value


def restore(text: str, marks: dict[str, str]) -> str:
    """The text with every mark replaced by what it stands for."""
    if not marks:
        return text
    return re.sub("|".join(map(re.escape, marks)), lambda match: marks[match[0]], text)


def encode_rendered(
    tokenizer: Tokenizer, text: str, marks: dict[str, str], max_model_len: int
) -> tuple[int, ...]:
    """The token ids of a rendered conversation; the template has put the control tokens in."""
    if not marks:
        return encode(tokenizer, text, max_model_len, add_special_tokens=False, param="messages")
    plain = {mark: _as_plain(tokenizer, meant) for mark, meant in marks.items()}
    token_ids: list[int] = []
    for piece in re.split("(" + "|".join(map(re.escape, marks)) + ")", text):
        if piece in plain:
            token_ids.extend(plain[piece])
        elif piece:
            token_ids.extend(
                encode(tokenizer, piece, max_model_len, add_special_tokens=False, param="messages")
            )
        if len(token_ids) > max_model_len + _SLACK_TOKENS:
            raise _too_long(len(token_ids), max_model_len, "messages")
    return tuple(token_ids)


def _as_plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a control token's text one character at a time, so that it is never recognised."""
    return [
        token_id
        for character in text
        for token_id in tokenizer.encode(character, add_special_tokens=False)
    ]
