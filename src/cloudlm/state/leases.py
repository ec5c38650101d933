"""The part of the state contract that says who leads, and its rules as pure functions that both
twins apply. No I/O, and no clock: see ``core.lease``."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from cloudlm.core.errors import Conflict, Superseded
from cloudlm.core.lease import Lease


class LeaseState(Protocol):
    """Leases by name. A lease is the row that every write of a ``fenced`` state looks at."""

    async def get_lease(self, name: str) -> Lease:
        """The lease as it is; with token 0 if nobody ever held it."""
        ...

    async def take_lease(self, name: str, holder: str, *, lasts_s: float, replaces: Lease) -> Lease:
        """Hold a lease, with a token greater than every one before. ``replaces`` is what the caller
        has read: if it is not what is stored, somebody renewed or took it, and Conflict is raised.
        Whether it may be taken is for the caller to judge (``core.lease.may_take``)."""
        ...

    async def renew_lease(self, lease: Lease) -> Lease:
        """Show that its holder lives. Raises Superseded if it is held otherwise by now. However
        late: as long as nobody took it, nothing was done without its holder."""
        ...

    async def give_back_lease(self, lease: Lease) -> None:
        """Have the lease free at once. Without effect if it is held otherwise by now."""
        ...


def taken(stored: Lease, holder: str, lasts_s: float, replaces: Lease) -> Lease:
    """The lease after ``take_lease``."""
    if stored != replaces:
        raise Conflict(f"the lease {stored.name!r} moved meanwhile; look at it again")
    return Lease(stored.name, holder, stored.token + 1, 0, lasts_s)


def renewed(stored: Lease, lease: Lease) -> Lease:
    """The lease after ``renew_lease``."""
    check_held(stored, lease)
    return replace(stored, renewals=stored.renewals + 1)


def given_back(stored: Lease, lease: Lease) -> Lease:
    """The lease after ``give_back_lease``."""
    return replace(stored, holder="") if stored.same_holding(lease) else stored


def check_held(stored: Lease, lease: Lease) -> None:
    """Raise Superseded unless ``stored`` is the same holding."""
    if not stored.same_holding(lease):
        by = f"{stored.holder[:200]!r} leads" if stored.holder else "nobody leads"
        raise Superseded(
            f"the lease {lease.name!r} with token {lease.token} is over: {by} now, with token "
            f"{stored.token}"
        )


def only_reads(method: str) -> bool:
    """Whether a method of the state changes nothing; what is not known to be so writes."""
    return method.startswith(("get_", "list_")) or method in _READS


_READS = frozenset(
    (
        *("version", "usage", "audit_head", "demand_mark", "latest_attempts", "last_uses"),
        *("fenced", "close"),
    )
)
