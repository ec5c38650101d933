"""Requests as the simulator knows them, and traffic that is drawn rather than recorded.

Arrivals: Poisson, gamma with a stated coefficient of variation (burstiness beyond Poisson's 1, as
BurstGPT's measurements have it), and diurnal (a Poisson process whose rate follows a day, by
thinning: Lewis and Shedler, 1979). Beginnings of prompts: ``PATTERNS``. Everything is drawn from
the generator that is passed in. Must not know replicas or policies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from cloudlm.core.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request at ``at`` seconds. ``blocks`` name the beginnings of its prompt, each
    ``block_tokens`` long: an equal number is an equal beginning. Empty: it shares none."""

    at: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0
    tenant: str = "default"
    session: bytes = b""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of drawn requests: log-normal with this mean and coefficient of variation."""

    mean: float
    cv: float = 1.0

    def draw(self, chance: Random) -> int:
        """At least 1 token."""
        if self.cv <= 0:
            return max(1, round(self.mean))
        spread = math.log(1.0 + self.cv * self.cv)
        return max(1, round(chance.lognormvariate(math.log(self.mean) - spread / 2, spread**0.5)))


def poisson(chance: Random, rate: float, duration_s: float) -> Iterator[float]:
    """Moments of independent requests, ``rate`` a second."""
    return gamma(chance, rate, 1.0, duration_s)


def gamma(chance: Random, rate: float, cv: float, duration_s: float) -> Iterator[float]:
    """Moments whose distances have this coefficient of variation; 1 is Poisson."""
    if rate <= 0 or cv <= 0:
        raise InvalidRequest(f"traffic needs a rate and cv above 0, not {rate:g} and {cv:g}")
    shape = 1.0 / (cv * cv)
    scale = 1.0 / (rate * shape)
    now = chance.gammavariate(shape, scale)
    while now < duration_s:
        yield now
        now += chance.gammavariate(shape, scale)


def diurnal(
    chance: Random, rate: float, swing: float, period_s: float, duration_s: float
) -> Iterator[float]:
    """Moments whose rate swings around ``rate`` by the share ``swing`` once in ``period_s``; it
    begins at the lowest."""
    if not 0 <= swing <= 1 or period_s <= 0:
        raise InvalidRequest(
            f"diurnal traffic needs a swing from 0 to 1 and a period_s above 0, not {swing:g} and "
            f"{period_s:g}"
        )
    most = rate * (1.0 + swing)
    for at in gamma(chance, most, 1.0, duration_s):
        wanted = rate * (1.0 - swing * math.cos(2.0 * math.pi * at / period_s))
        if chance.random() * most < wanted:
            yield at


class Prefixes:
    """Draws beginnings of prompts. Subclasses are the patterns; ``next`` gives the blocks of a
    request and its session's name."""

    def __init__(self, chance: Random, block_tokens: int) -> None:
        self.chance = chance
        self.block_tokens = block_tokens
        self._fresh = 0

    def fresh(self, count: int) -> tuple[int, ...]:
        """So many blocks that nobody has had."""
        first = self._fresh
        self._fresh += count
        return tuple(range(first, first + count))

    def next(self, prompt_tokens: int) -> tuple[tuple[int, ...], bytes]:
        raise NotImplementedError


class Apart(Prefixes):
    """Prompts that have nothing in common."""

    def next(self, prompt_tokens: int) -> tuple[tuple[int, ...], bytes]:
        return self.fresh(prompt_tokens // self.block_tokens), b""


class Hot(Prefixes):
    """One long beginning that ``share`` of the requests have: the adversary of cache-aware
    routing, because whoever knows it would get everything."""

    def __init__(
        self, chance: Random, block_tokens: int, tokens: int = 8192, share: float = 1.0
    ) -> None:
        super().__init__(chance, block_tokens)
        self._common = self.fresh(tokens // block_tokens)
        self._share = share

    def next(self, prompt_tokens: int) -> tuple[tuple[int, ...], bytes]:
        own = self.fresh(prompt_tokens // self.block_tokens)
        return (self._common + own if self.chance.random() < self._share else own), b""


class Popular(Prefixes):
    """``count`` beginnings of ``tokens`` each, asked for as Zipf has it (the n-th 1/n^``skew`` as
    often as the first): documents, system prompts, few-shot examples."""

    def __init__(
        self,
        chance: Random,
        block_tokens: int,
        count: int = 50,
        tokens: int = 4096,
        skew: float = 1.0,
    ) -> None:
        super().__init__(chance, block_tokens)
        self._known = [self.fresh(tokens // block_tokens) for _ in range(count)]
        self._weights = [1.0 / (rank + 1) ** skew for rank in range(count)]

    def next(self, prompt_tokens: int) -> tuple[tuple[int, ...], bytes]:
        (number,) = self.chance.choices(range(len(self._known)), self._weights)
        own = self.fresh(prompt_tokens // self.block_tokens)
        return self._known[number] + own, b""


class Conversations(Prefixes):
    """``count`` conversations go on side by side; each turn repeats all before it, and after about
    ``turns`` of them another begins."""

    def __init__(
        self, chance: Random, block_tokens: int, count: int = 200, turns: float = 6.0
    ) -> None:
        super().__init__(chance, block_tokens)
        self._talks: list[tuple[int, tuple[int, ...]]] = [(n, ()) for n in range(count)]
        self._begun = count
        self._turns = turns

    def next(self, prompt_tokens: int) -> tuple[tuple[int, ...], bytes]:
        place = self.chance.randrange(len(self._talks))
        name, blocks = self._talks[place]
        if blocks and self.chance.random() < 1.0 / self._turns:
            name, blocks = self._begun, ()
            self._begun += 1
        blocks += self.fresh(max(1, prompt_tokens // self.block_tokens))
        self._talks[place] = (name, blocks)
        return blocks, name.to_bytes(8)


PATTERNS: dict[str, type[Prefixes]] = {
    "none": Apart,
    "hot": Hot,
    "popular": Popular,
    "conversations": Conversations,
}


def drawn(
    moments: Iterator[float],
    chance: Random,
    prompt: Lengths,
    output: Lengths,
    prefixes: Prefixes | None = None,
    tenants: Sequence[str] = ("default",),
) -> Iterator[Arrival]:
    """Requests at these moments. ``prompt`` are the tokens beside what a beginning brings."""
    for at in moments:
        tokens = prompt.draw(chance)
        blocks: tuple[int, ...] = ()
        session = b""
        block_tokens = 0
        if prefixes is not None:
            block_tokens = prefixes.block_tokens
            blocks, session = prefixes.next(tokens)
            tokens = max(tokens, len(blocks) * block_tokens + 1)
        tenant = tenants[0] if len(tenants) == 1 else chance.choice(tenants)
        yield Arrival(at, tokens, output.draw(chance), blocks, block_tokens, tenant, session)


def quicker(arrivals: Iterator[Arrival], speed: float) -> Iterator[Arrival]:
    """The same requests, ``speed`` times as close together."""
    from dataclasses import replace

    for one in arrivals:
        yield replace(one, at=one.at / speed)
