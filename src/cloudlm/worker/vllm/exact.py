"""Which streams of vLLM another replica can go on with exactly, and what vLLM is asked for them.

Exact is what depends on nothing but the tokens before it: greedy text of one choice. vLLM draws by
a generator that goes on from step to step and counts what was generated for its penalties; neither
can be put where it was, so such streams are none. Nor is what a request asks that is not known
here: whatever it is, a rest that only nearly fits is worse than an error. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

# Said of the rest of an answer as of its beginning.
_ALIKE = frozenset(
    (
        *("model", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p", "seed"),
        *("repetition_penalty", "logit_bias", "stop", "stop_token_ids", "ignore_eos"),
        *("skip_special_tokens", "priority", "cache_salt"),
    )
)
_COUNTED = frozenset(("max_tokens", "max_completion_tokens", "min_tokens"))
_WITHOUT_EFFECT = frozenset(
    ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "include_reasoning")
)
_OF_THE_PROMPT = {
    CHAT: frozenset(
        (
            *("messages", "add_generation_prompt", "continue_final_message"),
            *("add_special_tokens", "chat_template_kwargs"),
        )
    ),
    TEXT: frozenset(("prompt", "add_special_tokens")),
}
# What would hinder, if it were asked for; each with what asks for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none",),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "return_token_ids": (False,),
}
_MESSAGE_FIELDS = frozenset(("role", "content", "name"))
_TEXT_LIMIT = 16
"""How many tokens vLLM gives a completion that names no ``max_tokens``, as OpenAI's API does."""


@dataclass(frozen=True, slots=True)
class ExactStream:
    """A stream that can be gone on with: the route it was asked of, its body without nulls."""

    path: str
    request: Mapping[str, Any]

    @property
    def is_chat(self) -> bool:
        return self.path == CHAT

    @property
    def stops(self) -> tuple[str, ...]:
        stop = self.request.get("stop") or ()
        return (stop,) if isinstance(stop, str) else tuple(stop)

    @property
    def wants_usage(self) -> bool:
        return (self.request.get("stream_options") or {}).get("include_usage") is True

    def beginning(self) -> dict[str, Any]:
        """What vLLM is asked first."""
        return {**self.request, **self._told()}

    def tokenising(self) -> dict[str, Any] | None:
        """What ``/tokenize`` is asked for the prompt's tokens; None if the request has them."""
        if not self.is_chat and not isinstance(self.request["prompt"], str):
            return None
        names = ("model", *_OF_THE_PROMPT[self.path])
        return {name: self.request[name] for name in names if name in self.request}

    def limit(self, prompt_tokens: int, context: int) -> int:
        """How many tokens the whole answer has at most."""
        room = context - prompt_tokens
        asked = self.request.get("max_tokens", None if self.is_chat else _TEXT_LIMIT)
        if self.is_chat:
            asked = self.request.get("max_completion_tokens", asked)
        return room if asked is None else min(asked, room)

    def rest(self, prompt: Sequence[int], begun: Sequence[int], left: int) -> dict[str, Any]:
        """What vLLM is asked for the ``left`` tokens after ``begun``, of ``/v1/completions``."""
        body = {name: value for name, value in self.request.items() if name in _ALIKE}
        least = self.request.get("min_tokens", 0) - len(begun)
        if least > 0:
            body["min_tokens"] = least
        return {**body, "prompt": [*prompt, *begun], "max_tokens": left, **self._told()}

    def _told(self) -> dict[str, Any]:
        """With stop strings left in, every token's text comes with its token, and what is to be
        held back can be held back here, by whole tokens."""
        told: dict[str, Any] = {"return_token_ids": True}
        if self.stops:
            told["include_stop_str_in_output"] = True
        return told


def exact_stream(path: str, request: Mapping[str, Any], *, parses: bool) -> ExactStream | None:
    """None if the stream that is asked for cannot be gone on with exactly, or is none. ``parses``:
    vLLM reads reasoning or tool calls out of what a chat model writes."""
    said = {name: value for name, value in request.items() if value is not None}
    if path not in _OF_THE_PROMPT or said.get("stream") is not True:
        return None
    if path == CHAT and parses:
        return None
    if not all(_is_plain(path, name, value) for name, value in said.items()):
        return None
    plain_prompt = _plain_messages if path == CHAT else _plain_text
    if not (_is_greedy(said) and _stops_are_plain(said) and plain_prompt(said)):
        return None
    return ExactStream(path, said)


def prompt_check(prompt: Sequence[int]) -> int:
    """A number of 63 bits by which another replica sees that it has the same prompt."""
    digest = hashlib.sha256(repr(list(prompt)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _is_plain(path: str, name: str, value: Any) -> bool:
    if name in _NEUTRAL:
        return any(type(value) is type(one) and value == one for one in _NEUTRAL[name])
    if name in _COUNTED:
        return type(value) is int and value >= 0
    return name in _ALIKE or name in _WITHOUT_EFFECT or name in _OF_THE_PROMPT[path]


def _is_greedy(said: Mapping[str, Any]) -> bool:
    """It must be asked for: without it, vLLM draws."""
    temperature = said.get("temperature")
    return type(temperature) in (int, float) and temperature == 0


def _stops_are_plain(said: Mapping[str, Any]) -> bool:
    """With stop strings left in the text, so would be what else ends an answer, if it is seen."""
    stop = said.get("stop")
    if not stop:
        return stop is None or stop in ("", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        return False
    hidden = said.get("skip_special_tokens", True) is True
    return hidden and not said.get("stop_token_ids") and not said.get("min_tokens")


def _plain_messages(said: Mapping[str, Any]) -> bool:
    messages = said.get("messages")
    return isinstance(messages, list) and all(_is_plain_message(one) for one in messages)


def _is_plain_message(message: Any) -> bool:
    if not isinstance(message, dict) or not _MESSAGE_FIELDS.issuperset(message):
        return False
    content = message.get("content")
    parts = content if isinstance(content, list) else ()
    return isinstance(content, str | list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in parts
    )


def _plain_text(said: Mapping[str, Any]) -> bool:
    prompt = said.get("prompt")
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, list) and bool(prompt) and all(type(one) is int for one in prompt)
