"""How many replicas keep requests from waiting, when the load ahead is not certain. Pure.

Of a load that is certain, Erlang's C formula says which share of requests waits, here in the form
of Halfin and Whitt (*Heavy-traffic limits for queues with many exponential servers*, 1981): the
square-root rule of staffing. A load that is foreseen is not certain. It may be what was foreseen
and any of the errors that forecasts had of late; so the share is the mean over these, weighed by
the requests that each would bring (Whitt, *Staffing a call center with uncertain arrival rate and
absenteeism*, 2006). A jump that was seen once then costs replicas by its weight, not by its height.

The errors hold part of what chance does to requests at once, which the formula counts again: what
becomes late is less than foreseen.

Prompts and answers share a replica's steps, so that a load grows as replicas become fewer: with the
share ``u`` of each one's time for prompts, all that is at them lasts ``1 / (1 - u)`` times as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Errors = Sequence[tuple[float, float]]
"""How much more or less than foreseen may come, in square roots of the load: weight, and error."""
CERTAIN: Errors = ((1.0, 0.0),)


def late_share(
    load: float,
    servers: float,
    request_s: float,
    wait_s: float,
    errors: Errors = CERTAIN,
    prompts: float = 0.0,
) -> float:
    """The share of requests that wait longer than ``wait_s`` for one of ``servers``; each takes
    ``request_s`` in the mean. ``load`` is that foreseen, in requests at once. ``prompts``, for each
    server, is the share of it that has a replica to itself: the more of a replica's time it takes,
    the longer all that is there stays. ``load`` and ``request_s`` are without that."""
    root = math.sqrt(max(load, 1.0))
    late = total = 0.0
    for weight, error in errors:
        mean = load + error * root
        if mean > 0.0:
            total += weight * mean
            free = 1.0 - prompts * mean / servers if servers > 0.0 else 0.0
            if free > 0.0:
                share = _late_share(mean / free, servers, request_s / free, wait_s)
            else:
                share = 1.0
            late += weight * mean * share
    return late / total if total else 0.0


def _late_share(load: float, servers: float, request_s: float, wait_s: float) -> float:
    """The same for a load that is certain; times are exponential."""
    if servers <= load:
        return 1.0
    beta = (servers - load) / math.sqrt(load)
    density = math.exp(-beta * beta / 2.0) / math.sqrt(2.0 * math.pi)
    below = 0.5 * math.erfc(-beta / math.sqrt(2.0))
    waits = density / (density + beta * below)
    return waits * math.exp(-(servers - load) * wait_s / max(request_s, wait_s, 1e-9))


def needed(
    load: float,
    slots: float,
    request_s: float,
    wait_s: float,
    most: int,
    share: float,
    errors: Errors = CERTAIN,
    prompts: float = 0.0,
) -> int:
    """The fewest replicas of ``slots`` requests at once, at most ``most``, with which no larger
    ``share`` of requests is late. ``prompts`` is the part of the load that prompts are."""
    low, high = 0, most
    while low < high:  # more replicas make fewer late
        middle = (low + high) // 2
        if late_share(load, middle * slots, request_s, wait_s, errors, prompts * slots) <= share:
            high = middle
        else:
            low = middle + 1
    return low
