"""The audit log."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision: str | None = "0002"

_TEXTS = ("server", "actor", "key_id", "tenant", "action", "target", "source", "outcome")


def upgrade() -> None:
    """Build the log, its end and its checkpoints."""
    op.create_table(
        "audit",
        sa.Column("seq", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        *(_text(name) for name in _TEXTS),
        sa.Column("status", sa.BigInteger, nullable=False),
        *(_text(name) for name in ("request_id", "detail", "previous", "hash")),
        sa.PrimaryKeyConstraint("seq", name="pk_audit"),
    )
    op.create_index("ix_audit_tenant_seq", "audit", ["tenant", "seq"])
    head = op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        _text("hash"),
        sa.PrimaryKeyConstraint("id", name="pk_audit_head"),
        sa.CheckConstraint("id = 1", name="one_row"),
    )
    op.bulk_insert(head, [{"id": 1, "seq": 0, "hash": "0" * 64}])
    op.create_table(
        "audit_checkpoints",
        sa.Column("seq", sa.BigInteger, autoincrement=False, nullable=False),
        _text("hash"),
        sa.Column("at", sa.Double, nullable=False),
        _text("signature"),
        sa.PrimaryKeyConstraint("seq", name="pk_audit_checkpoints"),
    )


def _text(name: str) -> sa.Column[Any]:
    """Text sorted by code point, which SQLite does by itself."""
    kind = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    return sa.Column(name, kind, nullable=False)
