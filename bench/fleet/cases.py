"""The traffic and the fleets that the routing benchmark runs: recorded and drawn, easy and hostile.

Loads are relative: the machines of a case are made so fast that its replicas would compute for the
stated share of the time if nothing were ever found in a cache. So 0.9 is a fleet near its end
without caching, whatever the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.routing import Policy as Route
from cloudlm.core.routing import Routing
from cloudlm.sim.figures import Figures, bundled
from cloudlm.sim.simulation import Policy, Setting
from cloudlm.sim.traces import READERS
from cloudlm.sim.traffic import PATTERNS, Arrival, Lengths, drawn, gamma

REPLICAS = 8
ENGINE = "qwen3-0.5b-cpu-bf16"


@dataclass(frozen=True, slots=True)
class Case:
    """One traffic against one fleet of eight replicas."""

    name: str
    arrivals: Callable[[], Iterator[Arrival]]
    load: float
    slots: int = 64
    cache_tokens: int = 500_000
    engine: str = ENGINE
    useful: bool = False
    """Whether the load counts only what caches that keep everything would leave to compute."""


def mooncake(folder: Path, requests: int = 0) -> Callable[[], Iterator[Arrival]]:
    """The recorded conversations, all or the first of them."""

    def arrivals() -> Iterator[Arrival]:
        found = READERS["mooncake"](folder / "mooncake_conversation_trace.jsonl.gz")
        return islice(found, requests) if requests else found

    return arrivals


def pattern(
    name: str,
    seed: int,
    *,
    requests: int = 3000,
    cv: float = 1.0,
    prompt: float = 1000.0,
    **more: Any,
) -> Callable[[], Iterator[Arrival]]:
    """Drawn requests whose prompts begin as ``name`` has it."""

    def arrivals() -> Iterator[Arrival]:
        prefixes = PATTERNS[name](Random(f"{seed} prefixes"), 256, **more)
        moments = gamma(Random(f"{seed} moments"), 2.0, cv, 1e9)
        sizes = Random(f"{seed} sizes")
        return islice(drawn(moments, sizes, Lengths(prompt), Lengths(200.0), prefixes), requests)

    return arrivals


Drawing = Callable[[int], Callable[[], Iterator[Arrival]]]


def patterns(requests: int) -> dict[str, Drawing]:
    """Ways in which prompts begin that are hard on one policy or another, drawn from a seed."""

    def of(name: str, **more: Any) -> Drawing:
        return lambda seed: pattern(name, seed, requests=requests, **more)

    return {
        "nothing in common": of("none"),
        "nothing in common, bursts": of("none", cv=4.0),
        "hot 2k": of("hot", tokens=2048),
        "hot 8k": of("hot", tokens=8192),
        "hot 32k": of("hot", tokens=32_768),
        "hot 32k, bursts": of("hot", tokens=32_768, cv=4.0),
        "hot 128k, short questions": of("hot", tokens=131_072, prompt=100.0),
        "half hot 8k": of("hot", tokens=8192, share=0.5),
        "popular 50 of 4k": of("popular"),
        "popular 500 of 8k": of("popular", count=500, tokens=8192),
        "popular 10 of 4k, skewed": of("popular", count=10, skew=2.0),
        "conversations": of("conversations"),
        "conversations, bursts": of("conversations", cv=4.0),
        "long conversations": of("conversations", count=50, turns=20.0),
    }


def figures_of(case: Case) -> Figures:
    """The engine's figures on a machine that makes the case's load."""
    found = replace(
        bundled()[case.engine], slots=case.slots, cache_tokens=case.cache_tokens, start_s=30.0
    )
    step, work_s, last = found.step, 0.0, 1.0
    batch = max(1, case.slots // 4)  # what decodes together in the mean, roughly
    seen: set[int] = set()
    for one in case.arrivals():
        known = len(seen.intersection(one.blocks)) if case.useful else 0
        seen.update(one.blocks if case.useful else ())
        work_s += (one.prompt_tokens - known * one.block_tokens) * step.prefill_token_s
        work_s += one.output_tokens * (step.base_s / batch + step.sequence_s)
        last = one.at
    return found.faster(work_s / last / REPLICAS / case.load)


def policy(route: Route) -> Policy:
    """Eight replicas, no more and no fewer."""
    spec = DeploymentSpec(
        "bench",
        "models:/bench/1",
        min_replicas=REPLICAS,
        max_replicas=REPLICAS,
        routing=Routing(policy=route),
    )
    return Policy(route.value, spec, autoscaler="fixed")


def setting_of(case: Case) -> Setting:
    """The fleet of a case, that of the largest prompts included."""
    return Setting(figures_of(case), seed=1)
