"""Which of a deployment's priorities a request goes to, where its endpoints have several.

Pure. The spillover is that of ``model_routes``: a priority's health is the share of its weight that
is available, times 1.4, and what it cannot take goes to the next. Must not choose an endpoint.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

from cloudlm.core.deployment import Endpoint
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.model_routes import drawn, level_shares


def has_priorities(endpoints: Sequence[Endpoint]) -> bool:
    """Whether any endpoint stands behind others."""
    for one in endpoints:  # noqa: SIM110 (a generator costs more than the loop, for each request)
        if one.priority:
            return True
    return False


def by_priority(
    endpoints: Sequence[Endpoint],
    loads: Loads,
    now: float,
    *,
    tried: Container[str] = (),
    draw: float = 0.0,
) -> tuple[list[list[Endpoint]], float]:
    """The endpoints of each priority that are awake and not ``tried``, those to ask first in
    front: the priority that ``draw`` (even from 0 to below 1) hits, then the others in order,
    those without anybody available last. And what is left of the draw, again from 0 to below 1."""
    priorities = sorted({one.priority for one in endpoints})
    levels = [[one for one in endpoints if one.priority == which] for which in priorities]
    healths = [_health(level, loads, now) for level in levels]
    number, rest = drawn(level_shares(healths), draw)
    order = [number, *(one for one in range(len(levels)) if one != number)]
    order.sort(key=lambda one: healths[one] <= 0.0)
    left = [[one for one in levels[n] if one.replica not in tried] for n in order]
    return [level for level in left if level], rest


def _health(level: Sequence[Endpoint], loads: Loads, now: float) -> float:
    whole = math.fsum(one.weight for one in level)
    if whole <= 0.0:
        return 0.0
    able = math.fsum(one.weight for one in level if loads.of(one.replica).available(now))
    return min(able / whole, 1.0)
