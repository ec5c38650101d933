"""What a lease is: the right of one holder at a time to act. Data and rules alone, no I/O.

No date is in it. A holder renews its lease again and again; who waits for it counts by its own
monotonic clock how long nothing was renewed (as Kubernetes' leader election does: client-go,
tools/leaderelection). So no two clocks are ever compared, and one that jumps changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cloudlm.core.fields import Fields


@dataclass(frozen=True, slots=True)
class Lease:
    """``token`` grows with each new holding and never falls, ``renewals`` with each renewal.
    ``holder`` is empty once it was given back, or if nobody ever held it (token 0).
    ``lasts_s``: without a renewal for so long, in seconds, the lease may be taken by another."""

    name: str
    holder: str = ""
    token: int = 0
    renewals: int = 0
    lasts_s: float = 0.0

    def same_holding(self, other: Lease) -> bool:
        """Whether both are of one stretch of holding."""
        return (self.holder, self.token) == (other.holder, other.token)


@dataclass(frozen=True, slots=True)
class Leader:
    """Which control leads, as one of them tells it: ``here`` is itself. ``holder`` is empty while
    nobody does."""

    holder: str
    token: int
    here: bool


@dataclass(frozen=True, slots=True)
class Watch:
    """A lease as it was last seen, and since when (monotonic seconds of whoever watches) it has not
    moved. ``lives``: its holder was seen renewing it."""

    lease: Lease
    since: float
    lives: bool = False


def watched(before: Watch | None, found: Lease, now: float) -> Watch:
    """The watch after another look."""
    if before is None:
        return Watch(found, now)
    if before.lease == found:
        silent = now - before.since >= found.lasts_s
        return Watch(found, before.since, before.lives and not silent)
    return Watch(found, now, lives=bool(found.holder))


def may_take(watch: Watch, holder: str, now: float) -> bool:
    """Whether ``holder`` may take the lease: it is free, its own of an earlier life, or was not
    renewed for as long as it lasts."""
    lease = watch.lease
    return lease.holder in ("", holder) or now - watch.since >= lease.lasts_s


def leader_body(leader: Leader) -> dict[str, Any]:
    """The leader on the wire."""
    return {"holder": leader.holder, "token": leader.token, "here": leader.here}


def leader_from_body(body: Any) -> Leader:
    """Raises InvalidRequest for what is none."""
    fields = Fields(body, "a leader")
    return Leader(fields.text("holder"), fields.integer("token"), fields.flag("here"))
