"""Who is asking: keys and their roles, and the ledger rows that account for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from cloudlm.core.errors import BadSetting

MIN_WEIGHT = 0.001
MAX_WEIGHT = 1000.0
"""How small and how large a tenant's share of a replica may be beside others'; 1 is usual."""


TENANT_HEADER = "x-cloudlm-tenant"
WEIGHT_HEADER = "x-cloudlm-weight"
"""How a gateway tells a worker whose share a request uses, and how large it is."""


def read_weights(text: str) -> dict[str, float]:
    """Weights by tenant out of ``name=weight, …``. Raises BadSetting."""
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (piece.strip() for piece in part.rpartition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            raise BadSetting(
                f"gateway.tenant_weights: {part!r:.80} must be name=weight with a weight from "
                f"{MIN_WEIGHT} to {MAX_WEIGHT}",
                param="gateway.tenant_weights",
            )
        weights[name] = weight
    return weights


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
