"""Answers worth keeping: which requests may be answered again, what makes two of them the same, and
a bounded store of answers.

Two requests are the same when the same tenant asks the same version the same thing in the same
form. That is said by a key of 32 bytes that only this installation can make, another one for every
tenant, so that no entry can be found, or guessed, across tenants. Pure: gets facts and ``now``.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from cloudlm.core.chat import Usage
from cloudlm.gateway.holdings import Holdings, Place

ENTRY_BYTES = 512
"""What an entry costs besides its body: its key, its place, its small fields."""
LARGEST_SHARE = 8
"""One answer may take this part of the store, 1/8, so that a few large ones cannot empty it."""
_WITHOUT_EFFECT = frozenset({"priority"})
_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer as it was sent, a stream's events all together. ``usage`` is what it cost
    when it was computed, ``tag`` its entity tag with quotes."""

    body: bytes
    content_type: str
    usage: Usage
    tag: str


def deterministic(body: dict[str, Any]) -> bool:
    """Whether a generation (in OpenAI's form) gives the same answer each time: it is greedy or its
    draws are seeded. Whoever gives neither wants a new answer each time."""
    temperature = body.get("temperature")
    greedy = type(temperature) in (int, float) and temperature == 0
    return greedy or type(body.get("seed")) is int


def canonical(body: dict[str, Any]) -> bytes:
    """One form for all ways to write the same request.

    The order of the fields, blanks, escapes, and 0 or 0.0 make no difference, nor does what has no
    effect on the answer. Inside the fields all is kept as it was written: a chat template shows a
    tool's schema to the model in the order it was given.
    """
    fields = sorted((k, v) for k, v in body.items() if k not in _WITHOUT_EFFECT)
    return _encoder.encode({name: _number(value) for name, value in fields})


def _number(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


def question_key(tenant_key: bytes, parts: Iterable[bytes]) -> bytes:
    """The key of a question: HMAC-SHA256 over its parts, each with its length, so that what belongs
    to one can never be read as the next."""
    mac = hmac.new(tenant_key, digestmod=hashlib.sha256)
    for part in parts:
        mac.update(len(part).to_bytes(8, "big"))
        mac.update(part)
    return mac.digest()


def entity_tag(key: bytes, body: bytes) -> str:
    """The strong entity tag of an answer: another one for other bytes or another question."""
    return f'"{hashlib.blake2b(body, digest_size=16, key=key).hexdigest()}"'


def matches(condition: str, tag: str) -> bool:
    """Whether an ``If-None-Match`` names ``tag`` (RFC 9110, 13.1.2: compared weakly)."""
    named = [one.strip() for one in condition.split(",")]
    return "*" in named or tag in (one.removeprefix("W/") for one in named)


class AnswerStore:
    """Answers by place in ``Holdings``: at most ``max_bytes`` together, each for ``ttl_s``."""

    def __init__(
        self, max_bytes: int, ttl_s: float, weights: Mapping[str, float] | None = None
    ) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._holdings: Holdings[Answer] = Holdings(max_bytes, weights or {})

    @property
    def size_bytes(self) -> int:
        """What is held."""
        return self._holdings.size_bytes

    @property
    def largest_bytes(self) -> int:
        """The largest body that is kept."""
        return max(self._max_bytes // LARGEST_SHARE - ENTRY_BYTES, 0)

    def get(self, place: Place, now: float) -> Answer | None:
        """The answer at ``place`` that is still good at ``now``."""
        return self._holdings.get(place, now)

    def put(self, place: Place, answer: Answer, now: float, ttl_s: float | None = None) -> bool:
        """Keep an answer from ``now`` on, for ``ttl_s`` if that is less than usual; False if it is
        too large."""
        if len(answer.body) > self.largest_bytes:
            return False
        until = now + (self._ttl_s if ttl_s is None else min(ttl_s, self._ttl_s))
        self._holdings.put(place, answer, len(answer.body) + ENTRY_BYTES, until, now)
        return True
