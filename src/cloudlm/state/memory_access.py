"""Identities and keys in this process's memory; see ``state.access.AccessState``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cloudlm.core.access import (
    FIRST_IDENTITIES,
    CustomRole,
    Identities,
    Identity,
    Principal,
    Project,
    Tenant,
)
from cloudlm.core.tenant import KeyRecord, LedgerRow
from cloudlm.state.access import (
    check_empty,
    check_key_replaced,
    check_parent,
    check_replaced,
    identity_key,
    keys_without_principal,
    sorted_identities,
    without_principal,
)
from cloudlm.state.decide import key_exists, revoked_key


class MemoryAccess:
    """The identities and keys of ``MemoryState``."""

    def __init__(self) -> None:
        super().__init__()
        self._identities: dict[tuple[type, tuple[str, ...]], Identity] = {}
        self._keys: dict[str, KeyRecord] = {}
        self._ledger: dict[str, LedgerRow] = {}
        self._version = 0
        first = FIRST_IDENTITIES
        facts: list[Identity] = [*first.tenants, *first.projects, *first.principals]
        for fact in facts:
            self._identities[type(fact), identity_key(fact)] = fact

    async def list_identities(self) -> Identities:
        return sorted_identities(self._identities.values())

    async def put_identity(self, fact: Identity, *, replaces: Identity | None = None) -> None:
        place = type(fact), identity_key(fact)
        stored = self._identities.get(place)
        check_replaced(fact, stored, replaces)
        check_parent(fact, sorted_identities(self._identities.values()))
        if fact != stored:
            self._identities[place] = fact
            self._version += 1

    async def remove_identity(self, fact: Tenant | Project | CustomRole) -> None:
        place = type(fact), identity_key(fact)
        check_replaced(fact, self._identities.get(place), fact)
        everything = sorted_identities(self._identities.values())
        check_empty(fact, everything, await self.list_keys())
        del self._identities[place]
        self._version += 1

    async def remove_principal(
        self, principal_id: str, *, heir: str, heir_key: str, now: float
    ) -> Principal | None:
        gone = self._identities.get((Principal, (principal_id,)))
        if not isinstance(gone, Principal):
            return None
        everything = sorted_identities(self._identities.values())
        changed = without_principal(gone, everything.principals, heir)
        for key in keys_without_principal(gone, await self.list_keys(), heir_key, now):
            self._keys[key.id] = key
        for one in changed:
            self._identities[Principal, (one.id,)] = one
        del self._identities[Principal, (principal_id,)]
        self._version += 1
        return gone

    async def put_key(self, record: KeyRecord) -> None:
        if record.id in self._keys:
            raise key_exists(record.id)
        self._keys[record.id] = record
        self._version += 1

    async def get_key(self, key_id: str) -> KeyRecord | None:
        return self._keys.get(key_id)

    async def list_keys(self) -> list[KeyRecord]:
        return sorted(self._keys.values(), key=lambda record: (record.created_at, record.id))

    async def change_key(
        self, wanted: KeyRecord, *, replaces: KeyRecord, successor: KeyRecord | None = None
    ) -> None:
        stored = check_key_replaced(self._keys.get(replaces.id), replaces)
        if successor is not None and successor.id in self._keys:
            raise key_exists(successor.id)
        self._keys[stored.id] = replace(wanted, last_used_at=stored.last_used_at)
        if successor is not None:
            self._keys[successor.id] = successor
        self._version += 1

    async def revoke_key(self, key_id: str, *, now: float) -> KeyRecord | None:
        current = self._keys.get(key_id)
        if current is None:
            return None
        revoked = revoked_key(current, now)
        if revoked is not current:
            self._keys[key_id] = revoked
            self._version += 1
        return revoked

    async def touch_keys(self, used: Mapping[str, float]) -> None:
        for key_id, at in used.items():
            record = self._keys.get(key_id)
            if record is not None and at > (record.last_used_at or 0.0):
                self._keys[key_id] = replace(record, last_used_at=at)

    async def last_uses(self) -> dict[str, float]:
        found = {
            record.id: record.last_used_at
            for record in self._keys.values()
            if record.last_used_at is not None
        }
        for row in self._ledger.values():
            if row.key_id in self._keys:
                found[row.key_id] = max(row.started_at, found.get(row.key_id, row.started_at))
        return found
