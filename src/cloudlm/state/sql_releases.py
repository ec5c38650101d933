"""Revisions and roll-outs in a database; see ``state.releases.ReleaseState``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from cloudlm.core.deployment import Deployment
from cloudlm.core.rollout import Outcome, Revision, Rollout
from cloudlm.core.tenant import LedgerRow
from cloudlm.state import releases, tables
from cloudlm.state import rows as as_rows
from cloudlm.state.sql_access import bump, one_row
from cloudlm.state.sql_leases import SqlLeases


class SqlReleases(SqlLeases):
    """The revisions and roll-outs of ``SqlState``."""

    async def list_revisions(self, name: str) -> list[Revision]:
        return [as_rows.revision_of(row) for row in await self._database.read(_revisions(name))]

    async def fix_revision(
        self, name: str, number: int, *, model: str, adapters: Mapping[str, str]
    ) -> None:
        await self._change(name, number, lambda found: releases.fixed(found, model, adapters))

    async def end_revision(
        self, name: str, number: int, outcome: Outcome, *, reason: str, now: float
    ) -> None:
        await self._change(name, number, lambda found: releases.ended(found, outcome, reason, now))

    async def return_to(
        self,
        name: str,
        number: int,
        *,
        reason: str,
        now: float,
        expected_generation: int | None = None,
    ) -> Deployment:
        async def work(connection: AsyncConnection) -> Deployment:
            row = await one_row(connection, tables.deployments, name=name)
            current = None if row is None else as_rows.deployment_of(row)
            found = (await connection.execute(_revisions(name))).all()
            revisions = [as_rows.revision_of(one) for one in found]
            wanted, changed = releases.returning(
                name, current, revisions, number, reason, now, expected_generation
            )
            if wanted is not current:
                values = [as_rows.deployment_values(wanted)]
                await self._upsert(connection, tables.deployments, values)
                if changed:
                    notes = [as_rows.revision_values(name, one) for one in changed]
                    await self._upsert(connection, tables.revisions, notes)
                await bump(connection)
            return wanted

        return await self._database.write(work)

    async def add_scores(
        self, name: str, number: int, *, count: int, total: float
    ) -> Revision | None:
        return await self._change(name, number, lambda found: releases.scored(found, count, total))

    async def get_rollout(self, name: str) -> Rollout | None:
        row = await self._read_one(tables.rollouts, name=name)
        return None if row is None else as_rows.rollout_of(row)

    async def list_rollouts(self) -> list[Rollout]:
        statement = sa.select(tables.rollouts).order_by(tables.rollouts.c.name)
        return [as_rows.rollout_of(row) for row in await self._database.read(statement)]

    async def put_rollout(self, wanted: Rollout, *, replaces: Rollout | None) -> None:
        async def work(connection: AsyncConnection) -> None:
            if await one_row(connection, tables.deployments, name=wanted.name) is None:
                raise releases.no_deployment(wanted.name)
            row = await one_row(connection, tables.rollouts, name=wanted.name)
            stored = None if row is None else as_rows.rollout_of(row)
            releases.check_rollout_replaced(stored, replaces, wanted.name)
            await self._upsert(connection, tables.rollouts, [as_rows.rollout_values(wanted)])

        await self._database.write(work)

    async def latest_attempts(self, group: str, *, since: float, limit: int) -> list[LedgerRow]:
        first, last = releases.around_group(group)
        ledger = tables.ledger.c
        statement = (
            sa.select(tables.ledger)
            .where(ledger.started_at >= since, ledger.replica >= first, ledger.replica < last)
            .order_by(ledger.started_at.desc(), ledger.id.desc())
            .limit(max(limit, 0))
        )
        found = await self._database.read(statement)
        return [as_rows.ledger_of(row) for row in found if releases.in_group(group, row.replica)]

    async def _change(
        self, name: str, number: int, change: Callable[[Revision], Revision]
    ) -> Revision | None:
        async def work(connection: AsyncConnection) -> Revision | None:
            statement = _revisions(name).where(tables.revisions.c.number == number)
            row = (await connection.execute(statement)).one_or_none()
            if row is None:
                return None
            found = as_rows.revision_of(row)
            wanted = change(found)
            if wanted != found:
                values = [as_rows.revision_values(name, wanted)]
                await self._upsert(connection, tables.revisions, values)
            return wanted

        return await self._database.write(work)

    async def _note_revision(
        self, connection: AsyncConnection, deployment: Deployment, by: str
    ) -> None:
        """Remember a revision that is new, and of one that is not how it is asked for now."""
        name = deployment.spec.name
        revisions = tables.revisions
        mine = sa.select(revisions.c.number).where(revisions.c.name == name)
        known = set((await connection.execute(mine)).scalars())
        note = releases.first_note(deployment, by)
        if deployment.revision in known:
            spec = as_rows.revision_values(name, note)["spec"]
            same = sa.and_(revisions.c.name == name, revisions.c.number == deployment.revision)
            await connection.execute(sa.update(revisions).where(same).values(spec=spec))
            return
        await connection.execute(sa.insert(revisions), [as_rows.revision_values(name, note)])
        row = await one_row(connection, tables.rollouts, name=name)
        needed = {note.number, 0 if row is None else as_rows.rollout_of(row).stable}
        gone = releases.forgotten(known | {note.number}, needed)
        if gone:
            await connection.execute(
                sa.delete(revisions).where(revisions.c.name == name, revisions.c.number.in_(gone))
            )


def _revisions(name: str) -> sa.Select[tuple[object, ...]]:
    table = tables.revisions
    return sa.select(table).where(table.c.name == name).order_by(table.c.number.desc())
