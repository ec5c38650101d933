"""How ``cloudlm keys`` shows keys to people. Must not read or change any."""

from __future__ import annotations

from collections.abc import Sequence

from cloudlm.cli.folding import unbroken
from cloudlm.cli.options import date_text, limits_text
from cloudlm.cli.screen import age_text, print_table
from cloudlm.core.tenant import KeyRecord

_COLUMNS = ("ID", "NAME", "ROLE", "SCOPE", "MODELS", "LIMITS", "EXPIRES", "LAST USED")
_ALL_COLUMNS = (
    *("ID", "NAME", "ROLE", "SCOPE", "PRINCIPAL", "MODELS", "LIMITS", "ENDS IN"),
    *("CREATED", "LAST USED", "EXPIRES", "REVOKED"),
)
_WHOLE = {"ID", "EXPIRES"}


def print_keys(records: Sequence[KeyRecord], now: float, *, everything: bool) -> None:
    """Keys as a table; ``everything`` adds what is rarely asked for. ``now`` in seconds."""
    if everything:
        print_table(_ALL_COLUMNS, [_whole_row(record) for record in records], "no keys")
        return
    print_table(_COLUMNS, [_row(record, now) for record in records], "no keys", whole=_WHOLE)


def replaced_text(old: KeyRecord) -> str:
    """Which key another has just taken the place of, and until when it is good."""
    if old.revoked_at is not None or old.expires_at is None:
        good = "is refused from now on"
    else:
        good = f"stays good until {date_text(old.expires_at)}"
    return f"It replaces {old.id} ({old.name}, …{old.last4}), which {good}."


def _row(record: KeyRecord, now: float) -> tuple[str, ...]:
    ends = date_text(record.expires_at)[:10] or "never"
    used = record.last_used_at
    return (
        record.id,
        record.name,
        record.role,
        record.scope,
        " ".join(record.models),
        ", ".join(unbroken(one) for one in limits_text(record.limits).split(", ")),
        ends if record.revoked_at is None else "revoked",
        "never" if used is None else unbroken(f"{age_text(now - used)} ago"),
    )


def _whole_row(record: KeyRecord) -> tuple[str, ...]:
    return (
        record.id,
        record.name,
        record.role,
        record.scope,
        record.principal,
        " ".join(record.models),
        limits_text(record.limits),
        f"…{record.last4}",
        date_text(record.created_at),
        date_text(record.last_used_at),
        date_text(record.expires_at),
        date_text(record.revoked_at),
    )
