"""What was used and what it cost: sums of ledger rows, by day, tenant, project, key and model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from cloudlm.core.errors import InvalidRequest

DAY_S = 86_400
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
