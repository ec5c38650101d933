"""How many replicas a deployment needs: a pure function of demand, with memory passed in and out.

``autoscale`` is the one entry. Which rule decides is the deployment's ``scaling.algorithm``:
``tokens`` (ours), ``hpa`` (Kubernetes), ``kpa`` (Knative). What holds for all of them is here: the
bounds, nothing down without data, and when the last replica goes. Must not read a clock or know
where demand comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cloudlm.control.autoscale.bounds import bounds_now, moved_by
from cloudlm.control.autoscale.facts import (
    Fleet,
    Recommendation,
    ScaleMemory,
    TotalDemand,
    joined,
    reporting,
)
from cloudlm.control.autoscale.hpa import by_hpa
from cloudlm.control.autoscale.kpa import by_kpa
from cloudlm.control.autoscale.tokens import by_tokens
from cloudlm.core.deployment import Demand, DeploymentSpec
from cloudlm.core.scaling import Algorithm

__all__ = ["Fleet", "Recommendation", "ScaleMemory", "autoscale"]

Rule = Callable[
    [DeploymentSpec, TotalDemand, Fleet, int, ScaleMemory, float], tuple[int, ScaleMemory]
]
RULES: Mapping[Algorithm, Rule] = {
    Algorithm.TOKENS: by_tokens,
    Algorithm.HPA: by_hpa,
    Algorithm.KPA: by_kpa,
}
_ALL_WANTED = Fleet()


def autoscale(
    spec: DeploymentSpec,
    demand: Sequence[Demand],
    current: int,
    memory: ScaleMemory,
    now: float,
    fleet: Fleet = _ALL_WANTED,
) -> tuple[int, ScaleMemory]:
    """Wanted replicas within the spec's bounds, and the memory for next time.

    ``demand`` are fresh reports of all gateways (none: no data), ``current`` the replicas wanted
    until now (0 for a new deployment), ``now`` monotonic seconds. ``fleet`` says which of them
    answer and which are starting; left out, all answer. Begin with ``ScaleMemory()``, or with
    ``ScaleMemory(pace=Pace(start_s=30.0))`` where the version's start is known; call it about once
    a second. ``memory.why`` says how it came to its answer.
    """
    bounds = low, high = bounds_now(spec, fleet, memory.pace.start_s)
    within = spec
    if bounds != (spec.min_replicas, spec.max_replicas):
        within = replace(spec, min_replicas=low, max_replicas=high)
    if demand:
        wanted, memory = _by_load(within, demand, current, memory, now, fleet)
    else:
        wanted = current
        why = "no gateway reports demand: nothing goes down"
        memory = replace(memory, why=why, idle_since=None)
    wanted = max(low, min(high, wanted))
    why = moved_by(spec, bounds, current, wanted)
    return wanted, replace(memory, why=why) if why else memory


def _by_load(
    spec: DeploymentSpec,
    demand: Sequence[Demand],
    current: int,
    memory: ScaleMemory,
    now: float,
    fleet: Fleet,
) -> tuple[int, ScaleMemory]:
    """What the load asks for, which may be outside of the bounds that ``spec`` says."""
    signals = joined(demand)
    gateways, complete = reporting(memory.gateways, demand, now)
    idle_since = _idle_since(signals, memory, now) if complete else None
    memory = replace(memory, gateways=gateways, idle_since=idle_since)
    before = memory
    wanted, memory = RULES[spec.scaling.algorithm](spec, signals, fleet, current, memory, now)
    if not complete:  # what the silent one serves goes on unseen: it is not remembered as a fall
        memory = replace(memory, recommendations=before.recommendations, forecast=before.forecast)
        if wanted <= current:
            wanted, memory = current, replace(memory, why="a gateway is silent: nothing goes down")
    if signals.busy:
        wanted = max(wanted, 1)
    elif spec.min_replicas == 0 and (complete or current == 0):
        wanted, memory = _at_rest(spec, wanted, current, memory, now)
    return wanted, memory


def _idle_since(signals: TotalDemand, memory: ScaleMemory, now: float) -> float | None:
    """Since when it is known that nobody asks: what comes while a gateway is silent is not."""
    if signals.busy:
        return None
    return now if memory.idle_since is None else memory.idle_since


def _at_rest(
    spec: DeploymentSpec, wanted: int, current: int, memory: ScaleMemory, now: float
) -> tuple[int, ScaleMemory]:
    """Nobody asks: the last replica goes after ``idle_s`` of that, and none comes."""
    if current == 0:
        return 0, replace(memory, why="nobody asks; a request starts a replica")
    assert memory.idle_since is not None
    idle_s = now - memory.idle_since
    if idle_s < spec.scaling.idle_s:
        left_s = spec.scaling.idle_s - idle_s
        why = f"nobody asks; the last replica goes in {left_s:.0f} s"
        wanted = max(min(wanted, current), 1)
        return wanted, memory if current > 1 else replace(memory, why=why)
    return 0, replace(memory, why="nobody asks; a request starts a replica")
