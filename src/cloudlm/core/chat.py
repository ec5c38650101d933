"""What a generation request means: sampling parameters, messages, token events.

Validation lives in ``core.requests``; this file holds only the words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import msgspec


class FinishReason(StrEnum):
    """Why a choice ended; the values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class ConstraintKind(StrEnum):
    """How a constraint is written down."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must look like. ``text`` is a JSON schema, a regular expression, a JSON list
    of texts, or a context-free grammar in llguidance's dialect of Lark, as ``kind`` says."""

    kind: ConstraintKind
    text: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Defaults are OpenAI's; temperature 0 is greedy.

    ``top_k`` 0 means all tokens, ``min_p`` 0 means none removed. Penalties follow OpenAI
    (presence, frequency: subtracted from the logits of tokens generated so far) and Hugging Face
    (repetition: logits of tokens in prompt or output divided if positive, multiplied if negative).
    ``logprobs`` is the number of alternatives wanted per token, 0 for the chosen one alone,
    None for none. ``seed`` fixes the whole answer: the draw at each position depends on seed,
    choice index and position only. ``constraint`` leaves only tokens that follow it.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made in an earlier turn; ``arguments`` are decoded."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. ``parameters`` is the JSON schema of its arguments,
    ``body`` the tool as the caller wrote it, which is what chat templates show to the model."""

    name: str
    parameters: Mapping[str, Any]
    body: Mapping[str, Any]


class ToolChoice(StrEnum):
    """Whether the model may or must call a tool."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request. With ``choice`` REQUIRED, ``offered`` are those to choose from: all,
    or the one that was named. ``parallel`` allows several calls in one answer."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = ToolChoice.NONE
    named: str | None = None
    parallel: bool = True

    @property
    def offered(self) -> tuple[Tool, ...]:
        return tuple(tool for tool in self.tools if self.named in (None, tool.name))


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; ``content`` is plain text. An assistant's turn may hold tool
    calls and the reasoning before them, a tool's turn the id of the call that it answers."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """``include_usage``: one last chunk with the usage. ``continuous_usage_stats``: usage in every
    chunk (vLLM's extension; the gateway asks for it so that a broken stream is billed rightly)."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A validated ``/v1/chat/completions`` body."""

    model: str
    messages: tuple[Message, ...]
    sampling: Sampling
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    tool_use: ToolUse = ToolUse()


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A validated ``/v1/completions`` body; each prompt is a text or a list of token ids."""

    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    sampling: Sampling
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    echo: bool = False
    user: str | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A validated ``/v1/embeddings`` body; each input is a text or a list of token ids.
    ``dimensions`` None is all; ``base64`` asks for float32 numbers, little-endian, in base64."""

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None
    base64: bool = False
    user: str | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request; ``cached_tokens`` of the prompt were found in the prefix cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )

    def body(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
