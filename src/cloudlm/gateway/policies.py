"""The policies by which a deployment's requests are spread over its replicas.

Pure: each takes candidates that are equally fit (at least one), what is known of their load and the
facts of one request, and returns one of them. All chance comes in as ``Facts.draws``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from cloudlm.core.deployment import Endpoint
from cloudlm.core.routing import Policy
from cloudlm.gateway.loads import Loads, ReplicaLoad
from cloudlm.gateway.model_routes import drawn

REQUEST_BLOCKS = 4.0
"""What a request in flight costs beside its prompt, in blocks: its answer's steps."""
AFFINITY_SLACK = 1.25
"""How much more than its share of the requests in flight a replica takes of its own sessions."""
_HASHES = 2.0**64


class Facts(NamedTuple):
    """What a policy may know of one request, see ``router.choose``."""

    now: float
    keys: Sequence[bytes] = ()
    session: bytes = b""
    draws: tuple[float, float] = (0.0, 0.0)


Decider = Callable[[Sequence[Endpoint], Loads, Facts], Endpoint]


def load_cost(load: ReplicaLoad) -> float:
    """What one more request would wait for at a replica, in blocks, besides its own prompt."""
    return load.blocks + (load.ongoing + 1) * REQUEST_BLOCKS


def least_cost(candidates: Sequence[Endpoint], loads: Loads, facts: Facts) -> Endpoint:
    """The one that would begin to answer soonest.

    A replica's cost is one number: the part of the prompt that it has not cached, plus what it has
    still to compute of others' prompts, plus its requests in flight, divided by its weight. Without
    long prompts that is the "least outstanding requests" rule; with equal answers it is also round
    robin, because ties go to the replica chosen least recently, and those of a long prompt that
    nobody knows to the replica that was given such a one longest ago.
    """
    keys, now, of, known_of = facts.keys, facts.now, loads.of, loads.prefixes.known
    best = candidates[0]
    least, longest_ago = math.inf, 0
    for endpoint in candidates:
        load = of(endpoint.replica)
        known = known_of(endpoint.replica, keys, now) if keys else 0
        cost = (len(keys) - known + load_cost(load)) / endpoint.weight
        if cost > least:
            continue
        last = load.chosen_at if known or not keys else load.cold_at
        if cost < least or last < longest_ago:
            best, least, longest_ago = endpoint, cost, last
    return best


def round_robin(candidates: Sequence[Endpoint], loads: Loads, _: Facts) -> Endpoint:
    """The one chosen longest ago."""
    return min(candidates, key=lambda one: loads.of(one.replica).chosen_at)


def least_load(candidates: Sequence[Endpoint], loads: Loads, _: Facts) -> Endpoint:
    """The one with the fewest requests in flight for its weight; of equals, that chosen longest
    ago."""

    def rank(one: Endpoint) -> tuple[float, int]:
        load = loads.of(one.replica)
        return (load.ongoing + 1) / one.weight, load.chosen_at

    return min(candidates, key=rank)


def power_of_two(candidates: Sequence[Endpoint], loads: Loads, facts: Facts) -> Endpoint:
    """Of two drawn, the less loaded (Mitzenmacher, "The Power of Two Choices in Randomized Load
    Balancing", 2001): nearly as even as looking at all, and gateways that do not know of each other
    do not all run to the same replica."""
    count = len(candidates)
    if count < 2:
        return candidates[0]
    first = min(int(facts.draws[0] * count), count - 1)
    second = min(int(facts.draws[1] * (count - 1)), count - 2)
    second += second >= first
    pair = (candidates[first], candidates[second])
    return min(pair, key=lambda one: (loads.of(one.replica).ongoing + 1) / one.weight)


def session_affinity(candidates: Sequence[Endpoint], loads: Loads, facts: Facts) -> Endpoint:
    """The session's own replica, unless that has more than its share to do; then its next.

    Weighted rendezvous hashing (Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit
    Rates", 1998; weights after Schindler and Schomaker): every session ranks all replicas, so that
    one that comes or goes moves only its own sessions, and all gateways agree. The bound on load is
    that of Mirrokni et al., "Consistent Hashing with Bounded Loads", 2016. Requests without a
    session go by least cost.
    """
    if not facts.session:
        return least_cost(candidates, loads, facts)
    total = loads.total(one.replica for one in candidates) + 1
    share = AFFINITY_SLACK * total / sum(one.weight for one in candidates)
    free = [
        one for one in candidates if loads.of(one.replica).ongoing < math.ceil(share * one.weight)
    ]
    return max(free, key=lambda one: closeness(facts.session, one))


def closeness(session: bytes, endpoint: Endpoint) -> float:
    """How near a replica is to a session; the larger its weight, the more often it is nearest."""
    digest = blake2b(endpoint.replica.encode(), digest_size=8, key=session).digest()
    even = (int.from_bytes(digest) + 0.5) / (_HASHES + 1.0)
    return -endpoint.weight / math.log(even) if even < 1.0 else math.inf


def weighted(candidates: Sequence[Endpoint], _: Loads, facts: Facts) -> Endpoint:
    """One drawn: each gets its weight's share of requests, whatever its load."""
    return candidates[drawn([one.weight for one in candidates], facts.draws[0])[0]]


DECIDERS: Mapping[Policy, Decider] = {
    Policy.LEAST_COST: least_cost,
    Policy.ROUND_ROBIN: round_robin,
    Policy.LEAST_LOAD: least_load,
    Policy.POWER_OF_TWO: power_of_two,
    Policy.SESSION_AFFINITY: session_affinity,
    Policy.WEIGHTED: weighted,
}
