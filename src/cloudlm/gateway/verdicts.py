"""The words of limits: what a request asks for and what it is told. They also travel between the
processes of one gateway, so this module stays out of ``compiled``: compiled classes do not tell
their fields' types. Plain data; what is made for each request is a struct, which is made in C.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import msgspec

from cloudlm.core.access import Limits


class Kind(StrEnum):
    """What is limited."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    CONCURRENT = "concurrent"
    SPEND = "spend"


@dataclass(frozen=True, slots=True)
class Bound:
    """The limits of one holder. ``scope`` names it: ``key:…``, ``tenant:…``."""

    scope: str
    limits: Limits


class Lease(msgspec.Struct, frozen=True, array_like=True):
    """What one request holds of several scopes. ``slice`` and ``month`` say when it was counted;
    ``spend`` is in billionths of the currency."""

    id: str
    scopes: tuple[str, ...]
    tokens: int
    spend: int
    slice: int
    month: int


class Quota(msgspec.Struct, frozen=True, array_like=True):
    """One limit as clients are told of it; ``reset_s`` is when all of it is there again."""

    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """Which limit of whom was reached. ``retry_after_s`` is None if waiting does not help."""

    scope: str
    kind: Kind
    limit: float
    used: float
    retry_after_s: float | None


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """A lease or a refusal, and the tightest limit of each kind after it."""

    lease: Lease | None
    refusal: Refusal | None = None
    requests: Quota | None = None
    tokens: Quota | None = None
