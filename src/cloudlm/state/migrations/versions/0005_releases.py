"""Deployments remember their revisions and where their roll-out stands; endpoints, how requests
are split between revisions."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision: str | None = "0004"


def upgrade() -> None:
    """Add the tables and columns. What is asked for now is each history's first entry."""
    op.add_column(
        "deployments",
        sa.Column("last_revision", sa.BigInteger, nullable=False, server_default="0"),
    )
    op.add_column("endpoints", sa.Column("share", sa.Double, nullable=True))
    op.add_column("endpoints", sa.Column("mirror", sa.Double, nullable=False, server_default="0"))
    op.create_table(
        "revisions",
        _text("name"),
        sa.Column("number", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        *(_text(name) for name in ("by", "outcome", "reason")),
        sa.Column("ended_at", sa.Double, nullable=False),
        _text("model"),
        sa.Column("adapters", sa.Text, nullable=False),
        sa.Column("scores", sa.BigInteger, nullable=False),
        sa.Column("score_total", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("name", "number", name="pk_revisions"),
        _of_a_deployment("revisions"),
    )
    op.create_table(
        "rollouts",
        _text("name"),
        sa.Column("document", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_rollouts"),
        _of_a_deployment("rollouts"),
    )
    op.execute(
        'INSERT INTO revisions (name, number, spec, created_at, "by", outcome, reason, ended_at, '
        "model, adapters, scores, score_total) SELECT name, revision, spec, updated_at, '', "
        "'pending', '', 0, '', '{}', 0, 0 FROM deployments"
    )


def _of_a_deployment(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["name"], ["deployments.name"], name=f"fk_{table}_name_deployments", ondelete="CASCADE"
    )


def _text(name: str) -> sa.Column[Any]:
    """Text sorted by code point, which SQLite does by itself."""
    kind = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    return sa.Column(name, kind, nullable=False)
