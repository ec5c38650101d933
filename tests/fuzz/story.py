"""What is written down of a run, for the invariants to judge. Must not judge by itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.fuzz.replicas import MemoryUpstream
from tests.fuzz.schedule import TENANTS, Ask, Schedule

from cloudlm.core.tenant import LedgerRow
from cloudlm.security.keys import tenant_mark

MODEL = "tiny"
NAMES = (MODEL, "small1", "small2")
"""What can be asked, where several models share the memory."""
PEPPER = b"p" * 32
MARKS = {tenant: tenant_mark(tenant, PEPPER) for tenant in TENANTS}
"""By what replicas tell tenants apart."""
LAST_GOOD_VIEW_S = 8.0
"""How long a gateway of a run may go by what it read last, instead of an hour."""
LONGEST_S = 120.0
"""No request may take longer, whatever happens."""
CANCEL_WITHIN_S = 0.25
A_MOMENT_S = 0.0005
SETTLE_S = 3.0
PROBES = 3
IDLE_TIMEOUT_S = 1.5
HEARTBEAT_S = 0.4
FIRST_TOKEN_TIMEOUT_S = 4.0


@dataclass(slots=True)
class Seen:
    """What one client saw. ``ended``: how; empty while it waits. ``left``: it went away."""

    ask: Ask
    mark: str
    ended: str = ""
    status: int = 0
    pieces: list[bytes] = field(default_factory=list)
    stream: bool = False
    left: bool = False
    killed: bool = False
    asked: bool = False
    began_at: float = 0.0
    over_at: float = 0.0


@dataclass(slots=True)
class Story:
    """What happened in one run. ``ill``: the replicas that faults struck, which of those that lived
    at the time is a fault's choice. ``away``: from when until when the state was."""

    schedule: Schedule
    seen: list[Seen] = field(default_factory=list)
    probes: list[Seen] = field(default_factory=list)
    rows: dict[str, list[LedgerRow]] = field(default_factory=dict)
    upstream: MemoryUpstream | None = None
    ill: set[str] = field(default_factory=set)
    lives: int = 0
    most_endpoints: int = 0
    revoked_at: float | None = None
    away: list[tuple[float, float]] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    trace: str = ""
    took_s: float = 0.0

    def note(self, invariant: str, what: str) -> None:
        """Something that may not be."""
        if len(self.broken) < 20:
            self.broken.append((invariant, what))
