"""Between which numbers of replicas the rules may choose: the spec's, or those of schedules that
hold now or will when a replica started now is ready; and what is said where they alone moved the
number. Pure."""

from __future__ import annotations

from cloudlm.control.autoscale.facts import Fleet
from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.schedule import holds


def bounds_now(spec: DeploymentSpec, fleet: Fleet, start_s: float) -> tuple[int, int]:
    """The fewest and the most replicas. Of several schedules the higher bounds hold."""
    low, high = spec.min_replicas, spec.max_replicas
    if fleet.wall_s is None or not spec.scaling.schedules:
        return low, high
    moments = (fleet.wall_s, fleet.wall_s + start_s)
    held = [one for one in spec.scaling.schedules if any(holds(one, at) for at in moments)]
    lows = [one.min_replicas for one in held if one.min_replicas is not None]
    highs = [one.max_replicas for one in held if one.max_replicas is not None]
    low, high = max(lows, default=low), max(highs, default=high)
    # Where a schedule says one of the two, the other gives way.
    return (low, max(low, high)) if lows else (min(low, high), high)


def moved_by(spec: DeploymentSpec, bounds: tuple[int, int], current: int, wanted: int) -> str:
    """For people, who set the bounds that ``current`` replicas are outside of, where these alone
    made them ``wanted``; empty if the load had a say."""
    low, high = bounds
    if low <= current <= high or wanted != max(low, min(high, current)):
        return ""
    if bounds != (spec.min_replicas, spec.max_replicas):
        return f"a schedule sets the bounds to {low}:{high}"
    if spec.scaling.schedules:  # one may have ended, or somebody changed them: the numbers hold
        return f"the bounds are {low}:{high}"
    return f"a person set the bounds to {low}:{high}"
