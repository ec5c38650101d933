"""The audit log in a database; see ``state.audit.AuditState``.

The chain's end lies in a row of its own, which every appender locks first: so two processes cannot
chain to the same record, and a transaction that is cut off leaves the log as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from cloudlm.core.audit import (
    AuditEvent,
    AuditHead,
    AuditOutcome,
    AuditRecord,
    Checkpoint,
    chained,
)
from cloudlm.state import tables
from cloudlm.state.sql_access import SqlAccess


class SqlAudit(SqlAccess):
    """The audit log of ``SqlState``."""

    async def append_audit(self, events: Sequence[AuditEvent]) -> AuditHead:
        async def work(connection: AsyncConnection) -> AuditHead:
            locked = sa.select(tables.audit_head).with_for_update()
            row = (await connection.execute(locked)).one()
            records = chained(AuditHead(row.seq, row.hash), events)
            if not records:
                return AuditHead(row.seq, row.hash)
            await connection.execute(sa.insert(tables.audit), [_values(one) for one in records])
            last = records[-1]
            await connection.execute(
                sa.update(tables.audit_head).values(seq=last.seq, hash=last.hash)
            )
            return AuditHead(last.seq, last.hash)

        return await self._database.write(work, alone=False)

    async def list_audit(
        self, *, after: int = 0, limit: int = 1000, tenant: str | None = None
    ) -> list[AuditRecord]:
        statement = sa.select(tables.audit).where(tables.audit.c.seq > after)
        if tenant is not None:
            statement = statement.where(tables.audit.c.tenant == tenant)
        statement = statement.order_by(tables.audit.c.seq).limit(max(limit, 0))
        return [_record(row) for row in await self._database.read(statement)]

    async def audit_head(self) -> AuditHead:
        rows = await self._database.read(sa.select(tables.audit_head))
        return AuditHead(rows[0].seq, rows[0].hash) if rows else AuditHead()

    async def put_checkpoint(self, checkpoint: Checkpoint) -> None:
        async def work(connection: AsyncConnection) -> None:
            await self._upsert(connection, tables.audit_checkpoints, [asdict(checkpoint)])

        await self._database.write(work, alone=False)

    async def list_checkpoints(self) -> list[Checkpoint]:
        statement = sa.select(tables.audit_checkpoints).order_by(tables.audit_checkpoints.c.seq)
        return [Checkpoint(**row._asdict()) for row in await self._database.read(statement)]


def _values(record: AuditRecord) -> dict[str, object]:
    event = {**asdict(record.event), "outcome": record.event.outcome.value}
    return {"seq": record.seq, **event, "previous": record.previous, "hash": record.hash}


def _record(row: sa.Row[tuple[object, ...]]) -> AuditRecord:
    values = row._asdict()
    place = {name: values.pop(name) for name in ("seq", "previous", "hash")}
    # A record is shown as it lies there, also with an outcome that somebody made up.
    known = values["outcome"] in AuditOutcome._value2member_map_
    values["outcome"] = AuditOutcome(values["outcome"]) if known else values["outcome"]
    return AuditRecord(event=AuditEvent(**values), **place)
