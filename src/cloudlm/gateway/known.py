"""What is worked out once and asked for with every request: whose key this is, what a tenant's
cache is salted with. Bounded, forgotten at will; a record is always the one in the present view, so
a revoked key is refused at once. Must not decide whether a key is good.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

from cloudlm.core.tenant import TENANT_HEADER, WEIGHT_HEADER, KeyRecord
from cloudlm.gateway.view import Snapshot
from cloudlm.security import keys

MAX_KNOWN_KEYS = 10_000


class KnownKeys:
    """Keys that were verified, found again by a digest of their text with a salt of this process.

    An entry holds the key's id and the digest its record had; a record that changed since, or is
    gone, revoked or expired, or stands on nobody any more, is not found, and the key is verified
    anew.
    """

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(16)
        self._known: dict[bytes, tuple[str, str]] = {}
        self._view: Snapshot | None = None
        self._standing: dict[bytes, KeyRecord] = {}  # those that stand in this view

    def find(self, headers: Mapping[str, str], view: Snapshot, now: float) -> KeyRecord | None:
        """The record of a key that was verified before and is still good at ``now``."""
        mark = self._mark(headers)
        if view is not self._view:
            self._view = view
            self._standing.clear()
        record = self._standing.get(mark)
        if record is None:
            found = self._known.get(mark)
            record = view.keys.get(found[0]) if found is not None else None
            if found is None or record is None or record.digest != found[1]:
                return None
            if not view.directory.stands(record):
                return None
            self._standing[mark] = record
        return record if record.usable(now) else None

    def remember(self, headers: Mapping[str, str], record: KeyRecord) -> None:
        """``record`` was verified with what these headers hold."""
        if len(self._known) >= MAX_KNOWN_KEYS:
            self._known.clear()
            self._standing.clear()
        self._known[self._mark(headers)] = (record.id, record.digest)

    def _mark(self, headers: Mapping[str, str]) -> bytes:
        text = headers.get("authorization", "")
        if "x-api-key" in headers:
            text = f"{text}\0{headers['x-api-key']}"
        raw = text.encode("utf-8", "surrogatepass")
        return blake2b(self._salt + raw, digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class TenantFacts:
    """What replicas are told of a tenant: never its name. ``salt`` is for requests that bring no
    salt of their own."""

    salt: str
    headers: dict[str, str]


class Tenants:
    """The facts of each tenant. ``weights`` may change; then ``forget``."""

    def __init__(self, pepper: bytes, weights: Mapping[str, float]) -> None:
        self._pepper = pepper
        self._weights = weights
        self.facts = lru_cache(4096)(self._facts)

    def _facts(self, tenant: str) -> TenantFacts:
        told = {
            TENANT_HEADER: keys.tenant_mark(tenant, self._pepper),
            WEIGHT_HEADER: f"{self._weights.get(tenant, 1.0):g}",
        }
        return TenantFacts(keys.cache_salt(tenant, self._pepper), told)

    def forget(self) -> None:
        """The weights are others now."""
        self.facts.cache_clear()

    def salted(self, tenant: str, wanted: str) -> str:
        """The cache salt of a tenant's request that brought the salt ``wanted``."""
        if not wanted:
            return self.facts(tenant).salt
        return keys.cache_salt(tenant, self._pepper, wanted)
