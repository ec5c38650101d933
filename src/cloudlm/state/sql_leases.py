"""Leases in a database, and the look that refuses whoever holds one no longer; see
``state.leases.LeaseState``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from cloudlm.core.lease import Lease
from cloudlm.state import leases, tables
from cloudlm.state.database import Work
from cloudlm.state.sql_audit import SqlAudit


class SqlLeases(SqlAudit):
    """The leases of ``SqlState``."""

    async def get_lease(self, name: str) -> Lease:
        return _lease_of(name, await self._database.read(_named(name)))

    async def take_lease(self, name: str, holder: str, *, lasts_s: float, replaces: Lease) -> Lease:
        return await self._move(
            name, lambda stored: leases.taken(stored, holder, lasts_s, replaces)
        )

    async def renew_lease(self, lease: Lease) -> Lease:
        return await self._move(lease.name, lambda stored: leases.renewed(stored, lease))

    async def give_back_lease(self, lease: Lease) -> None:
        await self._move(lease.name, lambda stored: leases.given_back(stored, lease))

    async def _move(self, name: str, change: Callable[[Lease], Lease]) -> Lease:
        async def work(connection: AsyncConnection) -> Lease:
            # The row's lock orders it against the writes of who holds the lease.
            found = (await connection.execute(_named(name).with_for_update())).all()
            wanted = change(_lease_of(name, found))
            await self._upsert(connection, tables.leases, [asdict(wanted)])
            return wanted

        return await self._database.write(work)


def holding(lease: Lease) -> Work[None]:
    """What a write does first for whoever holds ``lease``."""

    async def look(connection: AsyncConnection) -> None:
        # Shared: writers do not wait for each other here, but a new holder for them.
        found = (await connection.execute(_named(lease.name).with_for_update(read=True))).all()
        leases.check_held(_lease_of(lease.name, found), lease)

    return look


def _named(name: str) -> sa.Select[Any]:
    return sa.select(tables.leases).where(tables.leases.c.name == name)


def _lease_of(name: str, rows: Any) -> Lease:
    return Lease(**rows[0]._asdict()) if rows else Lease(name)
