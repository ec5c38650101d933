"""Times at which other bounds hold for a deployment: a cron expression and how long from then.

The five fields of crontab(5): minute, hour, day of month, month, day of week (0 and 7 are Sunday),
with ``*``, lists, ranges, steps and the English names of months and days. As there, when both days
are restricted either one will do. Pure: the moment is an argument.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Any
from zoneinfo import ZoneInfo

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.fields import Fields, check_number

MAX_DURATION_S = 7 * 86_400.0
_PARAM = "scaling.schedules"
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS: tuple[tuple[str, int, int, tuple[str, ...], int], ...] = (
    ("minute", 0, 59, (), 0),
    ("hour", 0, 23, (), 0),
    ("day of month", 1, 31, (), 0),
    ("month", 1, 12, _MONTHS, 1),
    ("day of week", 0, 7, _DAYS, 0),
)
_PART = re.compile(r"(\*|[0-9a-z]{1,3})(?:-([0-9a-z]{1,3}))?(?:/([0-9]{1,2}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Schedule:
    """From each moment of ``cron`` on, for ``duration_s``, these bounds hold; None leaves the
    deployment's own. ``timezone`` is a name of the IANA database."""

    cron: str
    duration_s: float
    min_replicas: int | None = None
    max_replicas: int | None = None
    timezone: str = "UTC"


@dataclass(frozen=True, slots=True)
class _Times:
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either_day: bool

    def on(self, day: date) -> bool:
        """Whether any moment of ``day`` is meant."""
        by_month = day.day in self.days
        by_week = day.isoweekday() % 7 in self.weekdays
        fits = (by_month or by_week) if self.either_day else (by_month and by_week)
        return fits and day.month in self.months


def holds(schedule: Schedule, at: float) -> bool:
    """Whether the schedule's bounds hold at ``at``, Unix seconds."""
    times, zone = _times(schedule.cron), _zone(schedule.timezone)
    local = datetime.fromtimestamp(at, zone)
    for back in range(int(schedule.duration_s // 86_400) + 2):
        day = local.date() - timedelta(days=back)
        if not times.on(day):
            continue
        for hour in reversed(times.hours):
            for minute in reversed(times.minutes):
                begin = datetime(day.year, day.month, day.day, hour, minute, tzinfo=zone)
                passed_s = at - begin.timestamp()
                if passed_s >= 0:  # the latest moment before ``at``: earlier ones end earlier
                    return passed_s < schedule.duration_s
    return False


def check_schedule(schedule: Schedule) -> Schedule:
    """Return ``schedule`` if it may be used. Raises InvalidRequest naming the field."""
    _times(schedule.cron)
    _zone(schedule.timezone)
    check_number(schedule.duration_s, f"{_PARAM}.duration_s", 60.0, MAX_DURATION_S)
    low, high = schedule.min_replicas, schedule.max_replicas
    if low is None and high is None:
        raise InvalidRequest(
            f"the schedule {schedule.cron!r} changes nothing: give it min_replicas or max_replicas",
            param=_PARAM,
        )
    check_number(0 if low is None else low, f"{_PARAM}.min_replicas", 0, 1000)
    check_number(1 if high is None else high, f"{_PARAM}.max_replicas", 1, 1000)
    if low is not None and high is not None and low > high:
        raise InvalidRequest(
            f"the schedule {schedule.cron!r} has min_replicas {low} above max_replicas {high}",
            param=f"{_PARAM}.min_replicas",
        )
    return schedule


def schedule_body(schedule: Schedule) -> dict[str, Any]:
    """A schedule as JSON; ``schedule_from_body`` reads it back."""
    return {
        "cron": schedule.cron,
        "duration_s": schedule.duration_s,
        "min_replicas": schedule.min_replicas,
        "max_replicas": schedule.max_replicas,
        "timezone": schedule.timezone,
    }


def schedule_from_body(body: Any) -> Schedule:
    """Read a schedule by type. Raises InvalidRequest and UnprocessableRequest."""
    fields = Fields(body, "a schedule", path=f"{_PARAM}.")
    found = Schedule(
        cron=fields.text("cron", max_length=256),
        duration_s=fields.number("duration_s"),
        min_replicas=_optional(fields, "min_replicas"),
        max_replicas=_optional(fields, "max_replicas"),
        timezone=fields.text("timezone", "UTC", max_length=64),
    )
    fields.end()
    return found


def _optional(fields: Fields, name: str) -> int | None:
    return None if fields.raw(name, None) is None else fields.integer(name)


@lru_cache(256)
def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError):  # KeyError holds ZoneInfoNotFoundError
        raise InvalidRequest(
            f"there is no time zone {name[:80]!r}; names are those of the IANA database, such as "
            "UTC or Europe/Zurich",
            param=f"{_PARAM}.timezone",
        ) from None


@lru_cache(256)
def _times(cron: str) -> _Times:
    parts = cron.lower().split()
    if len(parts) != len(_FIELDS):
        raise InvalidRequest(
            f"cron {cron[:80]!r} must have five fields: minute, hour, day of month, month, day of "
            "week, such as '0 8 * * mon-fri'",
            param=f"{_PARAM}.cron",
        )
    minutes, hours, days, months, weekdays = (
        _numbers(part, *field) for part, field in zip(parts, _FIELDS, strict=True)
    )
    return _Times(
        tuple(sorted(minutes)),
        tuple(sorted(hours)),
        frozenset(days),
        frozenset(months),
        frozenset(one % 7 for one in weekdays),
        either_day=not parts[2].startswith("*") and not parts[4].startswith("*"),
    )


def _numbers(
    text: str, what: str, low: int, high: int, names: tuple[str, ...], first: int
) -> Collection[int]:
    found: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise _bad(what, part, low, high)
        begin, end, step = match.groups()
        if begin == "*":
            start, stop = low, high
        else:
            start = _number(begin, what, low, high, names, first)
            stop = start if end is None else _number(end, what, low, high, names, first)
            if end is None and step is not None:
                stop = high
        if stop < start or (begin == "*" and end is not None) or step == "0" or step == "00":
            raise _bad(what, part, low, high)
        found.update(range(start, stop + 1, int(step or 1)))
    return found


def _number(text: str, what: str, low: int, high: int, names: tuple[str, ...], first: int) -> int:
    if text in names:
        return names.index(text) + first
    if text.isdigit() and low <= int(text) <= high:
        return int(text)
    raise _bad(what, text, low, high)


def _bad(what: str, text: str, low: int, high: int) -> InvalidRequest:
    return InvalidRequest(
        f"cron: the {what} {text[:40]!r} must be from {low} to {high}, a range, a list or a step "
        "such as */5",
        param=f"{_PARAM}.cron",
    )
