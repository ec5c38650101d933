"""What one seed stands for: a fleet, its load, its faults and what is asked of control, as plain
data. Must not run them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

LOAD_S = 12.0
"""Requests arrive within so many seconds, and faults begin there."""
PROMPTS = 12
EVERYBODY = -1
TENANTS = ("red", "blue")

FAULTS = (
    "crash",
    "stall",
    "refuse",
    "status",
    "garbage",
    "cut",
    "abort",
    "error_event",
    "slow",
    "network",
    "state_down",
    "state_hangs",
    "lost_ack",
    "gateway_kill",
    "clock_jump",
    "rollout",
    "revoke",
)

CONTROL_FAULTS = (
    "control_kill",
    "control_kill",
    *("control_pause",) * 5,
    "driver_down",
    "driver_forgets",
    "driver_late",
    "write_lost",
    "write_lost",
    "looks_late",
    "looks_lost",
    "wedge",
    "state_down",
    "lost_ack",
    "crash",
    "stall",
)
"""Those of runs in which control takes part, most often; the others come as well."""

ORDERS = (
    "update",
    "update",
    "scale",
    "scale",
    "zero",
    "undo",
    "broken",
    "recreate",
    "delete",
    "spare",
    "spare",
    "alias",
)
BLINDNESS = ("driver_blank", "looks_cut")
"""Of a control that is shown nothing, or reaches nobody, all of a sudden."""
BLIND_SHARE = 0.24
CROWDED_SHARE = 0.25
"""The parts of the runs with control in which it goes blind, and in which several deployments do
not all fit into the memory."""
AWAY_SHARE = 0.06
"""The part of the others in which nothing happens but that the state is away for long."""
AWAY_LOAD_S = 24.0
MODELS = 3
CONTROL_SHARE = 0.125
"""The part of all seeds in which production's control runs the fleet."""


@dataclass(frozen=True, slots=True)
class Fault:
    """``kind`` at ``at_s`` for ``for_s`` seconds; ``who`` is a replica's number (EVERYBODY: all)
    and ``how`` what the kind makes of it: a status, seconds, a share."""

    at_s: float
    kind: str
    who: int
    for_s: float
    how: float


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. ``prompt`` is its number: equal ones are equal questions. ``leaves_after_s``:
    the client goes away then (None: it stays); ``slow_s``: it pauses after each piece. ``model`` is
    the number of what it asks, 0 where there is only one."""

    number: int
    at_s: float
    key: int
    prompt: int
    stream: bool
    usage: bool
    max_tokens: int
    leaves_after_s: float | None
    slow_s: float
    deadline_ms: int | None
    model: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    """What a person asks of a deployment at ``at_s``; ``how`` is what the kind makes of it."""

    at_s: float
    kind: str
    how: float


@dataclass(frozen=True, slots=True)
class Plane:
    """Control in a run: so many processes of it, how long a replica takes to start, and how long a
    call to the state or a driver takes at most, seconds. ``alias``: the deployment names its
    version by one. ``leftovers``: replicas and endpoints that belong to nobody are there. ``fits``:
    so many replicas have room in the memory (0: there is no budget); ``pinned``: the second model
    stays there. For ``stops_in_s`` a stopped replica is listed as draining."""

    controls: int
    start_s: float
    latency_s: float
    alias: bool
    leftovers: bool
    fits: int = 0
    pinned: bool = False
    stops_in_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """All that a run depends on. ``concurrent``, ``per_minute`` and ``spend`` are the limits of
    each key (None: none). Without ``plane`` the run writes the endpoints itself."""

    seed: int
    replicas: int
    capacity: int
    queued: int
    hedge_after_s: float
    policy: str
    cached: bool
    max_resumes: int
    concurrent: tuple[int | None, ...]
    per_minute: tuple[int | None, ...]
    spend: tuple[float | None, ...]
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]
    plane: Plane | None = None
    orders: tuple[Order, ...] = ()


KEYS = (TENANTS[0], TENANTS[1], TENANTS[0], TENANTS[1])
"""The tenant of each key. The first two have no limits."""


def draw(seed: int, requests: int = 100) -> Schedule:
    """The schedule of a seed."""
    plain = _draw(seed, requests)
    chance = random.Random(f"{seed}/control")
    if chance.random() >= CONTROL_SHARE:
        return _left_alone(plain, random.Random(f"{seed}/away"))
    blind = _blinded(_controlled(plain, chance), random.Random(f"{seed}/list"))
    crowded = _crowded(blind, random.Random(f"{seed}/memory"))
    assert crowded.plane is not None
    stops_in_s = random.Random(f"{seed}/stops").choice((0.0, 0.3, 2.0, 5.0))
    return replace(crowded, plane=replace(crowded.plane, stops_in_s=stops_in_s))


def _left_alone(plain: Schedule, chance: random.Random) -> Schedule:
    """The same fleet, for some, while the state is away: shortly, or for longer than a gateway may
    go by what it read last."""
    if chance.random() >= AWAY_SHARE:
        return plain
    asks = tuple(replace(one, at_s=round(chance.random() * AWAY_LOAD_S, 4)) for one in plain.asks)
    faults = [
        Fault(round(0.5 + chance.random() * LOAD_S, 4), "state_away", EVERYBODY, for_s, 0.0)
        for for_s in chance.choice(((3.0,), (6.5,), (14.0,), (3.0, 12.0)))
    ]
    return replace(plain, asks=asks, faults=tuple(sorted(faults, key=_when)), queued=1000)


def _blinded(plain: Schedule, chance: random.Random) -> Schedule:
    """The same run, for some with a control that sees nothing for a while."""
    if chance.random() >= BLIND_SHARE:
        return plain
    blind = _fault(chance, plain.replicas, BLINDNESS)
    return replace(plain, faults=tuple(sorted((*plain.faults, blind), key=_when)))


def _crowded(plain: Schedule, chance: random.Random) -> Schedule:
    """The same run, for some with several models that do not all fit into the memory."""
    if chance.random() >= CROWDED_SHARE or plain.plane is None:
        return plain
    fits = chance.choice((1, 2, 2, 3))
    plane = replace(plain.plane, fits=fits, pinned=fits > 1 and chance.random() < 0.3)
    asks = tuple(replace(one, model=chance.choice((0, 0, 1, 2))) for one in plain.asks)
    return replace(plain, plane=plane, asks=asks)


def _controlled(plain: Schedule, chance: random.Random) -> Schedule:
    """The same fleet and load with control in it, and other faults."""
    orders = [
        Order(round(chance.random() * LOAD_S, 4), chance.choice(ORDERS), round(chance.random(), 4))
        for _ in range(chance.randint(2, 6))
    ]
    faults = [
        _fault(chance, plain.replicas, CONTROL_FAULTS if chance.random() < 0.8 else FAULTS)
        for _ in range(chance.choice((0, 0, 1, 2, 3, 4)))
    ]
    return replace(
        plain,
        faults=tuple(sorted((one for one in faults if one.kind != "rollout"), key=_when)),
        orders=tuple(sorted(orders, key=_when)),
        plane=Plane(
            controls=chance.choice((1, 2, 2)),
            start_s=chance.choice((0.1, 0.5, 2.0)),
            latency_s=chance.choice((0.0, 0.02, 0.1)),
            alias=chance.random() < 0.5,
            leftovers=chance.random() < 0.2,
        ),
    )


def _draw(seed: int, requests: int) -> Schedule:
    chance = random.Random(seed)
    replicas = chance.choice((1, 2, 2, 3, 3, 4, 6))
    faults = tuple(
        sorted((_fault(chance, replicas) for _ in range(chance.randint(0, 6))), key=_when)
    )
    hurry = chance.choice((1.0, 1.0, 0.3, 0.05))  # all at once, or spread
    asks = tuple(_ask(chance, n, hurry) for n in range(requests))
    return Schedule(
        seed=seed,
        replicas=replicas,
        capacity=chance.choice((2, 8, 64)),
        queued=chance.choice((5, 1000)),
        hedge_after_s=chance.choice((0.0, 0.0, 0.0, 0.3)),
        policy=chance.choice(
            ("least_cost", "least_cost", "least_load", "round_robin", "power_of_two")
        ),
        cached=chance.random() < 0.4,
        max_resumes=chance.choice((3, 3, 1, 0)),
        concurrent=(None, None, chance.choice((None, 1, 3)), chance.choice((None, 2))),
        per_minute=(None, None, chance.choice((None, 10)), chance.choice((None, 15))),
        spend=(None, None, chance.choice((None, 0.004)), None),
        asks=asks,
        faults=faults,
    )


def _when(one: Fault | Order) -> float:
    return one.at_s


def _ask(chance: random.Random, number: int, hurry: float) -> Ask:
    return Ask(
        number=number,
        at_s=round(chance.random() * LOAD_S * hurry, 4),
        key=chance.choice((0, 0, 1, 1, 2, 3)),
        prompt=chance.randrange(PROMPTS),
        stream=chance.random() < 0.8,
        usage=chance.random() < 0.5,
        max_tokens=chance.randint(2, 12),
        leaves_after_s=round(chance.random() * 2, 4) if chance.random() < 0.08 else None,
        slow_s=0.05 if chance.random() < 0.05 else 0.0,
        deadline_ms=chance.choice((200, 2000)) if chance.random() < 0.05 else None,
    )


def _fault(chance: random.Random, replicas: int, kinds: tuple[str, ...] = FAULTS) -> Fault:
    return Fault(
        at_s=round(chance.random() * LOAD_S, 4),
        kind=chance.choice(kinds),
        who=chance.randrange(replicas) if chance.random() < 0.8 else EVERYBODY,
        for_s=round(0.1 + chance.random() * 5, 4),
        how=round(chance.random(), 4),
    )
