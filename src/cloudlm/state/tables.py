"""The tables of the SQL state. ``migrations`` builds the same; a test proves that they agree.

Only words of SQL that SQLite and PostgreSQL share. Documents are JSON in text columns: they are
read whole and never searched.
"""

from __future__ import annotations

import re
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect

_UNSTORABLE = re.compile("[\\x00\\\\\ud800-\udfff]")
_ESCAPED = re.compile(r"\\u([0-9a-f]{4})")


class ExactText(sa.types.TypeDecorator[str]):
    """Text of any content, sorted by code point in both databases.

    NUL and lone surrogates, which databases refuse, are kept as ``\\uXXXX`` (and so is a
    backslash): what comes from a request must never be able to stop a ledger row.
    """

    impl = sa.Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> sa.types.TypeEngine[Any]:
        collation = "C" if dialect.name == "postgresql" else None
        return sa.TEXT(collation=collation)

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else storable(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None or "\\" not in value:
            return value
        return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), value)


def is_storable(value: str) -> bool:
    """Whether ``storable`` leaves it as it is; at a look where it is plain."""
    if value.isascii():
        return "\\" not in value and "\0" not in value
    return _UNSTORABLE.search(value) is None


def storable(value: str) -> str:
    """``value`` with what no database stores written as an escape."""
    return _UNSTORABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", value)


metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _text(name: str, *, key: bool = False) -> sa.Column[str]:
    return sa.Column(name, ExactText, primary_key=key, nullable=False)


def _whole(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False)


def _number(name: str, *, nullable: bool = False) -> sa.Column[float]:
    return sa.Column(name, sa.Double, nullable=nullable)


state_version = sa.Table(
    "state_version",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    _whole("value"),
    sa.CheckConstraint("id = 1", name="one_row"),
)

deployments = sa.Table(
    "deployments",
    metadata,
    _text("name", key=True),
    sa.Column("spec", sa.Text, nullable=False),
    _whole("generation"),
    _whole("revision"),
    sa.Column("deleting", sa.Boolean, nullable=False),
    _number("created_at"),
    _number("updated_at"),
    _whole("last_revision"),
)

deployment_statuses = sa.Table(
    "deployment_statuses",
    metadata,
    sa.Column(
        "name",
        ExactText,
        sa.ForeignKey("deployments.name", ondelete="CASCADE"),
        primary_key=True,
    ),
    _text("phase"),
    _whole("observed_generation"),
    _whole("wanted_replicas"),
    _whole("ready_replicas"),
    sa.Column("replicas", sa.Text, nullable=False),
    _text("message"),
    _number("updated_at"),
    _text("residence"),
    _whole("memory_bytes"),
)

revisions = sa.Table(
    "revisions",
    metadata,
    sa.Column(
        "name",
        ExactText,
        sa.ForeignKey("deployments.name", ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("spec", sa.Text, nullable=False),
    _number("created_at"),
    *(_text(name) for name in ("by", "outcome", "reason")),
    _number("ended_at"),
    _text("model"),
    sa.Column("adapters", sa.Text, nullable=False),
    _whole("scores"),
    _number("score_total"),
)

rollouts = sa.Table(
    "rollouts",
    metadata,
    sa.Column(
        "name",
        ExactText,
        sa.ForeignKey("deployments.name", ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("document", sa.Text, nullable=False),
)

leases = sa.Table(
    "leases",
    metadata,
    _text("name", key=True),
    _text("holder"),
    _whole("token"),
    _whole("renewals"),
    _number("lasts_s"),
)

endpoints = sa.Table(
    "endpoints",
    metadata,
    _text("model", key=True),
    _text("replica", key=True),
    _text("url"),
    _whole("revision"),
    _number("weight"),
    _number("share", nullable=True),
    _number("mirror"),
    _whole("priority"),
    _text("upstream_model"),
    _text("secret"),
)

demand = sa.Table(
    "demand",
    metadata,
    _text("model", key=True),
    _text("gateway", key=True),
    _whole("ongoing"),
    _whole("queued"),
    _number("requests_per_s"),
    _number("measured_at"),
    _number("prompt_tokens_per_s"),
    _number("waiting_prompt_tokens"),
    _number("finished_per_s"),
    _number("output_tokens_per_s"),
    _number("computed_tokens_per_s"),
    _number("ttft_s"),
    _number("tpot_s"),
)

paces = sa.Table(
    "paces",
    metadata,
    _text("deployment", key=True),
    _text("model", key=True),
    sa.Column("document", sa.Text, nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    _text("id", key=True),
    _text("name"),
    _text("role"),
    _text("digest"),
    _text("last4"),
    _text("tenant"),
    _number("created_at"),
    _number("revoked_at", nullable=True),
    _text("project"),
    _text("principal"),
    _text("scope"),
    sa.Column("models", sa.Text, nullable=False),
    sa.Column("limits", sa.Text, nullable=False),
    _number("expires_at", nullable=True),
    _text("made_with"),
    _number("last_used_at", nullable=True),
)

tenants = sa.Table(
    "tenants",
    metadata,
    _text("name", key=True),
    sa.Column("document", sa.Text, nullable=False),
)

projects = sa.Table(
    "projects",
    metadata,
    _text("tenant", key=True),
    _text("name", key=True),
    sa.Column("document", sa.Text, nullable=False),
)

principals = sa.Table(
    "principals",
    metadata,
    _text("id", key=True),
    sa.Column("document", sa.Text, nullable=False),
)

roles = sa.Table(
    "roles",
    metadata,
    _text("scope", key=True),
    _text("name", key=True),
    sa.Column("document", sa.Text, nullable=False),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    _number("at"),
    *(_text(name) for name in ("server", "actor", "key_id", "tenant", "action", "target")),
    *(_text(name) for name in ("source", "outcome")),
    _whole("status"),
    *(_text(name) for name in ("request_id", "detail", "previous", "hash")),
    sa.Index(None, "tenant", "seq"),
)

audit_head = sa.Table(
    "audit_head",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    _whole("seq"),
    _text("hash"),
    sa.CheckConstraint("id = 1", name="one_row"),
)

audit_checkpoints = sa.Table(
    "audit_checkpoints",
    metadata,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    _text("hash"),
    _number("at"),
    _text("signature"),
)

jobs = sa.Table(
    "jobs",
    metadata,
    _text("id", key=True),
    _text("kind"),
    sa.Column("arguments", sa.Text, nullable=False),
    _text("state"),
    _number("progress"),
    _text("message"),
    sa.Column("result", sa.Text, nullable=False),
    sa.Column("error", sa.Text, nullable=True),
    _number("created_at"),
    _number("updated_at"),
    sa.Index(None, "created_at", "id"),
    sa.Index(None, "state", "created_at", "id"),
)

ledger = sa.Table(
    "ledger",
    metadata,
    _text("id", key=True),
    _text("request_id"),
    _whole("attempt"),
    _text("tenant"),
    _text("key_id"),
    _text("model"),
    _text("replica"),
    _text("outcome"),
    _whole("status"),
    _whole("prompt_tokens"),
    _whole("completion_tokens"),
    _whole("cached_tokens"),
    _number("started_at"),
    _number("duration_s"),
    _number("first_token_s", nullable=True),
    _text("project"),
    _whole("cost"),
    sa.Index(None, "started_at", "id"),
    sa.Index(None, "request_id"),
    sa.Index(None, "key_id", "started_at"),
)
