"""The rule of the Kubernetes HorizontalPodAutoscaler, version 2. Pure.

Source: kubernetes ``pkg/controller/podautoscaler/replica_calculator.go`` (calcPlainMetricReplicas)
and ``horizontal.go`` (behaviour and its defaults), KEP-853 and KEP-4951. Our metrics are the
requests at a replica and, where asked for, the times to first and further tokens; of several the
highest answer holds.
"""

from __future__ import annotations

import math
from dataclasses import replace

from cloudlm.control.autoscale.facts import Fleet, Recommendation, ScaleMemory, TotalDemand
from cloudlm.control.autoscale.windows import average, sampled, stabilised
from cloudlm.core.deployment import DeploymentSpec

SYNC_S = 15.0
TOLERANCE = 0.1
DOWN_WINDOW_S = 300.0
UP_PODS = 4
UP_FACTOR = 2.0
POLICY_PERIOD_S = 15.0
UTILIZATION = 1.0


def by_hpa(
    spec: DeploymentSpec,
    signals: TotalDemand,
    fleet: Fleet,
    current: int,
    memory: ScaleMemory,
    now: float,
) -> tuple[int, ScaleMemory]:
    """Wanted replicas without the spec's bounds. Looks every 15 s, at the mean of what came since;
    at once if there is none yet."""
    buckets = sampled(memory.buckets, signals.ongoing, now, SYNC_S)
    memory = replace(memory, buckets=buckets)
    waits = memory.decided_at is not None and now - memory.decided_at < SYNC_S
    if waits and current > 0:
        return current, memory
    scaling = spec.scaling
    target = spec.target_ongoing_requests * (scaling.utilization or UTILIZATION)
    load = average(buckets, now, SYNC_S) if current else signals.ongoing
    wanted = replicas(load, target, current, fleet)
    for measured_s, asked_ms in (
        (signals.ttft_s, scaling.target_ttft_ms),
        (signals.tpot_s, scaling.target_tpot_ms),
    ):
        if asked_ms and measured_s and current:
            ready = max(fleet.answering(current), 1)
            by_time = replicas(measured_s * 1000 * ready, asked_ms, current, fleet)
            wanted = max(wanted, by_time)
    down_s = DOWN_WINDOW_S if scaling.down_window_s is None else scaling.down_window_s
    steady, history = stabilised(
        memory.recommendations, wanted, current, now, scaling.up_window_s, down_s
    )
    limited, rises = _within_policies(steady, current, memory.rises, now)
    why = f"hpa: {load:.3g} requests at once, {target:.3g} for each replica, make {wanted}"
    return limited, replace(memory, recommendations=history, decided_at=now, rises=rises, why=why)


def replicas(load: float, target: float, current: int, fleet: Fleet) -> int:
    """``calcPlainMetricReplicas``: ``load`` is the sum of the metric over the replicas that answer
    and said how they are."""
    ready, missing = fleet.answering(current), fleet.missing
    unready = len(fleet.starting_s) + fleet.lost
    if current == 0 or ready <= 0:
        return max(math.ceil(load / target), current)
    known = max(ready - missing, 1)
    ratio = load / known / target
    rising_unready = unready > 0 and ratio > 1.0
    if not rising_unready and not missing:
        return current if abs(1.0 - ratio) <= TOLERANCE else math.ceil(ratio * ready)
    filled = load + (target * missing if ratio < 1.0 else 0.0)
    pods = known + (missing if ratio != 1.0 else 0) + (unready if rising_unready else 0)
    again = filled / pods / target
    reversed_ = (ratio < 1.0 < again) or (ratio > 1.0 > again)
    if abs(1.0 - again) <= TOLERANCE or reversed_:
        return current
    found = math.ceil(again * pods)
    against = (again < 1.0 and found > current) or (again > 1.0 and found < current)
    return current if against else found


def _within_policies(
    wanted: int, current: int, rises: tuple[Recommendation, ...], now: float
) -> tuple[int, tuple[Recommendation, ...]]:
    """Up by 4 or by as many as there were, whichever is more, in 15 s; down by any number. From
    nothing to whatever is wanted."""
    recent = tuple(one for one in rises if now - one.at < POLICY_PERIOD_S)
    before = current - sum(one.replicas for one in recent)
    if wanted <= current or current == 0:
        return wanted, recent
    limit = max(before + UP_PODS, math.ceil(before * UP_FACTOR))
    limited = max(min(wanted, limit), current)
    if limited > current:
        recent = (*recent, Recommendation(now, limited - current))
    return limited, recent
