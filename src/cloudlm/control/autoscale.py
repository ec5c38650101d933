"""How many replicas a deployment needs: a pure function of demand, with memory passed in and out.

The rule of the Kubernetes autoscaler with its defaults: the ratio of load to target, nothing
within 10 % of it, down only to the highest recommendation of the last 300 s, and never down
without data. Must not read a clock or know where demand comes from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cloudlm.core.deployment import Demand, DeploymentSpec

TOLERANCE = 0.1
DOWN_WINDOW_S = 300.0


@dataclass(frozen=True, slots=True)
class Recommendation:
    """How many replicas the load asked for at a monotonic moment, seconds."""

    at: float
    replicas: int


@dataclass(frozen=True, slots=True)
class ScaleMemory:
    """What the autoscaler remembers of one deployment. Empty after a restart."""

    recommendations: tuple[Recommendation, ...] = ()


def autoscale(
    spec: DeploymentSpec,
    demand: Sequence[Demand],
    current: int,
    memory: ScaleMemory,
    now: float,
) -> tuple[int, ScaleMemory]:
    """Wanted replicas within the spec's bounds, and the memory for next time.

    ``demand`` are fresh reports of all gateways (none: no data), ``current`` the replicas wanted
    until now (0 for a new deployment), ``now`` monotonic seconds.
    """
    recommended = current
    if demand:
        load = sum(report.ongoing for report in demand)  # includes those queued in the gateway
        recommended = _recommend(load / spec.target_ongoing_requests, current)
    recommended = _clamp(recommended, spec)
    # Without history what runs now counts as recommended: a restart scales nothing down.
    history = memory.recommendations or (Recommendation(now, _clamp(current, spec)),)
    recent = [one for one in history if now - one.at <= DOWN_WINDOW_S]
    recent.append(Recommendation(now, recommended))
    wanted = recommended
    if recommended < current:
        wanted = min(current, max(one.replicas for one in recent))
    return _clamp(wanted, spec), ScaleMemory(_compact(recent))


def _recommend(needed: float, current: int) -> int:
    """``needed`` is load over target: replicas, as a fraction."""
    if current > 0 and abs(needed / current - 1.0) <= TOLERANCE:
        return current
    return math.ceil(needed)


def _clamp(replicas: int, spec: DeploymentSpec) -> int:
    return max(spec.min_replicas, min(spec.max_replicas, replicas))


def _compact(recent: Sequence[Recommendation]) -> tuple[Recommendation, ...]:
    """Keep only what can still be a maximum: each entry higher than all after it."""
    kept: list[Recommendation] = []
    for one in recent:
        while kept and kept[-1].replicas <= one.replicas:
            kept.pop()
        kept.append(one)
    return tuple(kept)
