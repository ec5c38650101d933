"""Who is asking: keys and built-in roles' names, and the ledger rows that account for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from cloudlm.core.access import DEFAULT_PROJECT, DEFAULT_TENANT, ROOT, Limits
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
    """The built-in roles; what each may do is in ``security.roles``."""

    OWNER = "owner"
    ADMIN = "admin"
    OPERATOR = "operator"
    DEVELOPER = "developer"
    VIEWER = "viewer"
    USER = "user"
    AUDITOR = "auditor"


SESSION = "@"
"""What the id of a signed-in person's session begins with, before the principal's id. No key has
such an id, and nothing is stored under it."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """An API key as it is stored: never its secret, only a digest of the whole key.

    It speaks for ``principal``, narrowed to ``role`` within ``scope`` and, for inference, to
    ``models`` (names, or beginnings with ``*``). ``made_with`` is the id of the key that made it,
    which it can never exceed; empty for a key of the installation itself. After ``expires_at`` it
    is refused. Requests are accounted to ``tenant`` and ``project``.
    """

    id: str
    name: str
    role: str
    digest: str
    last4: str
    tenant: str = DEFAULT_TENANT
    created_at: float = 0.0
    revoked_at: float | None = None
    project: str = DEFAULT_PROJECT
    principal: str = ROOT
    scope: str = DEFAULT_TENANT
    models: tuple[str, ...] = ("*",)
    limits: Limits = field(default_factory=Limits)
    expires_at: float | None = None
    made_with: str = ""
    last_used_at: float | None = None

    def usable(self, now: float) -> bool:
        """Whether it is neither revoked nor expired at ``now``."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class Outcome(StrEnum):
    """How one attempt ended; CACHED: the gateway knew the answer and sent it to no replica;
    SEMANTIC: it knew that of a question that means the same."""

    FINISHED = "finished"
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"
    CACHED = "cached"
    SEMANTIC = "semantic"


class LedgerRow(msgspec.Struct, frozen=True):
    """One attempt of one request: who, what, where, how it ended, tokens really relayed, and their
    cost at the price of that moment, in billionths of the currency.

    Two are made for each request (the first tells what it leaves if the gateway dies), and a frozen
    dataclass of so many fields takes ten times as long to make."""

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
    project: str = DEFAULT_PROJECT
    cost: int = 0
