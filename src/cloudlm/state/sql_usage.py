"""Sums of ledger rows as questions to a database. No I/O."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from cloudlm.core.usage import DAY_S, UsageQuery, UsageRow, day_of
from cloudlm.state import tables
from cloudlm.state.usage import TOKEN_SUMS


def usage_statement(query: UsageQuery, dialect: str) -> sa.Select[Any]:
    """The sums as a question to a database."""
    table = tables.ledger.c
    days: sa.ColumnElement[Any] = table.started_at / DAY_S
    if dialect != "sqlite":  # there a cast rounds, and SQLite may be built without floor
        days = sa.func.floor(days)
    columns = {
        "day": sa.cast(days, sa.BigInteger).label("day"),
        "tenant": table.tenant,
        "project": table.project,
        "key": table.key_id.label("key"),
        "model": table.model,
    }
    groups = [columns[name] for name in query.group_by]
    first = sa.case((table.attempt == 1, 1), else_=0)
    sums = [sa.func.sum(first).label("requests"), sa.func.count().label("attempts")]
    sums += [sa.func.sum(table[name]).label(name) for name in TOKEN_SUMS]
    statement = sa.select(*groups, *sums).where(
        table.started_at >= query.since, table.started_at < query.until
    )
    for name in ("tenant", "project"):
        wanted = getattr(query, name)
        if wanted is not None:
            statement = statement.where(table[name] == wanted)
    if groups:
        return statement.group_by(*groups).order_by(*groups)
    return statement.having(sa.func.count() > 0)


def usage_of(row: sa.Row[Any]) -> UsageRow:
    """A row of ``usage_statement``'s answer."""
    values: dict[str, Any] = {
        name: value if isinstance(value, str) else int(value)  # sums are Decimals in PostgreSQL
        for name, value in row._asdict().items()
    }
    if "day" in values:
        values["day"] = day_of(values["day"] * DAY_S)
    return UsageRow(**values)
