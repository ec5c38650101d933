"""Where deployments stand with the memory budget."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision: str | None = "0008"


def upgrade() -> None:
    """Add the columns; statuses from before say nothing of memory."""
    kind = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    table = "deployment_statuses"
    op.add_column(table, sa.Column("residence", kind, nullable=False, server_default=""))
    op.add_column(
        table, sa.Column("memory_bytes", sa.BigInteger(), nullable=False, server_default="0")
    )
