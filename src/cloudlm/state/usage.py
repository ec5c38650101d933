"""Sums of ledger rows that are at hand; ``sql_usage`` asks databases for the same. No I/O."""

from __future__ import annotations

from collections.abc import Iterable

from cloudlm.core.tenant import LedgerRow
from cloudlm.core.usage import UsageQuery, UsageRow, day_of

TOKEN_SUMS = ("prompt_tokens", "cached_tokens", "completion_tokens", "cost")


def summed(query: UsageQuery, rows: Iterable[LedgerRow]) -> list[UsageRow]:
    """The sums of rows that are at hand."""
    found: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        if not query.since <= row.started_at < query.until:
            continue
        if query.tenant not in (None, row.tenant) or query.project not in (None, row.project):
            continue
        sums = found.setdefault(
            tuple(_name(row, group) for group in query.group_by), [0] * (2 + len(TOKEN_SUMS))
        )
        sums[0] += row.attempt == 1
        sums[1] += 1
        for place, name in enumerate(TOKEN_SUMS, 2):
            sums[place] += getattr(row, name)
    return [
        _row(dict(zip(query.group_by, names, strict=True)), sums)
        for names, sums in sorted(found.items())
    ]


def _name(row: LedgerRow, group: str) -> str:
    if group == "day":
        return day_of(row.started_at)
    return str(getattr(row, "key_id" if group == "key" else group))


def _row(names: dict[str, str], sums: list[int]) -> UsageRow:
    counts = dict(zip(("requests", "attempts", *TOKEN_SUMS), sums, strict=True))
    return UsageRow(**names, **counts)  # type: ignore[arg-type]
