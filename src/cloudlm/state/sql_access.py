"""Identities and keys in a database; see ``state.access.AccessState``.

Identities are few and small: a write reads all of them and lets ``state.access`` decide, in one
exclusive transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from cloudlm.core.access import (
    CustomRole,
    Identities,
    Identity,
    Principal,
    Project,
    Tenant,
)
from cloudlm.core.tenant import KeyRecord
from cloudlm.state import rows as as_rows
from cloudlm.state import tables
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
from cloudlm.state.database import Database
from cloudlm.state.decide import key_exists, revoked_key
from cloudlm.state.documents import load_identity

_TABLES: Mapping[type[Identity], sa.Table] = {
    Tenant: tables.tenants,
    Project: tables.projects,
    Principal: tables.principals,
    CustomRole: tables.roles,
}
_EVERY_IDENTITY = sa.union_all(
    *(
        sa.select(sa.literal(kind.__name__).label("kind"), table.c.document)
        for kind, table in _TABLES.items()
    )
)


class SqlAccess:
    """The identities and keys of ``SqlState``, and the two verbs that all its tables share."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._insert: Any = sqlite.insert if database.dialect == "sqlite" else postgresql.insert

    async def list_identities(self) -> Identities:
        found = await self._database.read(_EVERY_IDENTITY)
        return sorted_identities(load_identity(row.kind, row.document) for row in found)

    async def put_identity(self, fact: Identity, *, replaces: Identity | None = None) -> None:
        async def work(connection: AsyncConnection) -> None:
            everything = await _identities(connection)
            stored = _find(everything, fact)
            check_replaced(fact, stored, replaces)
            check_parent(fact, everything)
            if fact != stored:
                values = as_rows.identity_values(fact)
                await self._upsert(connection, _TABLES[type(fact)], [values])
                await bump(connection)

        await self._database.write(work)

    async def remove_identity(self, fact: Tenant | Project | CustomRole) -> None:
        async def work(connection: AsyncConnection) -> None:
            everything = await _identities(connection)
            check_replaced(fact, _find(everything, fact), fact)
            check_empty(fact, everything, await _all_keys(connection))
            await _delete(connection, fact)
            await bump(connection)

        await self._database.write(work)

    async def remove_principal(
        self, principal_id: str, *, heir: str, heir_key: str, now: float
    ) -> Principal | None:
        async def work(connection: AsyncConnection) -> Principal | None:
            everything = await _identities(connection)
            gone = next((one for one in everything.principals if one.id == principal_id), None)
            if gone is None:
                return None
            changed = without_principal(gone, everything.principals, heir)
            keys = keys_without_principal(gone, await _all_keys(connection), heir_key, now)
            if changed:
                values = [as_rows.identity_values(one) for one in changed]
                await self._upsert(connection, tables.principals, values)
            if keys:
                rows = [as_rows.key_values(key) for key in keys]
                await self._upsert(connection, tables.api_keys, rows)
            await _delete(connection, gone)
            await bump(connection)
            return gone

        return await self._database.write(work)

    async def put_key(self, record: KeyRecord) -> None:
        async def work(connection: AsyncConnection) -> None:
            await _insert_key(connection, record)
            await bump(connection)

        await self._database.write(work)

    async def get_key(self, key_id: str) -> KeyRecord | None:
        row = await self._read_one(tables.api_keys, id=key_id)
        return None if row is None else as_rows.key_of(row)

    async def list_keys(self) -> list[KeyRecord]:
        return [as_rows.key_of(row) for row in await self._database.read(_KEYS)]

    async def change_key(
        self, wanted: KeyRecord, *, replaces: KeyRecord, successor: KeyRecord | None = None
    ) -> None:
        async def work(connection: AsyncConnection) -> None:
            row = await one_row(connection, tables.api_keys, id=replaces.id)
            check_key_replaced(None if row is None else as_rows.key_of(row), replaces)
            values = as_rows.key_values(wanted)
            del values["last_used_at"]
            await connection.execute(
                sa.update(tables.api_keys).where(tables.api_keys.c.id == replaces.id), values
            )
            if successor is not None:
                await _insert_key(connection, successor)
            await bump(connection)

        await self._database.write(work)

    async def revoke_key(self, key_id: str, *, now: float) -> KeyRecord | None:
        async def work(connection: AsyncConnection) -> KeyRecord | None:
            row = await one_row(connection, tables.api_keys, id=key_id)
            if row is None:
                return None
            current = as_rows.key_of(row)
            revoked = revoked_key(current, now)
            if revoked is not current:
                await self._upsert(connection, tables.api_keys, [as_rows.key_values(revoked)])
                await bump(connection)
            return revoked

        return await self._database.write(work)

    async def touch_keys(self, used: Mapping[str, float]) -> None:
        keys = tables.api_keys.c

        async def work(connection: AsyncConnection) -> None:
            for key_id in sorted(used):
                later = sa.or_(keys.last_used_at.is_(None), keys.last_used_at < used[key_id])
                await connection.execute(
                    sa.update(tables.api_keys)
                    .where(keys.id == key_id, later)
                    .values(last_used_at=used[key_id])
                )

        await self._database.write(work, alone=False)

    async def last_uses(self) -> dict[str, float]:
        keys, ledger = tables.api_keys.c, tables.ledger.c
        served = (
            sa.select(sa.func.max(ledger.started_at))
            .where(ledger.key_id == keys.id)
            .scalar_subquery()
        )
        rows = await self._database.read(sa.select(keys.id, keys.last_used_at, served.label("at")))
        times = {row.id: [t for t in (row.last_used_at, row.at) if t is not None] for row in rows}
        return {key_id: max(found) for key_id, found in times.items() if found}

    async def _read_one(self, table: sa.Table, **key: str) -> sa.Row[Any] | None:
        rows = await self._database.read(sa.select(table).filter_by(**key))
        return rows[0] if rows else None

    async def _upsert(
        self, connection: AsyncConnection, table: sa.Table, values: list[dict[str, Any]]
    ) -> None:
        """Insert rows, or change those whose primary key is there."""
        statement = self._insert(table)
        changed = {
            column.name: statement.excluded[column.name]
            for column in table.columns
            if not column.primary_key
        }
        keys = [column.name for column in table.primary_key]
        await connection.execute(
            statement.on_conflict_do_update(index_elements=keys, set_=changed), values
        )


_KEYS = sa.select(tables.api_keys).order_by(tables.api_keys.c.created_at, tables.api_keys.c.id)


async def one_row(connection: AsyncConnection, table: sa.Table, **key: str) -> sa.Row[Any] | None:
    """The row with this primary key."""
    return (await connection.execute(sa.select(table).filter_by(**key))).one_or_none()


async def bump(connection: AsyncConnection) -> None:
    """Count a change that gateways must see."""
    await connection.execute(
        sa.update(tables.state_version).values(value=tables.state_version.c.value + 1)
    )


async def _identities(connection: AsyncConnection) -> Identities:
    rows = (await connection.execute(_EVERY_IDENTITY)).all()
    return sorted_identities(load_identity(row.kind, row.document) for row in rows)


async def _all_keys(connection: AsyncConnection) -> list[KeyRecord]:
    return [as_rows.key_of(row) for row in (await connection.execute(_KEYS)).all()]


def _find(everything: Identities, fact: Identity) -> Identity | None:
    of_kind: Mapping[type[Identity], Sequence[Identity]] = {
        Tenant: everything.tenants,
        Project: everything.projects,
        Principal: everything.principals,
        CustomRole: everything.roles,
    }
    wanted = identity_key(fact)
    return next((one for one in of_kind[type(fact)] if identity_key(one) == wanted), None)


async def _delete(connection: AsyncConnection, fact: Identity) -> None:
    table = _TABLES[type(fact)]
    place = zip(table.primary_key, identity_key(fact), strict=True)
    await connection.execute(sa.delete(table).where(*(column == value for column, value in place)))


async def _insert_key(connection: AsyncConnection, record: KeyRecord) -> None:
    if await one_row(connection, tables.api_keys, id=record.id) is not None:
        raise key_exists(record.id)
    await connection.execute(sa.insert(tables.api_keys), [as_rows.key_values(record)])
