"""The first tables."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None


def upgrade() -> None:
    """Build all tables and the one row of ``state_version``."""
    version = op.create_table(
        "state_version",
        sa.Column("id", sa.Integer, autoincrement=False, nullable=False),
        _whole("value"),
        sa.PrimaryKeyConstraint("id", name="pk_state_version"),
        sa.CheckConstraint("id = 1", name="one_row"),
    )
    op.bulk_insert(version, [{"id": 1, "value": 0}])
    _deployments()
    _traffic()
    _keys_and_jobs()
    _ledger()


def _deployments() -> None:
    op.create_table(
        "deployments",
        _text("name"),
        sa.Column("spec", sa.Text, nullable=False),
        _whole("generation"),
        _whole("revision"),
        sa.Column("deleting", sa.Boolean, nullable=False),
        _number("created_at"),
        _number("updated_at"),
        sa.PrimaryKeyConstraint("name", name="pk_deployments"),
    )
    op.create_table(
        "deployment_statuses",
        _text("name"),
        _text("phase"),
        _whole("observed_generation"),
        _whole("wanted_replicas"),
        _whole("ready_replicas"),
        sa.Column("replicas", sa.Text, nullable=False),
        _text("message"),
        _number("updated_at"),
        sa.PrimaryKeyConstraint("name", name="pk_deployment_statuses"),
        sa.ForeignKeyConstraint(
            ["name"],
            ["deployments.name"],
            name="fk_deployment_statuses_name_deployments",
            ondelete="CASCADE",
        ),
    )


def _traffic() -> None:
    op.create_table(
        "endpoints",
        _text("model"),
        _text("replica"),
        _text("url"),
        _whole("revision"),
        _number("weight"),
        sa.PrimaryKeyConstraint("model", "replica", name="pk_endpoints"),
    )
    op.create_table(
        "demand",
        _text("model"),
        _text("gateway"),
        _whole("ongoing"),
        _whole("queued"),
        _number("requests_per_s"),
        _number("measured_at"),
        sa.PrimaryKeyConstraint("model", "gateway", name="pk_demand"),
    )


def _keys_and_jobs() -> None:
    op.create_table(
        "api_keys",
        *(_text(name) for name in ("id", "name", "role", "digest", "last4", "tenant")),
        _number("created_at"),
        _number("revoked_at", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
    )
    op.create_table(
        "jobs",
        _text("id"),
        _text("kind"),
        sa.Column("arguments", sa.Text, nullable=False),
        _text("state"),
        _number("progress"),
        _text("message"),
        sa.Column("result", sa.Text, nullable=False),
        sa.Column("error", sa.Text, nullable=True),
        _number("created_at"),
        _number("updated_at"),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    op.create_index("ix_jobs_created_at_id", "jobs", ["created_at", "id"])


def _ledger() -> None:
    op.create_table(
        "ledger",
        _text("id"),
        _text("request_id"),
        _whole("attempt"),
        *(_text(name) for name in ("tenant", "key_id", "model", "replica", "outcome")),
        *(_whole(name) for name in ("status", "prompt_tokens")),
        *(_whole(name) for name in ("completion_tokens", "cached_tokens")),
        _number("started_at"),
        _number("duration_s"),
        _number("first_token_s", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_ledger"),
    )
    op.create_index("ix_ledger_started_at_id", "ledger", ["started_at", "id"])
    op.create_index("ix_ledger_request_id", "ledger", ["request_id"])


def _text(name: str) -> sa.Column[Any]:
    """Text sorted by code point, which SQLite does by itself."""
    kind = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    return sa.Column(name, kind, nullable=False)


def _whole(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger, nullable=False)


def _number(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.Double, nullable=nullable)
