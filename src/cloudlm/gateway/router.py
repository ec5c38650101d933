"""Which replica gets a request: who may get it at all, and whom the deployment's policy takes.

Pure: facts and ``now`` come as arguments; no I/O, no clock, no logging. A replica that fails is
idle and would draw everything to it; so those that failed lately stand behind the others, unless
more than half of them did: then the fault is more likely shared, and to pile everything on the few
that are left would bring these down too (the panic threshold of service meshes). A replica that
takes no connection is not there and counts for neither.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence

from cloudlm.core.deployment import Endpoint
from cloudlm.core.routing import Policy
from cloudlm.gateway.levels import by_priority, has_priorities
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.policies import DECIDERS, Facts
from cloudlm.gateway.ranking import RANKED, RANKED_FROM, Ranking

PANIC_SHARE = 0.5
"""Envoy's default, docs/root/intro/arch_overview/upstream/load_balancing/panic_threshold."""


def choose(
    endpoints: Sequence[Endpoint],
    loads: Loads,
    now: float,
    *,
    tried: Collection[str] = (),
    retrying: bool = False,
    keys: Sequence[bytes] = (),
    policy: Policy = Policy.LEAST_COST,
    session: bytes = b"",
    draws: tuple[float, float] = (0.0, 0.0),
) -> Endpoint | None:
    """The endpoint for the next attempt, or None if none may get it; see ``eligible``.

    ``keys`` are the prompt's blocks, ``session`` whom it belongs to (empty: nobody known), and
    ``draws`` two numbers drawn evenly from 0 to below 1, for policies that draw and for endpoints
    of several priorities.
    """
    if len(endpoints) >= RANKED_FROM and policy in RANKED and isinstance(endpoints, tuple):
        facts = Facts(now, keys, session, draws)
        found = _ranked_choice(endpoints, loads, tried, policy, facts)
        if found is not None:
            return found
    levels: Sequence[Sequence[Endpoint]]
    if has_priorities(endpoints):
        levels, rest = by_priority(endpoints, loads, now, tried=tried, draw=draws[0])
        draws = rest, draws[1]
    else:
        levels = [endpoints]
    candidates: list[Endpoint] = []
    for level in levels:
        candidates = eligible(level, loads, now, tried=tried, retrying=retrying)
        if candidates:
            break
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    return DECIDERS[policy](candidates, loads, Facts(now, keys, session, draws))


def _ranked_choice(
    endpoints: tuple[Endpoint, ...],
    loads: Loads,
    tried: Collection[str],
    policy: Policy,
    facts: Facts,
) -> Endpoint | None:
    """The same choice in a large fleet most of which is well, without looking at everybody; None
    if it must be looked at."""
    model = endpoints[0].model
    ranking = loads.ranked.get(model)
    if ranking is None or ranking.endpoints is not endpoints:
        ranking = loads.ranked[model] = Ranking(endpoints)
    if not ranking.even:
        return None
    but = loads.not_well(facts.now)
    but.update(tried)
    # With so few left out there is no panic, and there are others who are well.
    if len(but) > len(endpoints) // 4:
        return None
    return RANKED[policy](ranking, loads, facts, but)


def may_retry(
    endpoints: Iterable[Endpoint], loads: Loads, now: float, tried: Container[str]
) -> bool:
    """Whether ``choose`` has somebody for a request that is to be sent again, at a look."""
    return any(
        one.weight > 0 and one.replica not in tried and loads.of(one.replica).cooling_until <= now
        for one in endpoints
    )


def eligible(
    endpoints: Sequence[Endpoint],
    loads: Loads,
    now: float,
    *,
    tried: Container[str] = (),
    retrying: bool = False,
) -> list[Endpoint]:
    """Those out of which a policy may take: the best that are left, all equally good.

    Never one that was ``tried`` before or has weight 0. A replica that asked for time
    (``Retry-After``) is chosen only for a first attempt, and only if all others asked as well: a
    request that was never sent is not a retry, and refusing it here would be a guess. One that
    failed lately is chosen only if no other is left, or in panic.
    """
    well: list[Endpoint] = []
    of = loads.of
    for endpoint in endpoints:
        if endpoint.weight > 0 and endpoint.replica not in tried:
            load = of(endpoint.replica)
            if load.failures or load.cooling_until > now:
                return _ranked(endpoints, loads, now, tried, retrying)
            well.append(endpoint)
    return well


def _ranked(
    endpoints: Sequence[Endpoint],
    loads: Loads,
    now: float,
    tried: Container[str],
    retrying: bool,
) -> list[Endpoint]:
    """As ``eligible``, where not all are well."""
    best: list[Endpoint] = []
    best_rank = (True, True)
    panic: bool | None = None
    for endpoint in endpoints:
        if endpoint.weight <= 0 or endpoint.replica in tried:
            continue
        load = loads.of(endpoint.replica)
        cooling = load.cooling_until > now
        if cooling and retrying:
            continue
        suspect = load.failures > 0 and load.suspect(now)
        if suspect and not load.unreachable:
            if panic is None:
                panic = in_panic(endpoints, loads, now)
            suspect = not panic
        rank = (cooling, suspect)
        if rank < best_rank:
            best, best_rank = [endpoint], rank
        elif rank == best_rank:
            best.append(endpoint)
    return best


def in_panic(endpoints: Sequence[Endpoint], loads: Loads, now: float) -> bool:
    """Whether more than half of the replicas that are there failed lately."""
    there = [
        load
        for load in (loads.of(one.replica) for one in endpoints if one.weight > 0)
        if not (load.unreachable and load.suspect(now))
    ]
    return sum(load.suspect(now) for load in there) > PANIC_SHARE * len(there)


def available(endpoints: Sequence[Endpoint], loads: Loads, now: float) -> int:
    """How many may be sent a request without need: awake, not asking for time, not suspect."""
    return sum(one.weight > 0 and loads.of(one.replica).available(now) for one in endpoints)
