"""Ledger rows hold what they cost and the project they belong to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision: str | None = "0003"


def upgrade() -> None:
    """Add the columns; rows from before cost nothing and belong to the default project."""
    kind = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.add_column("ledger", sa.Column("project", kind, nullable=False, server_default="default"))
    op.add_column("ledger", sa.Column("cost", sa.BigInteger, nullable=False, server_default="0"))
