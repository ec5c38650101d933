"""Who is asking: keys and their roles, and the ledger rows that account for them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a key may do: ``admin`` everything, ``user`` inference only."""

    ADMIN = "admin"
    USER = "user"


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """An API key as it is stored: never its secret, only a digest of the whole key."""

    id: str
    name: str
    role: Role
    digest: str
    last4: str
    tenant: str = "default"
    created_at: float = 0.0
    revoked_at: float | None = None


class Outcome(StrEnum):
    """How one attempt ended."""

    FINISHED = "finished"
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One attempt of one request: who, what, where, how it ended, tokens really relayed."""

    id: str
    request_id: str
    attempt: int
    tenant: str
    key_id: str
    model: str
    replica: str
    outcome: Outcome
    status: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    started_at: float
    duration_s: float
    first_token_s: float | None = None
