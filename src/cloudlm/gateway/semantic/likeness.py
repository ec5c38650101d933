"""The semantic cache: finds the answer of a question that means the same as this one.

Only the last turn may differ, and only in its words: tenant, version, everything said before, tools
and every parameter must be equal, which the key of a group says. Within a group an embedder
proposes, ``meaning`` refuses, and a calibration says how near is near enough. Must not keep
answers; it knows where they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cloudlm.core.clock import Clock
from cloudlm.gateway import cache
from cloudlm.gateway.account import Exchange
from cloudlm.gateway.holdings import Place
from cloudlm.gateway.semantic.calibration import Calibration
from cloudlm.gateway.semantic.index import Index
from cloudlm.gateway.semantic.meaning import Meaning, difference, read
from cloudlm.gateway.semantic.vectors import built_in

BUILT_IN = "built-in"
MAX_CHARACTERS = 1000
"""Longer turns say too much for a few rules to read."""
_LOOKED_AT = 8


class Embedder(Protocol):
    """What makes vectors."""

    def identity(self) -> bytes | None:
        """Tells vectors that can be compared from others; None while there are none."""
        ...

    async def vector(self, text: str, meaning: Meaning, exchange: Exchange) -> Any | None:
        """The unit vector of a text, None if it cannot be had in time."""
        ...


class BuiltInEmbedder:
    """See ``vectors``."""

    def identity(self) -> bytes | None:
        return BUILT_IN.encode()

    async def vector(self, text: str, meaning: Meaning, exchange: Exchange) -> Any | None:
        return built_in(meaning)


@dataclass(slots=True)
class LastTurn:
    """What a request asks last, within its group. ``vector`` is None if there is none."""

    group: bytes
    meaning: Meaning
    vector: Any | None = None


class Likeness:
    """See the module; ``collect`` makes it a part of the gateway's metrics."""

    def __init__(
        self,
        calibration: Calibration,
        threshold: float,
        embedder: Embedder,
        index: Index,
        clock: Clock,
    ) -> None:
        self._calibration = calibration
        self._threshold = max(calibration.threshold, threshold)
        self._embedder = embedder
        self._index = index
        self._clock = clock
        self._results: Counter[str] = Counter()

    async def turn(
        self,
        body: Mapping[str, Any],
        key: Callable[[Iterable[bytes]], bytes],
        exchange: Exchange,
    ) -> LastTurn | None:
        """The last turn of a chat request in OpenAI's form. ``key`` makes the tenant's key of
        parts that do not hold the body. None if there is no text to compare, or no vector."""
        text = _last_text(body)
        identity = self._embedder.identity()
        if text is None or identity is None:
            self._results["no text" if text is None else "no embedder"] += 1
            return None
        before = [*body["messages"][:-1], {**body["messages"][-1], "content": None}]
        rest = cache.canonical({**body, "messages": before})
        meaning = read(text)
        vector = await self._embedder.vector(text, meaning, exchange)
        if vector is None:
            self._results["no embedder"] += 1
            return None
        return LastTurn(key((b"semantic", identity, rest)), meaning, vector)

    def find(self, turn: LastTurn) -> Place | None:
        """Where the answer is of a question that means the same."""
        now = self._clock.monotonic()
        why = "nothing like it"
        near = self._index.near(turn.group, turn.vector, self._threshold, now)
        for one in islice(near, _LOOKED_AT):
            same_words = self._calibration.same_words
            differs = difference(turn.meaning, one.meaning, same_words=same_words)
            if differs is None:
                return one.place
            why = differs
        self._results[why] += 1
        return None

    def found(self, place: Place, answered: bool) -> None:
        """Whether the answer was still there."""
        self._results["hit" if answered else "answer gone"] += 1
        if not answered:
            self._index.drop(place)

    def keep(self, turn: LastTurn, place: Place) -> None:
        """The question has its answer at ``place``."""
        now = self._clock.monotonic()
        self._index.add(turn.group, place, turn.vector, turn.meaning, now)

    def collect(self) -> Iterator[Metric]:
        """What the calibration promised and what became of look-ups; for the registry."""
        known = self._calibration
        for name, doc, value in (
            ("threshold", "Likeness from which on a question may be the same.", self._threshold),
            ("false_hit_budget", "The false hits that were allowed.", known.budget),
            ("false_hit_rate", "False hits per hard pair in calibration.", known.false_hit_rate),
            ("false_hit_rate_low", "Lower end of its 95 % interval.", known.false_hit_low),
            ("false_hit_rate_high", "Upper end of its 95 % interval.", known.false_hit_high),
            ("index_bytes", "Memory of known questions.", self._index.size_bytes),
        ):
            yield GaugeMetricFamily(f"cloudlm_gateway_semantic_{name}", doc, value=value)
        lookups = CounterMetricFamily(
            "cloudlm_gateway_semantic_lookups",
            "Questions not known word for word, by what came of them; guards by name.",
            labels=["result"],
        )
        for result, count in self._results.items():
            lookups.add_metric([result], count)
        yield lookups


def _last_text(body: Mapping[str, Any]) -> str | None:
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "user":
        return None
    text = last.get("content")
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_CHARACTERS:
        return None
    return text
