"""What was used and what it cost: sums of ledger rows, by day, tenant, project, key and model; and
their forms in JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, ClassVar

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.fields import Fields
from cloudlm.core.price import NANO

DAY_S = 86_400
SUMS = (
    "requests",
    "attempts",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "cost",
)
GROUPS = ("day", "tenant", "project", "key", "model")


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Rows begun from ``since`` until before ``until`` (Unix seconds), summed for each value of
    ``group_by``. ``tenant`` and ``project`` None are all of them."""

    since: float
    until: float
    group_by: tuple[str, ...] = ("day",)
    tenant: str | None = None
    project: str | None = None


@dataclass(frozen=True, slots=True)
class UsageRow:
    """The sums of one group; names that it is not grouped by are empty. ``day`` is a UTC date,
    ``requests`` counts first attempts, ``cost`` is in billionths of the currency."""

    day: str = ""
    tenant: str = ""
    project: str = ""
    key: str = ""
    model: str = ""
    requests: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: int = 0

    NAMES: ClassVar[tuple[str, ...]] = GROUPS


def merged(group_by: tuple[str, ...], rows: Iterable[UsageRow]) -> list[UsageRow]:
    """Rows of the same group added up, in the order of their names."""
    found: dict[tuple[str, ...], UsageRow] = {}
    for row in rows:
        names = tuple(str(getattr(row, name)) for name in group_by)
        known = found.get(names)
        found[names] = row if known is None else _added(known, row)
    return [found[names] for names in sorted(found)]


def _added(one: UsageRow, other: UsageRow) -> UsageRow:
    sums = {name: getattr(one, name) + getattr(other, name) for name in SUMS}
    return replace(one, **sums)


def money(cost: int) -> str:
    """Billionths of the currency as a decimal number, exactly."""
    whole, rest = divmod(cost, NANO)
    return f"{whole}.{rest:09d}"


def usage_body(row: UsageRow) -> dict[str, str | int]:
    """A row as JSON: ``cost`` is a decimal number as a text, so that no digit is lost."""
    return {**asdict(row), "cost": money(row.cost)}


def usage_from_body(body: Any) -> UsageRow:
    """Read what ``usage_body`` wrote. Raises InvalidRequest."""
    fields = Fields(body, "a usage row")
    whole, _, rest = fields.text("cost").partition(".")
    values: dict[str, Any] = {name: fields.text(name) for name in GROUPS}
    values |= {name: fields.integer(name) for name in SUMS if name != "cost"}
    if not (whole.isdigit() and rest.isdigit() and len(rest) == 9):
        raise InvalidRequest("a usage row: cost is no amount of money", param="cost")
    return UsageRow(**values, cost=int(whole) * NANO + int(rest))


def csv_of(groups: Sequence[str], rows: Sequence[UsageRow]) -> str:
    """Rows as RFC 4180 has them. A name that a spreadsheet would take for a formula gets a quote
    before it."""
    text = io.StringIO()
    bodies = [usage_body(row) for row in rows]
    columns = [*groups, *(name for name in usage_body(UsageRow()) if name not in UsageRow.NAMES)]
    writer = csv.writer(text)
    writer.writerow(columns)
    for body in bodies:
        writer.writerow([_cell(body[name]) for name in columns])
    return text.getvalue()


def _cell(value: str | int) -> str | int:
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return value


def check_groups(names: Iterable[str]) -> tuple[str, ...]:
    """Names to group by, in their usual order. Raises InvalidRequest."""
    wanted = set(names)
    for name in sorted(wanted - set(GROUPS)):
        raise InvalidRequest(
            f"group_by {name[:40]!r} is unknown; choose of {', '.join(GROUPS)}", param="group_by"
        )
    return tuple(name for name in GROUPS if name in wanted)


def day_of(stamp: float) -> str:
    """The UTC date of a moment."""
    return datetime.fromtimestamp(stamp, UTC).date().isoformat()


def span_of(since: str | None, until: str | None, now: float) -> tuple[float, float]:
    """The moments between two UTC dates, the last included; without them, the last 30 days.
    Raises InvalidRequest."""
    last = _date(until, "until") or datetime.fromtimestamp(now, UTC).date()
    first = _date(since, "since") or last - timedelta(days=29)
    if first > last:
        raise InvalidRequest(f"since {first} is after until {last}", param="since")
    return _stamp(first), _stamp(last) + DAY_S


def day_start(now: float) -> float:
    """The moment at which the UTC day of ``now`` began."""
    return now - now % DAY_S


def month_of(now: float) -> float:
    """The moment at which the UTC month of ``now`` began."""
    return _stamp(datetime.fromtimestamp(now, UTC).date().replace(day=1))


def _date(text: str | None, param: str) -> date | None:
    if not text:
        return None
    try:
        found = date.fromisoformat(text)
    except ValueError:
        found = date.min
    if not 1970 <= found.year <= 9000:
        raise InvalidRequest(
            f"{param} {text[:40]!r} is no date; write it as 2026-01-31", param=param
        )
    return found


def _stamp(day: date) -> float:
    return datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
