"""Which revision answers a request while a roll-out splits them between two.

Control writes with each endpoint the part of the requests that is its revision's (``share``),
whatever the number of replicas. A request's *mark* decides, which its session or else its id gives:
so a session stays with its revision, retries and other gateways decide alike, and a session that
the new revision has stays there as its share grows. Only where no replica of a revision can be
trusted now does a request go to the other one. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from hashlib import blake2b
from typing import Any

from cloudlm.core.deployment import Endpoint
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.router import available, choose

_REVISION, _COPY = b"revision", b"copy"


def mark_of(who: bytes, model: str, *, copy: bool = False) -> float:
    """A number from 0 to below 1 that stays the same for a session or request and a model; all are
    equally likely. With ``copy`` the one that says whether it is mirrored, which has nothing to do
    with the first."""
    person = _COPY if copy else _REVISION
    digest = blake2b(model.encode(), digest_size=7, key=who[:64], person=person).digest()
    return (int.from_bytes(digest) >> 3) / 2.0**53


def is_split(endpoints: Iterable[Endpoint]) -> bool:
    """Whether requests are split between revisions."""
    return any(one.share is not None for one in endpoints)


def taking(endpoints: Iterable[Endpoint]) -> tuple[list[Endpoint], list[Endpoint]]:
    """Those that take new requests, and those whose revision has no share of them."""
    found: tuple[list[Endpoint], list[Endpoint]] = ([], [])
    for one in endpoints:
        found[one.share is not None and one.share <= 0].append(one)
    return found


def sides(endpoints: Sequence[Endpoint], mark: float) -> list[list[Endpoint]]:
    """The endpoints of the revision that ``mark`` falls to, then those of each other one. The
    newest has the lowest marks. Shares count among the revisions that are there."""
    shares = {one.revision: 1.0 if one.share is None else one.share for one in endpoints}
    newest_first = sorted(shares, reverse=True)
    at = mark * sum(shares.values())
    drawn = newest_first[-1]
    for revision in newest_first:
        if at < shares[revision]:
            drawn = revision
            break
        at -= shares[revision]
    others = sorted((one for one in newest_first if one != drawn), key=lambda one: -shares[one])
    return [[one for one in endpoints if one.revision == side] for side in (drawn, *others)]


def choose_side(
    endpoints: Sequence[Endpoint],
    loads: Loads,
    now: float,
    mark: float,
    *,
    tried: Collection[str] = (),
    stay: bool = False,
    **how: Any,
) -> Endpoint | None:
    """``router.choose`` among the revision's own replicas; among another's if none of them is fit
    (tried before, asking for time, failed lately) and one of those is. With ``stay`` never among
    another's."""
    order = sides(endpoints, mark) if endpoints else []
    for side in order[: 1 if stay else None]:
        left = [one for one in side if one.replica not in tried]
        if available(left, loads, now):
            return choose(left, loads, now, tried=tried, **how)
    for side in order[: 1 if stay else None]:
        found = choose(side, loads, now, tried=tried, **how)
        if found is not None:
            return found
    return None
