"""vLLM's own metrics as the facts that a replica is judged by. Pure.

The progress counter is the number of engine steps that vLLM has accounted for, and the tokens
besides, so that a long step is not the only sign of life.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from cloudlm.engine.api import EngineStats

_PROGRESS = (
    "vllm:iteration_tokens_total_count",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
)
_WANTED = frozenset(
    (
        *_PROGRESS,
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
    )
)


def read_metrics(text: str) -> dict[str, float]:
    """The wanted metrics out of Prometheus' text format, each summed over its labels. What is not
    readable is passed over."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name not in _WANTED:
            continue
        try:
            value = float(line.rpartition(" ")[2])
        except ValueError:
            continue
        if math.isfinite(value):
            found[name] = found.get(name, 0.0) + value
    return found


def stats_of(found: Mapping[str, float], *, ongoing: int, answering: bool) -> EngineStats:
    """The engine's counters. ``ongoing`` requests are in the front; unless vLLM is ``answering``
    they all count as running, so that silence with work at hand is a standstill."""
    running = int(found.get("vllm:num_requests_running", 0))
    return EngineStats(
        steps=int(sum(found.get(name, 0.0) for name in _PROGRESS)),
        running=running if answering else max(running, ongoing),
        waiting=int(found.get("vllm:num_requests_waiting", 0)),
        kv_usage=found.get("vllm:kv_cache_usage_perc", 0.0),
        prefix_queries=int(found.get("vllm:prefix_cache_queries_total", 0)),
        prefix_hits=int(found.get("vllm:prefix_cache_hits_total", 0)),
        preemptions=int(found.get("vllm:num_preemptions_total", 0)),
        prompt_tokens=int(found.get("vllm:prompt_tokens_total", 0)),
        generated_tokens=int(found.get("vllm:generation_tokens_total", 0)),
    )
