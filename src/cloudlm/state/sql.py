"""State in a database: SQLite for one machine, PostgreSQL for several.

What a write makes of what is there is decided in ``decide``, as in the memory twin; this module
reads, writes and counts ``version`` in the same transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from cloudlm.core.deployment import Demand, Deployment, DeploymentSpec, DeploymentStatus, Endpoint
from cloudlm.core.job import Job, JobState
from cloudlm.core.lease import Lease
from cloudlm.core.pace import Pace
from cloudlm.core.tenant import LedgerRow
from cloudlm.core.usage import UsageQuery, UsageRow
from cloudlm.state import rows as as_rows
from cloudlm.state import tables
from cloudlm.state.base import State
from cloudlm.state.decide import (
    changed_deployment,
    check_job_change,
    deleting_deployment,
)
from cloudlm.state.documents import (
    check_endpoints,
    dump_spec,
    load_pace,
    load_spec,
    plain_job,
)
from cloudlm.state.sql_access import bump, one_row
from cloudlm.state.sql_leases import holding
from cloudlm.state.sql_releases import SqlReleases
from cloudlm.state.sql_usage import usage_of, usage_statement

_LEDGER_BATCH = 1024
_LEDGER_SLICE = 512


@lru_cache(64)
def _ledger_insert(mark: str, count: int) -> str:
    """One statement for many rows. Row by row, the database's thread and the event loop would hand
    the interpreter's lock to and fro for each, which costs a busy gateway half its time."""
    row = f"({', '.join([mark] * len(as_rows.LEDGER_COLUMNS))})"
    names = f"{tables.ledger.name} ({', '.join(as_rows.LEDGER_COLUMNS)})"
    rows = ", ".join([row] * count)
    # Names of ours and marks for values: nothing in it comes from anybody else.
    return f"INSERT INTO {names} VALUES {rows} ON CONFLICT (id) DO NOTHING"  # noqa: S608


class SqlState(SqlReleases):
    """See ``state.base.State``. Made by ``open.open_state``."""

    # Desired and observed deployments -----------------------------------------------------------

    async def put_deployment(
        self,
        spec: DeploymentSpec,
        *,
        now: float,
        expected_generation: int | None = None,
        by: str = "",
    ) -> Deployment:
        spec = load_spec(dump_spec(spec))

        async def work(connection: AsyncConnection) -> Deployment:
            row = await one_row(connection, tables.deployments, name=spec.name)
            current = None if row is None else as_rows.deployment_of(row)
            wanted = changed_deployment(current, spec, now, expected_generation)
            kept = await self._keep(connection, current, wanted)
            await self._note_revision(connection, kept, by)
            return kept

        return await self._database.write(work)

    async def get_deployment(self, name: str) -> Deployment | None:
        row = await self._read_one(tables.deployments, name=name)
        return None if row is None else as_rows.deployment_of(row)

    async def list_deployments(self) -> list[Deployment]:
        found = await self._database.read(
            sa.select(tables.deployments).order_by(tables.deployments.c.name)
        )
        return [as_rows.deployment_of(row) for row in found]

    async def mark_deleting(self, name: str, *, now: float) -> Deployment | None:
        async def work(connection: AsyncConnection) -> Deployment | None:
            row = await one_row(connection, tables.deployments, name=name)
            if row is None:
                return None
            current = as_rows.deployment_of(row)
            return await self._keep(connection, current, deleting_deployment(current, now))

        return await self._database.write(work)

    async def remove_deployment(self, name: str, *, generation: int) -> bool:
        async def work(connection: AsyncConnection) -> bool:
            removed = await connection.execute(
                sa.delete(tables.deployments).where(
                    tables.deployments.c.name == name,
                    tables.deployments.c.generation == generation,
                    tables.deployments.c.deleting,
                )
            )
            if not removed.rowcount:
                return False
            await connection.execute(
                sa.delete(tables.endpoints).where(tables.endpoints.c.model == name)
            )
            await connection.execute(
                sa.delete(tables.paces).where(tables.paces.c.deployment == name)
            )
            await bump(connection)
            return True

        return await self._database.write(work)

    async def put_status(self, status: DeploymentStatus) -> None:
        """A status of a deployment that does not exist (any more) is not kept."""

        async def work(connection: AsyncConnection) -> None:
            if await one_row(connection, tables.deployments, name=status.name) is None:
                return
            statuses, values = tables.deployment_statuses, as_rows.status_values(status)
            before = await one_row(connection, statuses, name=status.name)
            await self._upsert(connection, statuses, [values])
            if (before.residence if before is not None else "") != status.residence.value:
                await bump(connection)

        await self._database.write(work)

    async def get_status(self, name: str) -> DeploymentStatus | None:
        row = await self._read_one(tables.deployment_statuses, name=name)
        return None if row is None else as_rows.status_of(row)

    async def list_statuses(self) -> list[DeploymentStatus]:
        """Sorted by name."""
        statement = sa.select(tables.deployment_statuses).order_by(
            tables.deployment_statuses.c.name
        )
        return [as_rows.status_of(row) for row in await self._database.read(statement)]

    # Endpoints and demand -----------------------------------------------------------------------

    async def put_endpoints(self, model: str, endpoints: Sequence[Endpoint]) -> None:
        wanted = check_endpoints(model, endpoints)
        statement = _endpoints_in_order().where(tables.endpoints.c.model == model)
        found = await self._database.read(statement)
        if wanted == [as_rows.endpoint_of(row) for row in found]:
            return  # the usual case: control repeats itself, and no writer is disturbed

        async def work(connection: AsyncConnection) -> None:
            rows = (await connection.execute(statement)).all()
            if wanted == [as_rows.endpoint_of(row) for row in rows]:
                return
            await connection.execute(
                sa.delete(tables.endpoints).where(tables.endpoints.c.model == model)
            )
            if wanted:
                values = [as_rows.endpoint_values(endpoint) for endpoint in wanted]
                await connection.execute(sa.insert(tables.endpoints), values)
            await bump(connection)

        await self._database.write(work)

    async def list_endpoints(self) -> list[Endpoint]:
        found = await self._database.read(_endpoints_in_order())
        return [as_rows.endpoint_of(row) for row in found]

    async def version(self) -> int:
        rows = await self._database.read(sa.select(tables.state_version.c.value))
        return int(rows[0].value)

    async def put_demand(self, demand: Sequence[Demand]) -> None:
        if not demand:
            return
        newest = {(one.model, one.gateway): as_rows.demand_values(one) for one in demand}

        async def work(connection: AsyncConnection) -> None:
            # In one order, so that two gateways cannot wait for each other.
            await self._upsert(connection, tables.demand, [newest[key] for key in sorted(newest)])

        await self._database.write(work, alone=False)

    async def list_demand(self, *, since: float) -> list[Demand]:
        """Sorted by model, then gateway."""
        found = await self._database.read(
            sa.select(tables.demand)
            .where(tables.demand.c.measured_at >= since)
            .order_by(tables.demand.c.model, tables.demand.c.gateway)
        )
        return [as_rows.demand_of(row) for row in found]

    async def drop_demand(self, demand: Sequence[Demand]) -> None:
        if not demand:
            return
        table = tables.demand
        # In one order, as reports are written.
        gone = sorted((one.model, one.gateway, one.measured_at) for one in demand)

        async def work(connection: AsyncConnection) -> None:
            for model, gateway, measured_at in gone:
                await connection.execute(
                    sa.delete(table).where(
                        table.c.model == model,
                        table.c.gateway == gateway,
                        table.c.measured_at == measured_at,
                    )
                )

        await self._database.write(work, alone=False)

    async def demand_mark(self) -> float:
        found = await self._database.read(sa.select(sa.func.max(tables.demand.c.measured_at)))
        return float(found[0][0] or 0.0)

    async def put_pace(self, pace: Pace) -> None:
        async def work(connection: AsyncConnection) -> None:
            await self._upsert(connection, tables.paces, [as_rows.pace_values(pace)])

        await self._database.write(work, alone=False)

    async def list_paces(self) -> list[Pace]:
        found = await self._database.read(
            sa.select(tables.paces.c.document).order_by(
                tables.paces.c.deployment, tables.paces.c.model
            )
        )
        return [load_pace(row.document) for row in found]

    # Jobs ---------------------------------------------------------------------------------------

    async def put_job(self, job: Job) -> None:
        job = plain_job(job)

        async def work(connection: AsyncConnection) -> None:
            row = await one_row(connection, tables.jobs, id=job.id)
            if check_job_change(None if row is None else as_rows.job_of(row), job):
                await self._upsert(connection, tables.jobs, [as_rows.job_values(job)])

        await self._database.write(work)

    async def get_job(self, job_id: str) -> Job | None:
        row = await self._read_one(tables.jobs, id=job_id)
        return None if row is None else as_rows.job_of(row)

    async def list_jobs(self, *, limit: int = 100) -> list[Job]:
        statement = sa.select(tables.jobs).order_by(
            tables.jobs.c.created_at.desc(), tables.jobs.c.id.desc()
        )
        found = await self._database.read(statement.limit(max(limit, 0)))
        return [as_rows.job_of(row) for row in found]

    async def list_unfinished_jobs(self, *, limit: int = 100) -> list[Job]:
        unfinished = [one.value for one in JobState if not one.ended]
        statement = sa.select(tables.jobs).where(tables.jobs.c.state.in_(unfinished))
        statement = statement.order_by(tables.jobs.c.created_at, tables.jobs.c.id)
        found = await self._database.read(statement.limit(max(limit, 0)))
        return [as_rows.job_of(row) for row in found]

    # Ledger -------------------------------------------------------------------------------------

    async def append_ledger(self, rows: Sequence[LedgerRow]) -> None:
        first: dict[str, LedgerRow] = {}
        for row in rows:
            first.setdefault(row.id, row)
        # In one order, so that two gateways cannot wait for each other.
        order = sorted(first)
        values: list[list[Any]] = []
        for begin in range(0, len(order), _LEDGER_SLICE):
            values += [
                as_rows.ledger_values(first[i]) for i in order[begin : begin + _LEDGER_SLICE]
            ]
            await asyncio.sleep(0)  # many rows must not hold up who waits for an answer
        if not values:
            return
        mark = "?" if self._database.dialect == "sqlite" else "%s"

        async def work(connection: AsyncConnection) -> None:
            start = 0
            while start < len(values):
                # Powers of two, so that few statements are ever prepared.
                count = min(_LEDGER_BATCH, 1 << (len(values) - start).bit_length() - 1)
                flat = tuple(chain.from_iterable(values[start : start + count]))
                await connection.exec_driver_sql(_ledger_insert(mark, count), flat)
                start += count

        await self._database.write(work, alone=False)

    async def list_ledger(
        self, *, since: float = 0.0, request_id: str | None = None, limit: int = 1000
    ) -> list[LedgerRow]:
        statement = sa.select(tables.ledger).where(tables.ledger.c.started_at >= since)
        if request_id is not None:
            statement = statement.where(tables.ledger.c.request_id == request_id)
        statement = statement.order_by(tables.ledger.c.started_at, tables.ledger.c.id).limit(
            max(limit, 0)
        )
        return [as_rows.ledger_of(row) for row in await self._database.read(statement)]

    async def usage(self, query: UsageQuery) -> list[UsageRow]:
        statement = usage_statement(query, self._database.dialect)
        return [usage_of(row) for row in await self._database.read(statement)]

    def fenced(self, lease: Lease) -> State:
        return SqlState(self._database.looking_first(holding(lease)))

    async def close(self) -> None:
        """Give all connections back; nothing may be asked afterwards."""
        await self._database.close()

    async def _keep(
        self, connection: AsyncConnection, current: Deployment | None, wanted: Deployment
    ) -> Deployment:
        if wanted is not current:
            await self._upsert(connection, tables.deployments, [as_rows.deployment_values(wanted)])
            await bump(connection)
        return wanted


def _endpoints_in_order() -> sa.Select[Any]:
    return sa.select(tables.endpoints).order_by(
        tables.endpoints.c.model, tables.endpoints.c.replica
    )
