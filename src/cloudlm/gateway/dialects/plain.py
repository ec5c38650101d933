"""The chat request that nearly every client sends, read by type in one step.

Checking each field in Python costs more than all else that is done with a request. Here the checks
are the type, and a compiled decoder makes them. What does not fit, by an unusual field or by a
fault, is for ``core.requests``, whose rules and error messages stand: this form must accept nothing
that they refuse. Must not do I/O.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from cloudlm.core.requests import (
    MAX_CHOICES,
    MAX_MESSAGES,
    MAX_NAME_CHARACTERS,
    MAX_STOP_CHARACTERS,
    MAX_TOKENS,
)

MAX_PLAIN_BYTES = 64 * 1024
"""Larger bodies hold more than a few texts; they are checked for floods first, elsewhere."""

_Tokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None | UnsetType
_Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)] | None | UnsetType


class PlainMessage(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A message that is nothing but text."""

    role: Literal["system", "user", "assistant"]
    content: str


class PlainStreamOptions(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """What a client wants to know of a stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class PlainChat(msgspec.Struct, forbid_unknown_fields=True):
    """A chat request without tools, constraints or log probabilities. Fields that were not given
    are UNSET and are not sent on."""

    model: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARACTERS)]
    messages: Annotated[list[PlainMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: _Tokens = UNSET
    max_completion_tokens: _Tokens = UNSET
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | UnsetType | None = UNSET
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | UnsetType | None = UNSET
    presence_penalty: _Penalty = UNSET
    frequency_penalty: _Penalty = UNSET
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | UnsetType | None = UNSET
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | UnsetType | None = UNSET
    stop: Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)] | UnsetType | None = (
        UNSET
    )
    user: Annotated[str, Meta(max_length=MAX_NAME_CHARACTERS)] | UnsetType | None = UNSET
    stream: bool | UnsetType | None = UNSET
    stream_options: PlainStreamOptions | UnsetType | None = UNSET
    cache_salt: str | UnsetType = UNSET


_decoder = msgspec.json.Decoder(PlainChat)
NO_OPTIONS = PlainStreamOptions()
_SHOWN = PlainStreamOptions(include_usage=True, continuous_usage_stats=True)


def read(raw: bytes) -> PlainChat | None:
    """The request, or None if it is not of this form (it may still be a good one)."""
    if len(raw) > MAX_PLAIN_BYTES:
        return None
    try:
        chat = _decoder.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    return chat if chat.stream is True or not chat.stream_options else None


def ask_for_usage(chat: PlainChat) -> None:
    """Have the replica state the usage in every chunk."""
    chat.stream_options = _SHOWN
