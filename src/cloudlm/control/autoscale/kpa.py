"""The rule of the Knative Pod Autoscaler on concurrency. Pure.

Source: knative/serving ``pkg/autoscaler/scaling/autoscaler.go`` at 00a4a55 and
``config/core/configmaps/autoscaler.yaml`` for the defaults. Knative's activator is our gateway,
which stays in the path always; so there is no excess burst capacity to decide about.
"""

from __future__ import annotations

import math
from dataclasses import replace

from cloudlm.control.autoscale.facts import Fleet, ScaleMemory, TotalDemand
from cloudlm.control.autoscale.windows import average, sampled, stabilised
from cloudlm.core.deployment import DeploymentSpec

PANIC_SHARE = 0.1
PANIC_THRESHOLD = 2.0
MAX_UP_RATE = 1000.0
MAX_DOWN_RATE = 2.0
UTILIZATION = 0.7
TICK_S = 2.0


def by_kpa(
    spec: DeploymentSpec,
    signals: TotalDemand,
    fleet: Fleet,
    current: int,
    memory: ScaleMemory,
    now: float,
) -> tuple[int, ScaleMemory]:
    """Wanted replicas without the spec's bounds. Looks every 2 s; at once if there is none yet."""
    scaling = spec.scaling
    stable_s = scaling.stable_window_s
    buckets = sampled(memory.buckets, signals.ongoing, now, stable_s)
    first = memory.decided_at is None
    memory = replace(memory, buckets=buckets)
    if memory.decided_at is not None and now - memory.decided_at < TICK_S and current > 0:
        return current, memory
    panic_at, most = memory.panic_at, memory.panic_most
    if first and current > 1:  # no history must not mean that nothing was needed
        panic_at, most = now, current
    target = spec.target_ongoing_requests * (scaling.utilization or UTILIZATION)
    ready = max(fleet.answering(current), 1)
    stable = math.ceil(average(buckets, now, stable_s) / target)
    panic = math.ceil(average(buckets, now, stable_s * PANIC_SHARE) / target)
    if panic / ready >= PANIC_THRESHOLD:
        panic_at = now
    elif panic_at is not None and now - panic_at > stable_s:
        panic_at, most = None, 0
    wanted = _rated(stable, ready)
    if panic_at is not None:
        wanted = most = max(wanted, _rated(panic, ready), most)
    said = "panics" if panic_at is not None else "is calm"
    why = f"kpa {said}: {stable} by the last {stable_s:g} s, {panic} by the last tenth of them"
    delay_s = scaling.down_window_s or 0.0
    history = memory.recommendations
    steady = wanted
    if delay_s > 0 or scaling.up_window_s > 0:
        steady, history = stabilised(history, wanted, current, now, scaling.up_window_s, delay_s)
    return steady, replace(
        memory,
        panic_at=panic_at,
        panic_most=most,
        decided_at=now,
        recommendations=history,
        why=why,
    )


def _rated(wanted: int, ready: int) -> int:
    """Within what one decision may change."""
    return min(max(wanted, math.floor(ready / MAX_DOWN_RATE)), math.ceil(ready * MAX_UP_RATE))
