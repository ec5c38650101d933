"""Leases in this process's memory; see ``state.leases.LeaseState``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloudlm.core.lease import Lease
from cloudlm.state import leases


class MemoryLeases:
    """The leases of ``MemoryState``."""

    def __init__(self) -> None:
        super().__init__()
        self._leases: dict[str, Lease] = {}

    async def get_lease(self, name: str) -> Lease:
        return self._lease(name)

    async def take_lease(self, name: str, holder: str, *, lasts_s: float, replaces: Lease) -> Lease:
        kept = leases.taken(self._lease(name), holder, lasts_s, replaces)
        self._leases[name] = kept
        return kept

    async def renew_lease(self, lease: Lease) -> Lease:
        kept = leases.renewed(self._lease(lease.name), lease)
        self._leases[lease.name] = kept
        return kept

    async def give_back_lease(self, lease: Lease) -> None:
        self._leases[lease.name] = leases.given_back(self._lease(lease.name), lease)

    def _lease(self, name: str) -> Lease:
        return self._leases.get(name, Lease(name))


class FencedMemory:
    """A memory state for whoever holds a lease: nothing is awaited between looking and writing."""

    def __init__(self, state: MemoryLeases, stored: Mapping[str, Lease], lease: Lease) -> None:
        self._state = state
        self._stored = stored
        self._lease = lease

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._state, name)
        if leases.only_reads(name):
            return found

        async def written(*arguments: object, **named: object) -> Any:
            leases.check_held(self._stored.get(self._lease.name, self._lease), self._lease)
            return await found(*arguments, **named)

        return written
