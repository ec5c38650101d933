"""Options that several nouns share, and how their values are read and shown."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from cloudlm.core.access import Grant, Limits, check_scope
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.model import check_name

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Expires = Annotated[
    str | None, typer.Option("--expires", help="How long it stays good: 30m, 12h, 90d.")
]
RequestsPerMinute = Annotated[
    int | None, typer.Option("--requests-per-minute", min=0, help="Limit of requests.")
]
TokensPerMinute = Annotated[
    int | None, typer.Option("--tokens-per-minute", min=0, help="Limit of tokens, both ways.")
]
Concurrent = Annotated[
    int | None, typer.Option("--concurrent-streams", min=0, help="Limit of requests in flight.")
]
Spend = Annotated[
    float | None,
    typer.Option("--spend-per-month", min=0.0, help="Limit of money, in the prices' currency."),
]
SpendDay = Annotated[
    float | None,
    typer.Option("--spend-per-day", min=0.0, help="The same for each day (UTC)."),
]
Tenant = Annotated[
    str | None, typer.Option("--tenant", help="The tenant; the key's own if not given.")
]
Grants = Annotated[
    list[str] | None,
    typer.Option("--grant", help="A role within a scope, role@scope; repeatable."),
]
_SPAN = re.compile(r"(\d{1,9})\s*(s|m|h|d|)", re.ASCII)
_UNIT_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def limits_of(
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    concurrent_streams: int | None = None,
    spend_per_month: float | None = None,
    spend_per_day: float | None = None,
) -> Limits:
    """Limits of what the options gave."""
    return Limits(
        requests_per_minute, tokens_per_minute, concurrent_streams, spend_per_month, spend_per_day
    )


def limits_text(limits: Limits) -> str:
    """Limits as people read them; empty if there are none."""
    parts = (
        (limits.requests_per_minute, "req/min"),
        (limits.tokens_per_minute, "tok/min"),
        (limits.concurrent_streams, "at once"),
        (limits.spend_per_month, "/month"),
        (limits.spend_per_day, "/day"),
    )
    return ", ".join(f"{value:.12g} {unit}" for value, unit in parts if value is not None)


def seconds_of(span: str | None) -> float | None:
    """A span such as 30m as seconds, None for none. Raises InvalidRequest."""
    if span is None:
        return None
    match = _SPAN.fullmatch(span.strip().lower())
    if match is None or int(match[1]) == 0:
        raise InvalidRequest(f"{span[:40]!r} is no span of time; write 90s, 30m, 12h or 7d")
    return float(int(match[1]) * _UNIT_S[match[2]])


def grants_of(texts: list[str] | None) -> tuple[Grant, ...]:
    """Grants out of ``role@scope``. Raises InvalidRequest."""
    grants = []
    for text in texts or []:
        role, at, scope = text.partition("@")
        if not at:
            raise InvalidRequest(f"{text[:80]!r} must be role@scope, such as developer@acme/web")
        grants.append(Grant(check_name(role, "role"), check_scope(scope)))
    return tuple(grants)


def grants_text(grants: tuple[Grant, ...]) -> str:
    """Grants as people write them."""
    return " ".join(f"{grant.role}@{grant.scope}" for grant in grants)


def date_text(stamp: float | None) -> str:
    """A date and time of day, empty for none."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(stamp)) if stamp else ""


def absolute(path: str | None) -> str | None:
    """A file's path as another process understands it."""
    return str(Path(path).expanduser().absolute()) if path else None
