"""Reads the traffic of a scenario: a recorded trace by path, or how it is to be drawn.

Must not read a trace before it is asked for its requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice, takewhile
from pathlib import Path
from random import Random
from typing import Any

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.fields import Fields
from cloudlm.sim.traces import READERS
from cloudlm.sim.traffic import (
    PATTERNS,
    Arrival,
    Lengths,
    Prefixes,
    diurnal,
    drawn,
    gamma,
    poisson,
    quicker,
)

DRAWN = ("poisson", "gamma", "diurnal")


def named(given: Fields, field: str, usual: str, known: Iterable[str]) -> str:
    """The value of a field that must be one of ``known``. Raises InvalidRequest."""
    name = given.text(field, usual)
    if name not in known:
        raise InvalidRequest(
            f"{given.param(field)} {name[:80]!r} is unknown; there are {', '.join(known)}",
            param=given.param(field),
        )
    return name


def read_traffic(body: dict[str, Any], folder: Path, seed: int) -> Callable[[], Iterator[Arrival]]:
    """What gives the requests, the same ones each time. Raises InvalidRequest."""
    given = Fields(body, "traffic", path="traffic.")
    source = given.text("source")
    speed = given.number("speed", 1.0, low=1e-6, high=1e6)
    most = given.integer("requests", 0, low=0)
    duration_s = given.number("duration_s", 0.0, low=0.0)
    if source in READERS:
        trace = folder / given.text("file", low=1)
        given.end()

        def whole() -> Iterator[Arrival]:
            return READERS[source](trace)
    elif source in DRAWN:
        whole = _drawing(given, source, duration_s or 3600.0, seed)
        given.end()
    else:
        raise InvalidRequest(
            f"traffic.source {source[:80]!r} is unknown; there are {', '.join((*READERS, *DRAWN))}",
            param="traffic.source",
        )

    def arrivals() -> Iterator[Arrival]:
        found = whole()
        if speed != 1.0:
            found = quicker(found, speed)
        if duration_s:
            found = takewhile(lambda one: one.at < duration_s, found)
        return islice(found, most) if most else found

    return arrivals


def _drawing(
    given: Fields, source: str, duration_s: float, seed: int
) -> Callable[[], Iterator[Arrival]]:
    rate = given.number("rate", low=1e-6, high=1e6)
    cv = given.number("cv", 1.0, low=0.01, high=100.0) if source == "gamma" else 1.0
    swing = given.number("swing", 0.8, low=0.0, high=1.0) if source == "diurnal" else 0.0
    period_s = given.number("period_s", 86_400.0, low=1.0) if source == "diurnal" else 1.0
    prompt = _lengths(given, "prompt", 1000.0)
    output = _lengths(given, "output", 200.0)
    pattern = given.mapping("prefixes", {"pattern": "none"})
    tenants = [str(one) for one in given.items("tenants", ["default"])] or ["default"]
    _pattern(pattern, Random(0))  # its faults are told now

    def whole() -> Iterator[Arrival]:
        chance = Random(f"{seed} traffic")
        if source == "gamma":
            moments = gamma(chance, rate, cv, duration_s)
        elif source == "diurnal":
            moments = diurnal(chance, rate, swing, period_s, duration_s)
        else:
            moments = poisson(chance, rate, duration_s)
        sizes = Random(f"{seed} sizes")
        prefixes = _pattern(pattern, Random(f"{seed} prefixes"))
        return drawn(moments, sizes, prompt, output, prefixes, tenants)

    return whole


def _lengths(given: Fields, name: str, usual: float) -> Lengths:
    inner = Fields(given.mapping(name, {}), name, path=f"traffic.{name}.")
    lengths = Lengths(
        inner.number("tokens", usual, low=1.0, high=1e7),
        inner.number("cv", 1.0, low=0.0, high=10.0),
    )
    inner.end()
    return lengths


def _pattern(body: dict[str, Any], chance: Random) -> Prefixes:
    given = Fields(body, "traffic.prefixes", path="traffic.prefixes.")
    kind = PATTERNS[named(given, "pattern", "none", PATTERNS)]
    block_tokens = given.integer("block_tokens", 256, low=1, high=65_536)
    known = {"tokens": 1e7, "share": 1.0, "count": 1e6, "skew": 10.0, "turns": 1e4}
    takes = kind.__init__.__annotations__
    more: dict[str, Any] = {}
    for name, high in known.items():
        if name in given and name in takes:
            value = given.number(name, low=0.0, high=high)
            more[name] = int(value) if takes[name] in (int, "int") else value
    given.end()
    return kind(chance, block_tokens, **more)
