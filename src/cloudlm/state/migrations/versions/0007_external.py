"""Endpoints may be another's service: their priority, the model's name there, and its secret's."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision: str | None = "0006"


def upgrade() -> None:
    """Add the columns; endpoints from before are our own replicas."""
    kind = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.add_column(
        "endpoints", sa.Column("priority", sa.BigInteger, nullable=False, server_default="0")
    )
    op.add_column("endpoints", sa.Column("upstream_model", kind, nullable=False, server_default=""))
    op.add_column("endpoints", sa.Column("secret", kind, nullable=False, server_default=""))
